"""The HTTP server: OpenAI's client against it, load, disconnects, bad input, stopping."""

import asyncio
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from spikedecoder import SpikeDecoder, SpikeDecoderConfig
from spikedecoder.data import CharTokenizer
from spikedecoder.generation import Continuation, SamplingParams, generate, generate_text
from spikedecoder.serve import Engine, EngineError, QueueFull, Stopping

pytest.importorskip("fastapi", reason="needs the extra spikedecoder[serve]")
pytest.importorskip("uvicorn", reason="needs the extra spikedecoder[serve]")

TEXT = "the cat sat on the mat. it was a fat cat."


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads that wait for each other cost more than these small tensors do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model():
    """In float64, where a batch's size does not decide between two tokens."""
    tokenizer = CharTokenizer.from_text(TEXT)
    torch.manual_seed(0)
    config = SpikeDecoderConfig(
        vocab_size=tokenizer.vocab_size, max_len=16, token_dim=10, position_dim=6, heads=2, blocks=1,
        timesteps=2, pad_id=tokenizer.pad_id, embedding_gain=2.0,
    )  # fmt: skip
    model = SpikeDecoder(config).double().eval()
    with torch.no_grad():
        for table in model.embedding.parameters():
            table.normal_()
        model.head.linear.weight.mul_(8)
    model.tokenizer = tokenizer
    return model


class Gate:
    """Holds the model back at each step until it is opened."""

    def __init__(self, model, monkeypatch):
        self.open = threading.Event()
        step = model.step

        def wait(*arguments):
            assert self.open.wait(60)
            return step(*arguments)

        monkeypatch.setattr(model, "step", wait)


@pytest.fixture
def gate(model, monkeypatch):
    gate = Gate(model, monkeypatch)
    yield gate
    gate.open.set()


class Running:
    """A server on a thread of this process."""

    def __init__(self, model, grace=5.0, limits=None, **options):
        from spikedecoder.serve.app import Limits
        from spikedecoder.serve.server import build, listen

        self.engine = Engine(model, **options).start()
        self.server = build(self.engine, "tiny", limits or Limits(max_tokens=2000, prompt_tokens=50), grace)
        self.socket = listen("127.0.0.1", 0)
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})
        self.thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()
        self.thread.join(30)
        assert not self.thread.is_alive()
        self.engine.join(10)

    def stop(self):
        self.server.should_exit = True

    def ask(self, body, method="POST", path="/v1/completions", kind="application/json"):
        """(status, headers, JSON) of one request; a body of bytes is sent as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection.request(method, path, data, {"content-type": kind})
        answer = connection.getresponse()
        value = json.loads(answer.read())
        connection.close()
        return answer.status, dict(answer.getheaders()), value

    def stream(self, body):
        """An open connection whose answer's first event has been read."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(
            "POST",
            "/v1/completions",
            json.dumps({**body, "stream": True}),
            {"content-type": "application/json"},
        )
        answer = connection.getresponse()
        assert answer.status == 200 and answer.getheader("content-type").startswith("text/event-stream")
        return connection, answer, answer.readline()


@pytest.fixture(scope="module")
def running(model):
    with Running(model, max_batch=16, max_queue=64) as running:
        yield running


