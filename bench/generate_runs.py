"""Helpers of bench_generate.py: a model that has learned a little, a server, the original program."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from spikedecoder import SpikeDecoder, SpikeDecoderConfig
from spikedecoder.compat.convert import convert_original, rename
from spikedecoder.data import CharTokenizer, builtin_text

OPTIONS: dict[str, Any] = {  # of the original's README character model, in its names
    **{"vocab_size": 30, "max_len": 256, "encodingType": "learned", "position_encoding_strategy": "static"},
    **{"tok_embed_dim": 50, "heads": 5, "blocks": 12, "timesteps": 4},
}


def text_ids() -> list[int]:
    text = "".join(c if c in "abcdefghijklmnopqrstuvwxyz. '" else " " for c in builtin_text().lower())
    return [int(i) for i in CharTokenizer.original().encode(" ".join(text.split()), errors="drop")]


def make_model(
    device: torch.device, steps: int = 60, preset: str = "original-char", lr: float = 1e-3, **changes: Any
) -> SpikeDecoder:
    """A preset with `changes` after a short training: fresh weights do not spike like learned ones."""
    torch.manual_seed(0)
    model = SpikeDecoder(SpikeDecoderConfig.preset(preset, **changes))
    optimizer = torch.optim.AdamW(model.parameter_groups(0.1), lr=lr)
    ids = torch.tensor(text_ids())
    for _ in range(steps):
        at = torch.randint(0, len(ids) - 65, (8,)).tolist()
        tokens = torch.stack([ids[i : i + 65] for i in at])
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.tokenizer = CharTokenizer.original()
    return model.to(device).eval()


def resident_mib() -> float:
    import psutil

    return round(psutil.Process().memory_info().rss / 2**20, 2)


@contextmanager
def server(model: SpikeDecoder, streams: int) -> Iterator[int]:
    """Serves the model on a free port, which it yields."""
    from spikedecoder.serve.app import Limits
    from spikedecoder.serve.engine import Engine
    from spikedecoder.serve.server import build, listen

    engine = Engine(model, max_batch=streams).start()
    running = build(engine, "model", Limits())
    socket = listen("127.0.0.1", 0)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [socket]})
    thread.start()
    try:
        yield socket.getsockname()[1]
    finally:
        running.should_exit = True
        thread.join()


_CLIENT = """
import http.client, json, sys, threading, time
port, streams, tokens = map(int, sys.argv[1:])
def stream(seed):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    body = {"prompt": "e", "max_tokens": tokens, "seed": seed, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    answer = connection.getresponse().read()
    whole.append(answer.endswith(b"[DONE]\\n\\n"))
for line in sys.stdin:
    whole = []
    clients = [threading.Thread(target=stream, args=(i,)) for i in range(streams)]
    begin = time.perf_counter()
    for client in clients: client.start()
    for client in clients: client.join()
    assert whole == [True] * streams
    print(time.perf_counter() - begin, flush=True)
"""


@contextmanager
def clients(port: int, streams: int, tokens: int) -> Iterator[Any]:
    """Yields a function that runs that many streams at once in another process and returns the seconds."""
    command = [sys.executable, "-c", _CLIENT, str(port), str(streams), str(tokens)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, bufsize=1) as process:
        assert process.stdin is not None and process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def run() -> float:
            stdin.write("go\n")
            return float(stdout.readline())

        yield run
        stdin.close()


_ORIGINAL = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
import torch, model
torch.manual_seed(0)
torch.set_num_threads(int(sys.argv[4]))
original = model.SpikingDecoderModel(model.SDconfig(**json.loads(sys.argv[3])), dim_hid=16)
state = original.state_dict()
if sys.argv[2] == "names":
    torch.save(state, sys.argv[5])
    sys.exit()
state.update(torch.load(sys.argv[5]))
original.load_state_dict(state)
original.eval()
text, new = sys.argv[6], int(sys.argv[7])
with torch.no_grad():
    torch.save(original([text])[0], sys.argv[5])
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        written = original.generate(text)
        times.append((time.perf_counter() - begin) / (len(written) - len(text)))
print(json.dumps(times))
"""


def original_times(checkout: Path, python: str, model: SpikeDecoder, threads: int) -> list[float]:
    """Seconds per character of the original's own `generate` with this model's weights; compares logits."""
    text = "".join(model.tokenizer.decode(text_ids()[:248]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pt"

        def run(what: str, *more: str) -> str:
            arguments = [str(checkout), what, json.dumps(OPTIONS), str(threads), str(path), *more]
            command = [python, "-c", _ORIGINAL, *arguments]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

        run("names")
        state, ours = torch.load(path, weights_only=True), model.state_dict()
        for name, value in state.items():
            renamed = rename(name, model.config)
            if renamed is not None and renamed in ours:
                state[name] = ours[renamed].reshape(value.shape).clone()
        torch.save(state, path)
        converted = convert_original(path, OPTIONS, kind="spiking", dim_hid=16)
        times = json.loads(run("time", text, "8").splitlines()[-1])
        theirs = torch.load(path, weights_only=True)
    with torch.no_grad():
        own = model(torch.tensor([text_ids()[:248]]))
        same = converted(torch.tensor([text_ids()[:248]]))
    torch.testing.assert_close(same, own)
    torch.testing.assert_close(theirs[:, :248], own, rtol=1e-3, atol=1e-3)
    return [float(t) for t in times]
