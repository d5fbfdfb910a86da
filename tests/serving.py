"""What the tests of the server share: a model, a gate that holds it back, a server on a thread."""

import http.client
import json
import threading
import time

import pytest
import torch

from spikedecoder import SpikeDecoder, SpikeDecoderConfig
from spikedecoder.data import CharTokenizer
from spikedecoder.serve import Engine

TEXT = "the cat sat on the mat. it was a fat cat."


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
