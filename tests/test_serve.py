"""The HTTP server: OpenAI's client against it, load, disconnects, bad input, stopping."""

# ruff: noqa: F811 (fixtures)

import asyncio
import http.client
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
from serving import Running, client, gate, model, running, until  # noqa: F401

from spikedecoder.generation import generate_text

pytestmark = pytest.mark.usefixtures("one_thread")

pytest.importorskip("fastapi", reason="needs the extra spikedecoder[serve]")
pytest.importorskip("uvicorn", reason="needs the extra spikedecoder[serve]")


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
        assert "usage" in chunk.model_fields_set  # null, before the last
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


def test_logprobs_are_the_models(client, model):
    arguments = {"model": "tiny", "prompt": ["the", "a c"], "max_tokens": 9, "seed": 4, "logprobs": 2}
    whole = client.completions.create(**arguments, temperature=0.7)
    streamed = [{"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []} for _ in range(2)]
    for chunk in client.completions.create(**arguments, temperature=0.7, stream=True):
        for choice in chunk.choices:
            for name, values in streamed[choice.index].items():
                values += getattr(choice.logprobs, name)
    for prompt, choice, parts in zip(arguments["prompt"], whole.choices, streamed, strict=True):
        told = choice.logprobs
        assert "".join(told.tokens) == choice.text and len(told.tokens) == 9
        assert told.text_offset == [len("".join(told.tokens[:i])) for i in range(9)]
        ids = [int(i) for i in model.tokenizer.encode(prompt + choice.text)]
        with torch.no_grad():
            expected = model(torch.tensor([ids[:16]]))[0].log_softmax(-1)
        suppressed = [model.tokenizer.pad_id, model.tokenizer.unk_id]
        expected[
            :, [i for i in suppressed if i is not None]
        ] = -torch.inf  # never written, but part of the sum
        for i in range(9):
            row = expected[len(prompt) - 1 + i]
            assert abs(row[ids[len(prompt) + i]].item() - told.token_logprobs[i]) < 1e-9
            best = {model.tokenizer.decode([int(k)]): row[k].item() for k in row.topk(2).indices}
            assert told.top_logprobs[i] == pytest.approx({**best, told.tokens[i]: told.token_logprobs[i]})
        assert {name: getattr(told, name) for name in parts} == parts
    without = client.completions.create(**{**arguments, "logprobs": 0}, temperature=0.7).choices[0].logprobs
    assert without.token_logprobs == whole.choices[0].logprobs.token_logprobs
    assert without.top_logprobs == [{}] * 9


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
        ({"prompt": "Zebra"}, 400, "prompt", "'Z', 'b', 'r'; a server that was started with --errors"),
        ({"prompt": "the " * 20}, 400, "prompt", "prompt: got 80 tokens, takes at most 50"),
        ({"prompt": [2, 999]}, 400, "prompt", "prompt: got token 999"),
        ({"prompt": [2, -1]}, 400, "prompt", "prompt: takes a string, a list"),
        ({"prompt": [2, True]}, 400, "prompt", "prompt: takes a string, a list"),
        ({"prompt": ["a", [2]]}, 400, "prompt", "prompt: takes a string, a list"),
        ({"prompt": [[2], ["a"]]}, 400, "prompt", "prompt: takes a string, a list"),
        ({**GOOD, "max_tokens": 0}, 400, "max_tokens", "max_tokens"),
        ({**GOOD, "max_tokens": 2001}, 400, "max_tokens", "takes at most 2000"),
        ({**GOOD, "max_tokens": "5"}, 400, "max_tokens", "got '5'"),
        ({**GOOD, "temperature": -1}, 400, "temperature", "takes a finite number >= 0"),
        ({**GOOD, "temperature": float("nan")}, 400, "temperature", "takes a finite number >= 0"),
        ({**GOOD, "top_p": 0}, 400, "top_p", r"takes a number in \(0, 1\]"),
        ({**GOOD, "top_k": 0}, 400, "top_k", "takes an integer >= 1"),
        ({**GOOD, "min_p": 2}, 400, "min_p", "takes a number in"),
        ({**GOOD, "repetition_penalty": 0}, 400, "repetition_penalty", "takes a number from 1e-06 to"),
        ({**GOOD, "seed": -1}, 400, "seed", "seed: got -1"),
        ({**GOOD, "n": 17}, 400, "n", "takes at most 16 texts"),
        ({**GOOD, "stop": ""}, 400, "stop", "stop: takes at most"),
        ({**GOOD, "stop": ["x"] * 17}, 400, "stop", "stop: got 17 entries, takes at most 16"),
        ({**GOOD, "stop": [5]}, 400, "stop", "stop: "),
        ({**GOOD, "stop": "x" * 257}, 400, "stop", "stop: takes at most"),
        ({**GOOD, "logit_bias": {"1": 1.0}}, 400, "logit_bias", "not supported"),
        ({**GOOD, "logprobs": 6}, 400, "logprobs", "less than or equal to 5"),
        ({**GOOD, "logprobs": 1, "echo": True}, 400, "logprobs", "not supported together with echo"),
        ({**GOOD, "presence_penalty": 0.5}, 400, "presence_penalty", "not supported"),
        ({**GOOD, "max_token": 5}, 400, "max_token", "no such field"),
        ({**GOOD, "\ud800": 5}, 400, "?", "no such field"),
        ({**GOOD, "model": "gpt-4"}, 404, "model", "takes 'tiny'"),
    ],
)  # fmt: skip
def test_bad_requests(running, body, status, param, why):
    import re

    got, _, answer = running.ask(body)
    error = answer["error"]
    assert got == status and error["param"] == param and re.search(why, error["message"]), answer
    assert error["type"] == "invalid_request_error" and len(error["message"]) < 400