@pytest.fixture
def client(running):
    openai = pytest.importorskip("openai", reason="needs the openai package")
    with openai.OpenAI(base_url=running.url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not come"
        time.sleep(0.01)


# --- the engine alone


def continuation(engine, prompt, n, seed, **options):
    return Continuation(next(engine.numbers), prompt, n, SamplingParams(), seed, **options)


class Heard(list):
    """A listener that keeps what it hears; done when all of `wanted` sequences have ended."""

    def __init__(self, wanted=1):
        super().__init__()
        self.wanted, self.error, self.done = wanted, None, threading.Event()

    def __call__(self, heard):
        if isinstance(heard, EngineError):
            self.error = heard
            self.done.set()
            return
        self += heard
        if sum(new.finish is not None for new in self) == self.wanted:
            self.done.set()

    __hash__ = object.__hash__


def test_engine_gives_what_generate_gives_whoever_joins_and_leaves(model):
    engine = Engine(model, max_batch=3, max_queue=20).start()
    prompts = [[2, 3], [5], [4] * 30, [6, 7, 8], [9] * 15, [3] * 5, [2]]
    heard = []
    for i, prompt in enumerate(prompts):
        heard.append(Heard())
        engine.submit([continuation(engine, prompt, 12 + 5 * i, 40 + i)], heard[-1])
        if i == 4:
            engine.cancel([1])  # perhaps running, perhaps waiting, perhaps done
    for i, (prompt, ear) in enumerate(zip(prompts, heard, strict=True)):
        if i == 1:
            continue
        assert ear.done.wait(60)
        expected = generate(model, [prompt], 12 + 5 * i, SamplingParams(seed=40 + i)).tokens[0]
        assert [new.token for new in ear] == expected
        assert [new.finish for new in ear] == [None] * (len(expected) - 1) + ["length"]
    assert engine.running == engine.waiting == 0
    engine.close()
    engine.join(10)
    assert not engine.alive


def test_engine_bounds_cancel_and_order(model, gate):
    engine = Engine(model, max_batch=2, max_queue=2).start()
    sequences = [continuation(engine, [2], 5, i) for i in range(5)]
    ears = [Heard() for _ in sequences]
    for c, ear in zip(sequences[:4], ears, strict=False):
        engine.submit([c], ear)
    until(lambda: engine.running == 2)
    assert engine.waiting == 2
    with pytest.raises(QueueFull, match="4 of 4 places are taken, 1 more"):
        engine.submit([sequences[4]], ears[4])
    engine.cancel([sequences[0].number, sequences[3].number])
    assert (engine.running, engine.waiting) == (1, 1)
    engine.submit([sequences[4]], ears[4])
    gate.open.set()
    for i in (1, 2, 4):
        assert ears[i].done.wait(60) and len(ears[i]) == 5
    assert not ears[3] and len(ears[0]) <= 1
    engine.close()
    engine.join(10)
    with pytest.raises(Stopping):
        engine.submit([sequences[0]], ears[0])


def test_engine_survives_a_failure_and_tells(model, monkeypatch, capfd):
    engine = Engine(model, max_batch=2).start()
    step = model.step
    calls = []

    def fail_once(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("a wire is loose")
        return step(*arguments)

    monkeypatch.setattr(model, "step", fail_once)
    first, second = Heard(), Heard()
    engine.submit([continuation(engine, [2], 20, 1)], first)
    assert first.done.wait(60) and "a wire is loose" in str(first.error)
    engine.submit([continuation(engine, [2], 20, 1)], second)
    assert second.done.wait(60) and second.error is None and len(second) == 20
    engine.close()
    engine.join(10)
    assert "RuntimeError: a wire is loose" in capfd.readouterr().err


def test_engine_gives_up_when_its_time_is_over(model, gate):
    engine = Engine(model, max_batch=1).start()
    ear, waiting = Heard(), Heard()
    engine.submit([continuation(engine, [2], 10**6, 1)], ear)
    engine.submit([continuation(engine, [2], 10**6, 1)], waiting)
    until(lambda: len(ear) == 1)
    engine.close(grace=0.2)
    gate.open.set()
    assert ear.done.wait(30) and waiting.done.wait(30)
    assert isinstance(ear.error, Stopping) and isinstance(waiting.error, Stopping) and not waiting
    engine.join(10)
    assert not engine.alive and engine.running == 0


@pytest.mark.parametrize("options", [{"max_batch": 0}, {"max_batch": 2.0}, {"max_queue": -1}, {"past": "on"}])
def test_engine_bad_arguments(model, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: got .*takes"):
        Engine(model, **options)


# --- the official client


def test_completion_is_generate_text(client, model):
    answer = client.completions.create(
        model="tiny", prompt="the cat", max_tokens=30, temperature=0.7, top_p=0.9, seed=5
    )
    expected = generate_text(model, None, ["the cat"], max_new_tokens=30, temperature=0.7, top_p=0.9, seed=5)[
        0
    ]
    assert "the cat" + answer.choices[0].text == expected
    assert answer.choices[0].finish_reason == "length" and answer.object == "text_completion"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (7, 30)
    assert (
        client.completions.create(model="tiny", prompt="a").usage.completion_tokens == 16
    )  # OpenAI's default


def test_streaming_joins_to_the_same_text(client, model):
    stream = client.completions.create(
        model="tiny", prompt=["the cat", ""], max_tokens=25, seed=3, n=2, echo=True, stream=True,
        stream_options={"include_usage": True},
        extra_body={"min_p": 0.05, "top_k": 9, "repetition_penalty": 1.1},
    )  # fmt: skip
    texts, finishes, pieces, used = [""] * 4, [None] * 4, 0, None
    for chunk in stream:
        used = chunk.usage or used
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            finishes[choice.index] = choice.finish_reason or finishes[choice.index]
            pieces += 1
    expected = generate_text(
        model, None, ["the cat", "the cat", "", ""], max_new_tokens=25, seed=3, min_p=0.05, top_k=9,
        repetition_penalty=1.1,
    )  # fmt: skip
    assert texts == expected and finishes == ["length"] * 4
    assert texts[0] != texts[1] and pieces > 8
    assert (used.prompt_tokens, used.completion_tokens) == (7, 100)


def test_stop_strings_end_text_and_stream(client, model):
    free = client.completions.create(model="tiny", prompt="the", max_tokens=60, seed=1).choices[0].text
    stop = free[20:23]
    for stream in (False, True):
        answer = client.completions.create(
            model="tiny", prompt="the", max_tokens=60, seed=1, stop=[stop, "never met"], stream=stream
        )
        choices = [c for a in (answer if stream else [answer]) for c in a.choices]
        assert "".join(c.text for c in choices) == free[: free.index(stop)]
        assert choices[-1].finish_reason == "stop"


def test_token_ids_as_prompt_and_models(client, running, model):
    ids = model.tokenizer.encode("the cat").tolist()
    by_text = client.completions.create(model="tiny", prompt="the cat", seed=2).choices[0].text
    for prompt in (ids, [ids]):
        assert client.completions.create(model="tiny", prompt=prompt, seed=2).choices[0].text == by_text
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    status, _, health = running.ask(None, "GET", "/health")
    assert status == 200 and health["status"] == "ok" and health["running"] == health["waiting"] == 0


def test_load_and_a_queue_that_is_full(model):
    openai = pytest.importorskip("openai", reason="needs the openai package")

    async def crowd(url, n, **options):
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=90) as client:
            calls = [
                client.completions.create(model="tiny", prompt="the", max_tokens=8, seed=i, **options)
                for i in range(n)
            ]
            return await asyncio.gather(*calls, return_exceptions=True)

    with Running(model, max_batch=16, max_queue=48) as running:
        answers = asyncio.run(crowd(running.url, 64))
        for seed, answer in enumerate(answers):
            expected = generate_text(model, None, ["the"], max_new_tokens=8, seed=seed)[0]
            assert "the" + answer.choices[0].text == expected
    with Running(model, max_batch=2, max_queue=3) as running:
        answers = asyncio.run(crowd(running.url, 64))
        busy = [a for a in answers if isinstance(a, openai.RateLimitError)]
        served = [a for a in answers if not isinstance(a, Exception)]
        assert len(busy) + len(served) == 64 and len(served) >= 5
        assert all(a.status_code == 429 and a.code == "queue_full" for a in busy)
        until(lambda: running.engine.running == 0)


# --- without the client


def test_429_says_when_to_come_again(model, gate):
    with Running(model, max_batch=1, max_queue=1) as running:
        _, first, _ = running.stream({"prompt": "the", "max_tokens": 3})
        waiting = threading.Thread(target=running.ask, args=({"prompt": "a", "max_tokens": 3},))
        waiting.start()
        until(lambda: running.engine.waiting == 1)
        status, headers, body = running.ask({"prompt": "a"})
        assert status == 429 and headers["retry-after"] == "1"
        assert body["error"]["type"] == "rate_limit_error" and "2 of 2 places" in body["error"]["message"]
        gate.open.set()
        assert first.read().endswith(b"data: [DONE]\n\n")
        waiting.join(30)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_place(model, gate, stream):
    with Running(model, max_batch=1, max_queue=0) as running:
        body = {"prompt": "the", "max_tokens": 2000}
        if stream:
            connection, answer, first = running.stream(body)
            assert first.startswith(b"data: {")
            answer.close()
        else:
            connection = http.client.HTTPConnection("127.0.0.1", running.port)
            connection.request(
                "POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"}
            )
        until(lambda: running.engine.running == 1)
        connection.close()
        until(lambda: running.engine.running == 0)
        gate.open.set()
        status, _, answer = running.ask({"prompt": "a", "max_tokens": 4})
        assert status == 200 and answer["usage"]["completion_tokens"] == 4
        until(lambda: running.engine.running == 0)


GOOD = {"prompt": "the"}


@pytest.mark.parametrize(
    "body, status, param, why",
    [
        (b"{not json", 400, None, "the body is no JSON"),
        (b"[" * 100_000, 400, None, "the body is no JSON"),
        (b"[1]", 400, None, "the body"),
        (b" " * (4 * 2**20 + 1), 413, None, "longer than"),
        ({}, 400, "prompt", "prompt: Field required"),
        ({"prompt": 5}, 400, "prompt", "prompt: takes a string, a list"),
        ({"prompt": []}, 400, "prompt", "empty list"),
        ({"prompt": "Zebra"}, 400, "prompt", "outside the model's vocabulary: 'Z'"),
        ({"prompt": "the " * 20}, 400, "prompt", "prompt: got 80 tokens, takes at most 50"),
        ({"prompt": [2, 999]}, 400, "prompt", "prompt: got token 999"),
        ({"prompt": [2, -1]}, 400, "prompt", "prompt: takes a string, a list"),
        ({**GOOD, "max_tokens": 0}, 400, "max_tokens", "max_tokens"),
        ({**GOOD, "max_tokens": 2001}, 400, "max_tokens", "takes at most 2000"),
        ({**GOOD, "max_tokens": "5"}, 400, "max_tokens", "got '5'"),
        ({**GOOD, "temperature": -1}, 400, "temperature", "takes a finite number >= 0"),
        ({**GOOD, "temperature": float("nan")}, 400, "temperature", "takes a finite number >= 0"),
        ({**GOOD, "top_p": 0}, 400, "top_p", r"takes a number in \(0, 1\]"),
        ({**GOOD, "top_k": 0}, 400, "top_k", "takes an integer >= 1"),
        ({**GOOD, "min_p": 2}, 400, "min_p", "takes a number in"),
        ({**GOOD, "repetition_penalty": 0}, 400, "repetition_penalty", "takes a finite number > 0"),
        ({**GOOD, "seed": -1}, 400, "seed", "seed: got -1"),
        ({**GOOD, "n": 17}, 400, "n", "takes at most 16 texts"),
        ({**GOOD, "stop": ""}, 400, "stop", "stop: takes at most"),
        ({**GOOD, "stop": ["x"] * 17}, 400, "stop", "stop: takes at most"),
        ({**GOOD, "logprobs": 3}, 400, "logprobs", "not supported"),
        ({**GOOD, "presence_penalty": 0.5}, 400, "presence_penalty", "not supported"),
        ({**GOOD, "max_token": 5}, 400, "max_token", "Extra inputs are not permitted"),
        ({**GOOD, "model": "gpt-4"}, 404, "model", "takes 'tiny'"),
    ],
)  # fmt: skip
def test_bad_requests(running, body, status, param, why):
    import re

    got, _, answer = running.ask(body)
    error = answer["error"]
    assert got == status and error["param"] == param and re.search(why, error["message"]), answer
    assert error["type"] == "invalid_request_error" and len(error["message"]) < 400


def test_other_paths_methods_and_types(running):
    for arguments, status in (
        (({}, "POST", "/v1/nothing"), 404),
        ((None, "GET", "/v1/completions"), 405),
        ((GOOD, "POST", "/v1/completions", "text/plain"), 415),
        ((None, "GET", "/v1/models/gpt-4"), 404),
    ):
        got, _, answer = running.ask(*arguments)
        assert got == status and answer["error"]["message"]
    status, _, schema = running.ask(None, "GET", "/openapi.json")
    assert status == 200 and "/v1/completions" in schema["paths"]


def test_values_that_ask_for_nothing_are_taken(running):
    body = {
        **GOOD,
        "best_of": 1,
        "presence_penalty": 0,
        "logit_bias": {},
        "user": "me",
        "stop": None,
        "n": None,
    }
    assert running.ask(body)[0] == 200


def test_a_stop_lets_texts_finish(model, gate):
    with Running(model, grace=30) as running:
        _, answer, _ = running.stream({"prompt": "the", "max_tokens": 40})
        running.stop()
        until(lambda: not running.engine.alive)
        gate.open.set()
        assert answer.read().endswith(b"data: [DONE]\n\n")


def test_a_stop_ends_texts_that_take_too_long(model, gate):
    with Running(model, grace=0.1) as running:
        _, answer, _ = running.stream({"prompt": "the", "max_tokens": 2000})
        running.stop()
        until(lambda: not running.engine.alive)
        time.sleep(0.2)
        gate.open.set()
        last = answer.read().decode().strip().splitlines()[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["message"] == "the server has stopped"


# --- the command


def test_the_command_serves_and_stops_at_sigterm(model, tmp_path):
    model.save_pretrained(tmp_path / "tiny" / "best")
    command = [sys.executable, "-c", "from spikedecoder.cli import main; main()", "serve"]
    process = subprocess.Popen(
        [*command, "--checkpoint", tmp_path / "tiny", "--port", "0", "--max-tokens-limit", "100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("serving tiny at http://127.0.0.1:"), process.communicate()
        port = int(line.rsplit(":", 1)[1].split("/")[0])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        body = {"prompt": "the", "max_tokens": 200, "seed": 1, "stream": True}
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        answer.readline()
        process.send_signal(signal.SIGTERM)
        assert answer.read().endswith(b"data: [DONE]\n\n")  # what was running has been finished
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 0 and errors == ""
    finally:
        process.kill()
        process.communicate()


def test_a_port_that_is_taken(running):
    from spikedecoder.serve.server import listen

    with pytest.raises(OSError, match=rf"cannot listen at 127\.0\.0\.1:{running.port}"):
        listen("127.0.0.1", running.port)
    with pytest.raises(OSError, match=r"cannot listen at no\.such\.host\.invalid:80"):
        listen("no.such.host.invalid", 80)
    with pytest.raises(ValueError, match="--port: got 70000"):
        listen("127.0.0.1", 70000)


def test_command_without_the_extra(model, tmp_path, monkeypatch):
    from spikedecoder.cli.serve import serve

    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="--errors: got 'x', takes one of"):
        serve(checkpoint=str(tmp_path), errors="x")
    monkeypatch.setitem(sys.modules, "spikedecoder.serve.server", None)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    for name in ("spikedecoder.serve.server", "spikedecoder.serve.app"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ValueError, match=r"serve needs uvicorn, .*pip install 'spikedecoder\[serve\]'"):
        serve(checkpoint=str(tmp_path))
