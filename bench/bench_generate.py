"""Generation with the original's README character model: a token, a prompt, a long walk, a served stream.

    python -m pytest bench/bench_generate.py --benchmark-json=result.json
    python bench/bench_generate.py --walk 100000       # time and memory of a token along the way
    python bench/bench_generate.py --serve 16          # streams over HTTP beside the engine alone

Rows of a run share the machine's mood: compare rows, not runs. "window" recomputes the context for each
token, as the original does; "step" is the model's step, "native" one call of the extension. "window" and
"step" run on the backend that is chosen by itself, "window-eager" and "eager" on the reference, plain
PyTorch. Logits are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import threading
import time
from typing import Any

import pytest
import torch

from spikedecoder import SpikeDecoder, SpikeDecoderConfig
from spikedecoder.generation import (
    Batch,
    Continuation,
    Native,
    Recurrent,
    SamplingParams,
    Window,
    open_source,
)
from spikedecoder.generation.native import why_not
from spikedecoder.generation.window import LogitSource
from spikedecoder.ops import use_backend

LENGTH = 256
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_model(**changes: Any) -> SpikeDecoder:
    torch.manual_seed(0)
    model = SpikeDecoder(SpikeDecoderConfig.preset("original-char", **changes)).to(DEVICE).eval()
    with torch.no_grad():
        for table in model.embedding.parameters():
            table.normal_()  # fresh tables sit at the threshold, where all tokens look alike
    return model


@pytest.fixture(scope="module")
def model() -> SpikeDecoder:
    return make_model()


def prompts(batch: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 28, (batch, length), generator=generator).tolist()


SOURCES: dict[str, Any] = {
    "window-eager": Window,
    "window": Window,
    "eager": Recurrent,
    "step": Recurrent,
    "native": Native,
}


def same_logits(model: SpikeDecoder, how: str) -> None:
    """The source that is timed against the definition, within what matrix products of another shape round."""
    timed, window = SOURCES[how](model), Window(model)
    torch.testing.assert_close(timed.add(prompts(2, 40)), window.add(prompts(2, 40)), rtol=1e-3, atol=1e-3)
    for i in range(3):
        torch.testing.assert_close(timed.step([i, i + 1]), window.step([i, i + 1]), rtol=1e-3, atol=1e-3)


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def walk(source: LogitSource, batch: int) -> Any:
    def one() -> None:
        source.step([5] * batch)
        wait()

    return one


@pytest.mark.benchmark(group="original-char: one more token")
@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("how", SOURCES)
def test_token(benchmark: Any, model: SpikeDecoder, how: str, batch: int) -> None:
    recomputes = how.startswith("window")
    if recomputes and batch > 1:
        pytest.skip("too slow to wait for")
    if how == "native" and (reason := why_not(model)):
        pytest.skip(reason)
    with use_backend("reference" if how.endswith("eager") else "auto"):
        same_logits(model, how)
        source: LogitSource = SOURCES[how](model)
        source.add(prompts(batch, LENGTH - 25 if recomputes else 8))
        one = walk(source, batch)
        rounds = 5 if recomputes else 100 if how == "native" else 20
        benchmark.pedantic(one, rounds=rounds, warmup_rounds=2)
    benchmark.extra_info["tokens_per_second"] = round(batch / benchmark.stats.stats.min, 1)


@pytest.mark.benchmark(group="original-char: reading a prompt")
@pytest.mark.parametrize("how", ["forward", "prefill"])
@pytest.mark.parametrize("length", [256, 1024])
def test_prompt(benchmark: Any, model: SpikeDecoder, how: str, length: int) -> None:
    tokens = torch.tensor(prompts(1, length), device=DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(model.prefill(tokens)[0], model(tokens), rtol=1e-3, atol=1e-3)

    def read() -> None:
        with torch.no_grad():
            _ = model(tokens) if how == "forward" else model.prefill(tokens)
        wait()

    benchmark.pedantic(read, rounds=3, warmup_rounds=1)
    benchmark.extra_info["tokens_per_second"] = round(length / benchmark.stats.stats.median)


@pytest.mark.benchmark(group="original-char: choosing a token")
@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("sampling", [SamplingParams(0), SamplingParams(0.8), SamplingParams(0.8, top_p=0.9)])
def test_sampling(benchmark: Any, batch: int, sampling: SamplingParams) -> None:
    """All that a token costs besides the model: `Batch.step` over a source that computes nothing."""

    class Still:
        logits = torch.randn(batch, 30, generator=torch.Generator().manual_seed(0))

        def add(self, prompts: Any) -> torch.Tensor:
            return self.logits

        step = select = add

    drawn = Batch(Still())
    drawn.add(Continuation(i, [1], 10**9, sampling, i) for i in range(batch))
    benchmark(drawn.step)


def long_walk(tokens: int) -> list[dict[str, float]]:
    """A small model generates on and on: state, resident memory and time per token at 1 000, 10 000, ..."""
    import psutil

    config = SpikeDecoderConfig.preset("default", vocab_size=30, blocks=1, timesteps=2)
    model = SpikeDecoder(config).to(DEVICE).eval()
    source = open_source(model, past="continue")
    batch = Batch(source)
    batch.add([Continuation(0, [1], 10**12, SamplingParams(), 0)])
    stops, rows, times = [10**n for n in range(3, 10) if 10**n <= tokens], [], []
    for i in range(1, tokens + 1):
        begin = time.perf_counter()
        batch.step()
        times.append(time.perf_counter() - begin)
        if i in stops:
            state = getattr(source, "state", None)
            rows.append(
                {
                    "token": i,
                    "state_bytes": state.nbytes if state is not None else 0,
                    "resident_mib": round(psutil.Process().memory_info().rss / 2**20, 2),
                    "microseconds_per_token": round(statistics.median(times) * 1e6, 1),
                }
            )
        if len(times) == 900:
            times = times[450:]
    return rows


def served(streams: int, tokens: int = 60) -> dict[str, float]:
    """Tokens/s of `streams` sequences: in a `Batch` alone, and as HTTP streams, in turn.

    The clients are threads of this process, so that their work counts against the server.
    """
    from spikedecoder.data import CharTokenizer
    from spikedecoder.serve.app import Limits
    from spikedecoder.serve.engine import Engine
    from spikedecoder.serve.server import build, listen

    model = make_model()
    model.tokenizer = CharTokenizer.original()
    engine = Engine(model, max_batch=streams).start()
    server = build(engine, "model", Limits())
    socket = listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
    thread.start()

    def alone() -> float:
        batch = Batch(open_source(model))
        batch.add(Continuation(i, [4], tokens, SamplingParams(), i) for i in range(streams))
        begin = time.perf_counter()
        while batch:
            batch.step()
        return streams * tokens / (time.perf_counter() - begin)

    def stream(seed: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", socket.getsockname()[1], timeout=600)
        body = {"prompt": "e", "max_tokens": tokens, "seed": seed, "stream": True}
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        assert connection.getresponse().read().endswith(b"[DONE]\n\n")

    def over_http() -> float:
        clients = [threading.Thread(target=stream, args=(i,)) for i in range(streams)]
        begin = time.perf_counter()
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        return streams * tokens / (time.perf_counter() - begin)

    try:
        rounds = [(alone(), over_http()) for _ in range(6)][1:]
    finally:
        server.should_exit = True
        thread.join()
    batch, http_ = (statistics.median(column) for column in zip(*rounds, strict=True))
    return {
        "streams": streams,
        "batch_tokens_per_second": round(batch, 1),
        "http_tokens_per_second": round(http_, 1),
        "ratio": round(statistics.median(h / b for b, h in rounds), 3),  # of neighbouring runs
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--walk", type=int, metavar="TOKENS")
    parser.add_argument("--serve", type=int, metavar="STREAMS")
    given = parser.parse_args()
    if given.walk:
        print(json.dumps(long_walk(given.walk), indent=1))
    if given.serve:
        print(json.dumps(served(given.serve), indent=1))