def test_texts_that_are_too_many_are_not_read(running, monkeypatch):
    from spikedecoder.serve import app

    monkeypatch.setattr(app, "encode_prompt", lambda *_: pytest.fail("read"))
    for body in ({"prompt": ["the"] * 17}, {"prompt": [[2]] * 17}, {"prompt": [[2]] * 9, "n": 2}):
        status, _, answer = running.ask(body)
        assert status == 400 and "takes at most 16 texts" in answer["error"]["message"]


@pytest.mark.parametrize("name, wrong", [("prompt", [1] * 100_000 + ["a"]), ("stop", [1] * 100_000)])
def test_of_many_wrong_entries_the_first_ends_it(running, name, wrong, monkeypatch):
    """An error object for each would take gigabytes, and hold everybody's streams up."""
    from spikedecoder.serve.protocol import CompletionRequest

    monkeypatch.setattr(CompletionRequest, "model_validate", lambda *_: pytest.fail("tried"))
    for body in ({**GOOD, name: wrong}, {**GOOD, **{f"{name}{i}": i for i in range(100_000)}}):
        status, _, answer = running.ask(body)
        assert status == 400 and len(answer["error"]["message"]) < 400


def test_bodies_on_their_way_are_bounded(running, monkeypatch):
    from spikedecoder.serve import app

    monkeypatch.setattr(app, "UPLOAD", 0.3)
    monkeypatch.setattr(app, "BODIES", 1000)
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", running.port), timeout=30) as slow:
        slow.sendall(f"{head}content-length: 2000\r\n\r\n{' ' * 900}".encode())
        time.sleep(0.1)
        status, headers, answer = running.ask({**GOOD, "max_tokens": 1, "user": "x" * 200})
        assert status == 429 and headers["retry-after"] == "1" and "bodies" in answer["error"]["message"]
        assert b" 408 " in slow.recv(1000)
    status, _, _ = running.ask({**GOOD, "max_tokens": 1, "user": "x" * 200})
    assert status == 200


