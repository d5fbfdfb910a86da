"""Continuous batching: the engine alone."""

# ruff: noqa: F811 (fixtures)

import threading

import pytest
from serving import gate, model, until  # noqa: F401

from spikedecoder.generation import Continuation, SamplingParams, generate
from spikedecoder.serve import Engine, EngineError, QueueFull, Stopping

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_ten_thousand_at_once(model, gate):
    """The queue's bound holds, and those that were let in are served."""
    engine, heard, refused = Engine(model, max_batch=2, max_queue=3).start(), Heard(5), 0
    for i in range(10_000):
        try:
            engine.submit([continuation(engine, [1], 2, i)], heard)
        except QueueFull:
            refused += 1
    assert refused == 9_995 and engine.running + engine.waiting == 5
    gate.open.set()
    assert heard.done.wait(60) and engine.running == engine.waiting == 0
    engine.close()
    engine.join(10)


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