def test_a_head_that_does_not_end_is_given_up(model, monkeypatch, gate):
    from spikedecoder.serve import server

    monkeypatch.setattr(server, "UPLOAD", 0.5)
    whole = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
    with Running(model) as running:
        for begun in (b"", whole[:-2], whole + whole[:-2]):
            with socket.create_connection(("127.0.0.1", running.port), timeout=30) as slow:
                slow.sendall(begun)
                got = b"".join(iter(lambda: slow.recv(1000), b""))
                assert got.count(b"200 OK") == begun.count(b"\r\n\r\n")
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)
        _, answer, _ = running.stream({"prompt": "the", "max_tokens": 2})
        for _ in range(8):  # requests that are whole are not in haste
            connection.request("GET", "/health")
            assert connection.getresponse().read()
            time.sleep(0.1)
        connection.close()
        gate.open.set()
        assert answer.read().endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    "address, more, good, bad",
    [
        ("127.0.0.1", (), "127.0.0.1:8000 localhost LOCALHOST:80 [::1]:8000", "evil.example:8000 127.0.0.2"),
        ("127.0.0.2", ("llm.example",), "127.0.0.2 localhost llm.example:443", "evil.example"),
        ("0.0.0.0", (), "evil.example 10.0.0.1:8000", ""),
        ("0.0.0.0", ("llm.example",), "llm.example localhost", "evil.example 10.0.0.1:8000"),
    ],
)
def test_hosts_that_requests_may_name(running, address, more, good, bad):
    """A page whose name is made to lead to this machine is not to use its server."""
    from spikedecoder.serve.app import create_app
    from spikedecoder.serve.server import known_hosts, listen

    testclient = pytest.importorskip("starlette.testclient")
    with listen(address, 0) as where:
        hosts = known_hosts(where, address, more)
    client = testclient.TestClient(create_app(running.engine, "tiny", None, hosts))
    for names, status in ((good, 200), (bad, 400)):
        for name in names.split():
            assert client.get("/health", headers={"host": name}).status_code == status, name


def test_a_client_that_goes_while_it_asks_is_no_fault(running, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("uvicorn.error"), "handlers", [caplog.handler])
    with socket.create_connection(("127.0.0.1", running.port)) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        connection.sendall(f'{head}content-length: 100\r\n\r\n{{"prompt"'.encode())
        time.sleep(0.2)  # it is being read
    time.sleep(0.2)
    status, _, _ = running.ask({**GOOD, "max_tokens": 1})
    assert status == 200 and not caplog.records


def test_other_paths_methods_and_types(running):
    for arguments, status in (
        (({}, "POST", "/v1/nothing"), 404),
        ((None, "GET", "/v1/completions"), 405),
        ((GOOD, "POST", "/v1/completions", "text/plain"), 415),
        ((None, "GET", "/v1/models/gpt-4"), 404),
    ):
        got, headers, answer = running.ask(*arguments)
        assert got == status and answer["error"]["message"]
        assert (headers.get("allow") == "POST") == (status == 405)
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)
    connection.request("HEAD", "/health")
    assert connection.getresponse().status == 200
    connection.close()
    _, _, answer = running.ask(GOOD, "POST", "/v1/chat/completions")  # what OpenAI's clients ask for most
    assert "takes POST /v1/completions" in answer["error"]["message"]
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


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGINT, signal.SIGINT]])
def test_the_command_serves_and_stops_at_a_signal(model, tmp_path, signals):
    model.save_pretrained(tmp_path / "tiny" / "checkpoints" / "step-00000004")
    (tmp_path / "tiny" / "best").symlink_to("checkpoints/step-00000004")  # as in a training run
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
        length = 200 if len(signals) == 1 else 100000
        body = {"prompt": "the", "max_tokens": length, "seed": 1, "stream": True}
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        answer.readline()
        for number in signals:
            process.send_signal(number)
            time.sleep(0.5)
        text = answer.read()
        if len(signals) == 1:
            assert text.endswith(b"data: [DONE]\n\n")  # what was running has been finished
        else:
            assert b"the server has stopped" in text  # it was not, and its client is told
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
