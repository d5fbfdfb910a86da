"""Training: runs that go on as if never stopped, and what they report."""

# ruff: noqa: F811 (fixtures)

import dataclasses
import functools
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from training import STORY, Messages, StopAt, corpus, files, settings, tiny  # noqa: F401

from spikedecoder import CheckpointError, SpikeDecoder, SpikeDecoderConfig
from spikedecoder.data import CharTokenizer, Corpus, held_out_batches, prepare_corpus
from spikedecoder.training import (
    Evaluation,
    Reporter,
    SavingError,
    TrainingError,
    TrainResult,
    evaluate,
    loop,
    train,
)
from spikedecoder.training.checkpoints import latest
from spikedecoder.training.report import MetricsFile
from spikedecoder.training.run_folder import locked, made
from spikedecoder.viz import record


@pytest.fixture(scope="module")
def whole_run(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """12 steps with dropout and accumulation, never stopped."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return train(dropping(corpus), corpus, settings(grad_accum=2), out=out)


def dropping(corpus: Corpus) -> SpikeDecoderConfig:
    return tiny(corpus, attention_dropout=0.2, mlp_dropout=0.2, learn_threshold=True, norm="batch")


@pytest.mark.parametrize(("step", "number"), [(1, signal.SIGINT), (5, signal.SIGTERM), (11, signal.SIGINT)])
def test_a_stopped_run_goes_on_bit_for_bit(
    corpus: Corpus, tmp_path: Path, whole_run: TrainResult, step: int, number: int
) -> None:
    out = tmp_path / "run"
    before = signal.getsignal(signal.SIGINT)
    stopped = train(dropping(corpus), corpus, settings(grad_accum=2), out=out, reporter=StopAt(step, number))
    assert (stopped.interrupted, stopped.step) == (signal.Signals(number).name, step)
    assert signal.getsignal(signal.SIGINT) is before
    torch.rand(100)  # whatever the process does with the generator in between
    resumed = train(dropping(corpus), corpus, settings(grad_accum=2), out=out, resume=True)
    assert resumed.interrupted is None and resumed.step == 12
    assert files(out / "last") == files(whole_run.out / "last")
    assert files(out / "best") == files(whole_run.out / "best")
    assert resumed.train_loss == whole_run.train_loss
    assert resumed.evaluation == whole_run.evaluation


def test_a_run_leaves_the_callers_generator_and_threads_alone(corpus: Corpus, tmp_path: Path) -> None:
    torch.manual_seed(5)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    train(tiny(corpus), corpus, settings(steps=1), out=tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads


@pytest.mark.parametrize(
    "mode",
    [torch.no_grad, torch.inference_mode, functools.partial(torch.autocast, "cpu", torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_what_the_caller_has_switched_on_changes_no_run(
    corpus: Corpus, tmp_path: Path, mode: Callable[[], AbstractContextManager[object]]
) -> None:
    for precision in ("no", "bf16"):
        c = settings(steps=4, mixed_precision=precision)
        alone = train(tiny(corpus), corpus, c, out=tmp_path / f"{precision}-alone")
        with mode():
            inside = train(tiny(corpus), corpus, c, out=tmp_path / f"{precision}-inside")
        assert files(inside.out / "last") == files(alone.out / "last")
        assert inside.evaluation == alone.evaluation


def test_a_seed_makes_a_run_repeatable(corpus: Corpus, tmp_path: Path) -> None:
    runs = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(dropping(corpus), corpus, settings(steps=3, seed=seed), out=tmp_path / name)
        runs[name] = (tmp_path / name / "last" / "model.safetensors").read_bytes()
    assert runs["a"] == runs["b"] != runs["c"]


def test_runs_of_several_threads_are_those_of_one(corpus: Corpus, tmp_path: Path) -> None:
    def run(name: str, seed: int, reporter: Reporter | None = None) -> dict[str, bytes]:
        c = settings(steps=4, seed=seed, grad_accum=2)
        return files(train(dropping(corpus), corpus, c, out=tmp_path / name, reporter=reporter).checkpoint)

    class Meanwhile(Reporter):
        """Lets another thread begin a run, and begins one itself."""

        def evaluated(self, step: int, evaluation: Evaluation) -> None:
            found["inside"] = run("inside", 2)

        def start(self, step: int, steps: int, baselines: dict[str, float]) -> None:
            other.start()
            assert waiting.said.wait(60)

    class Waiting(Reporter):
        said = threading.Event()

        def message(self, text: str) -> None:
            if "waits for the run of another thread" in text:
                self.said.set()

    found: dict[str, dict[str, bytes]] = {}
    waiting = Waiting()
    other = threading.Thread(target=lambda: found.update(other=run("other", 1, waiting)))
    found["one"] = run("one", 0, Meanwhile())
    other.join()
    for seed, name in enumerate(("one", "other", "inside")):
        assert found[name] == run(f"{name}-alone", seed), name


def test_the_reported_figures_are_the_checkpoints(corpus: Corpus, whole_run: TrainResult) -> None:
    for name, loss in (("last", whole_run.evaluation.loss), ("best", whole_run.best["val_loss"])):  # type: ignore[union-attr]
        model = SpikeDecoder.from_pretrained(whole_run.out / name)
        got = evaluate(model, corpus.val, batch_size=2)
        assert got is not None and got.loss == pytest.approx(loss, rel=1e-6)
        assert model.tokenizer == corpus.tokenizer
    values = json.loads(json.dumps(whole_run.to_dict()))
    assert values["steps"] == 12 and values["checkpoint"] == str(whole_run.out / "last")
    assert values["tokens_per_second"] > 0 and values["peak_rss_mib"] > 50
    assert set(values["baselines"]) == {"unigram", "bigram", "trigram"}


def test_accumulation_equals_one_larger_batch(corpus: Corpus, tmp_path: Path) -> None:
    """Its micro-batches are those of steps 2n and 2n + 1, so compare with a step made by hand."""
    from spikedecoder.data import WindowSampler

    c = settings(steps=1, grad_accum=2, clip=0.0, seed=3)
    config = tiny(corpus)
    train(config, corpus, c, out=tmp_path / "run")
    torch.manual_seed(3)
    model = SpikeDecoder(config)
    sampler = WindowSampler(corpus.train, 16, 2, 3)
    optimizer = torch.optim.AdamW(model.parameter_groups(0.1), lr=c.lr_at(0), betas=(0.9, 0.95))
    inputs, targets = (torch.cat(pair) for pair in zip(sampler.batch(0), sampler.batch(1), strict=True))
    model.loss(inputs, targets).backward()
    optimizer.step()
    trained = SpikeDecoder.from_pretrained(tmp_path / "run" / "last")
    for ours, theirs in zip(trained.parameters(), model.parameters(), strict=True):
        # Adam's first step is lr * sign(gradient) where the gradient is not tiny
        assert torch.isclose(ours, theirs, atol=1e-5).float().mean() > 0.99


def test_it_learns(corpus: Corpus, tmp_path: Path) -> None:
    c = settings(steps=150, batch_size=8, eval_every=0, save_every=0)
    result = train(tiny(corpus, token_dim=28, heads=4), corpus, c, out=tmp_path / "run")
    assert result.evaluation is not None
    assert result.evaluation.bits < result.baselines["bigram"] < result.baselines["unigram"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert list(losses) == list(range(3, 151, 3))
    assert losses[3] > 1.5 * losses[150]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_and_goes_on(
    corpus: Corpus, tmp_path: Path, precision: str, device: str
) -> None:
    c = settings(mixed_precision=precision, lr=1e-2, device=device)
    if (precision, device) == ("fp16", "cpu"):
        with pytest.raises(ValueError, match="mixed_precision: got 'fp16' on the CPU"):
            train(tiny(corpus), corpus, c, out=tmp_path / "no")
        return
    whole = train(tiny(corpus), corpus, c, out=tmp_path / "whole")
    train(tiny(corpus), corpus, c, out=tmp_path / "run", reporter=StopAt(7))
    train(tiny(corpus), corpus, c, out=tmp_path / "run", resume=True)
    assert files(tmp_path / "run" / "last") == files(tmp_path / "whole" / "last")
    assert {p.dtype for p in whole.model.parameters()} == {torch.float32}
    exact = train(tiny(corpus), corpus, c.replace(mixed_precision="no"), out=tmp_path / "exact")
    assert whole.train_loss != exact.train_loss
    assert whole.train_loss == pytest.approx(exact.train_loss, rel=0.05)


def test_a_loss_that_is_no_number_stops_the_run(corpus: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(tiny(corpus), corpus, settings(), out=out, reporter=StopAt(4))
    weights = (out / "last" / "model.safetensors").read_bytes()

    class Poison(Reporter):
        def __init__(self) -> None:
            self.restore = torch.nn.Embedding.forward

        def start(self, step: int, steps: int, baselines: dict[str, float]) -> None:
            torch.nn.Embedding.forward = lambda m, x: self.restore(m, x) * math.nan  # type: ignore[method-assign]

        def close(self) -> None:
            torch.nn.Embedding.forward = self.restore  # type: ignore[method-assign]

    fresh = re.escape(f": --init {out} --text ... --out NEW --lr ... begins a new run with its weights")
    with pytest.raises(TrainingError, match=rf"became nan in step 5.*last holds step 4.*--lr.*{fresh}$"):
        train(tiny(corpus), corpus, settings(), out=out, resume=True, reporter=Poison())
    assert (out / "last" / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(("clip", "advice"), [(1.0, "a smaller clip (now 1)"), (0.0, "clip=1 (now off)")])
def test_too_high_a_learning_rate_is_caught(corpus: Corpus, tmp_path: Path, clip: float, advice: str) -> None:
    out = tmp_path / "run"
    c = settings(lr=1e38, clip=clip, steps=9, save_every=0, eval_every=0)
    ending = re.escape(f"{advice}, in another folder (--out) or after deleting {out}")
    with pytest.raises(TrainingError, match=rf"no checkpoint was written yet.*{ending}$"):
        train(tiny(corpus), corpus, c, out=out)
    assert latest(out) is None


def test_weights_that_are_none_stop_a_watched_run(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")

    def poisoned(model: SpikeDecoder, *args: Any, **kwargs: Any) -> Evaluation | None:
        # a neuron that gets NaN never fires, so that the loss stays a number
        model.get_parameter(weight).data[0] = math.nan
        return evaluate(model, *args, **kwargs)

    weight, out = "blocks.0.mlp.fc1.norm.bias", tmp_path / "run"
    train(tiny(corpus), corpus, settings(), out=out, reporter=StopAt(4))
    before = files(out / "last")
    monkeypatch.setattr(loop, "evaluate", poisoned)
    message = rf"^weights \({weight}\) became infinite or NaN in step 5, .*last holds step 4"
    with pytest.raises(TrainingError, match=message):
        train(tiny(corpus), corpus, settings(tensorboard=True), out=out, resume=True)
    assert files(out / "last") == before


@pytest.mark.parametrize("existed", [False, True])
def test_a_run_that_fails_before_it_has_anything_to_show_leaves_nothing(
    corpus: Corpus, tmp_path: Path, existed: bool
) -> None:
    out, c = tmp_path / "run", settings(eval_every=0, save_every=0, tensorboard=True)
    if existed:
        out.mkdir()
    pytest.importorskip("tensorboard")

    class FailAt(Reporter):
        def __init__(self, step: int) -> None:
            self.at = step

        def tick(self, step: int, loss: float | None, tokens_per_second: float) -> None:
            assert (out / "run.json").is_file() and (out / "tensorboard").is_dir()
            if step == self.at:
                raise MemoryError("no memory")

    with pytest.raises(MemoryError):
        train(tiny(corpus), corpus, c, out=out, reporter=FailAt(2))
    assert out.exists() == existed and (not existed or not any(out.iterdir()))
    with pytest.raises(MemoryError):  # from the first line of metrics on there is something to read
        train(tiny(corpus), corpus, c, out=out, reporter=FailAt(4))
    assert (out / "metrics.jsonl").read_text().startswith('{"step": 3,')
    with pytest.raises(MemoryError):  # what was there is never deleted
        train(tiny(corpus), corpus, c, out=out, resume=True, reporter=FailAt(1))
    assert (out / "run.json").is_file()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="knows the free memory on Linux only")
def test_a_step_larger_than_the_memory_is_refused_before_the_system_ends_it(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    from spikedecoder.training import memory

    free = memory.available()
    assert free is not None and free > 2**28
    before = resource.getrlimit(resource.RLIMIT_DATA)
    monkeypatch.setattr(memory, "available", lambda: 2**28)
    # 256 MiB, and what earlier tests have left in the heap, which 200 000 windows exceed
    with pytest.raises(MemoryError, match=r"^not enough memory on cpu .* 200000 x 16 .*--batch-size.*--max"):
        train(tiny(corpus), corpus, settings(batch_size=200_000, device="cpu"), out=tmp_path / "run")
    assert resource.getrlimit(resource.RLIMIT_DATA) == before and not (tmp_path / "run").exists()
    train(tiny(corpus), corpus, settings(steps=1), out=tmp_path / "run")


def test_what_lack_of_memory_is(tmp_path: Path) -> None:
    from spikedecoder.training import memory

    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")):
        assert memory.is_lack_of_memory(error)
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60, dtype=torch.uint8)
    assert memory.is_lack_of_memory(refused.value)
    assert not memory.is_lack_of_memory(RuntimeError("sizes do not match"))
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 200\n")
    names = ("memory.max", "memory.current", "inactive_file")
    assert memory._left(tmp_path, *names) == 500
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._left(tmp_path, *names) == math.inf


@pytest.mark.skipif(os.name == "nt", reason="no limit on file sizes on Windows")
def test_a_full_disk_leaves_the_last_good_checkpoint(
    corpus: Corpus, tmp_path: Path, whole_run: TrainResult
) -> None:
    import resource

    out, c = tmp_path / "run", settings(grad_accum=2)
    train(dropping(corpus), corpus, c, out=out, reporter=StopAt(4))
    before = files(out / "last")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["model.safetensors"]) - 100, hard))
    try:
        with pytest.raises(
            SavingError, match=r"cannot save the checkpoint of step 5 .*last holds step 4.*--resume"
        ):
            train(dropping(corpus), corpus, c, out=out, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(out / "last") == before
    assert not list((out / "checkpoints").glob(".*"))  # what was written of it makes room again
    train(dropping(corpus), corpus, c, out=out, resume=True)
    assert files(out / "last") == files(whole_run.out / "last")


def test_an_output_folder_is_never_overwritten(
    corpus: Corpus, tmp_path: Path, whole_run: TrainResult
) -> None:
    before = files(whole_run.out / "last")
    with pytest.raises(FileExistsError, match=r"holds a run already.*--resume"):
        train(dropping(corpus), corpus, settings(), out=whole_run.out)
    assert files(whole_run.out / "last") == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        train(tiny(corpus), corpus, settings(), out=tmp_path)
    with pytest.raises(FileExistsError, match="is a file"):
        train(tiny(corpus), corpus, settings(), out=tmp_path / "notes.txt")
    assert os.listdir(tmp_path) == ["notes.txt"]


@pytest.mark.skipif(os.name == "nt", reason="no locks on Windows")
def test_two_processes_cannot_train_into_one_folder(corpus: Corpus, tmp_path: Path) -> None:
    train(tiny(corpus), corpus, settings(steps=1), out=tmp_path / "run")
    with locked(tmp_path / "run"), pytest.raises(FileExistsError, match="another process"):
        train(tiny(corpus), corpus, settings(steps=1), out=tmp_path / "run", resume=True)


@pytest.mark.skipif(os.name == "nt", reason="no locks on Windows")
def test_a_refused_run_leaves_the_folder_of_the_one_that_has_it(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with made(out):
        (out / "run.json").write_text("{}")
        with pytest.raises(FileExistsError, match="another process"), made(out):
            pass
        with pytest.raises(FileExistsError, match="another process"), locked(out):
            pass
    assert (out / "run.json").is_file()
    with pytest.raises(FileExistsError, match="holds a run already"), made(out):
        pass
    assert (out / "run.json").is_file()


def test_resuming_something_else_is_an_error(corpus: Corpus, tmp_path: Path, whole_run: TrainResult) -> None:
    out, same = whole_run.out, settings(grad_accum=2)
    for config, changed, message in (
        (dropping(corpus).replace(blocks=2), same, "blocks: got 2"),
        (dropping(corpus), same.replace(lr=0.1), "lr: got 0.1"),
        (dropping(corpus), same.replace(steps=5), r"steps: got 5, but .* has done 12"),
    ):
        with pytest.raises(ValueError, match=message):
            train(config, corpus, changed, out=out, resume=True)
    for story in (STORY.replace("cat", "tac"), STORY + "§"):  # with as many different characters, with more
        (tmp_path / "other.txt").write_text(story)
        other = prepare_corpus([tmp_path / "other.txt"], cache_dir=tmp_path)
        with pytest.raises(ValueError, match="text: not the one"):
            train(dropping(corpus), other, same, out=out, resume=True)
    with pytest.raises(CheckpointError, match="no such folder"):
        train(dropping(corpus), corpus, same, out=tmp_path / "absent", resume=True)
    with pytest.raises(CheckpointError, match="holds no run"):
        train(dropping(corpus), corpus, same, out=tmp_path, resume=True)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "trainer.json"])
def test_a_damaged_checkpoint_is_named(
    corpus: Corpus, tmp_path: Path, whole_run: TrainResult, file: str
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole_run.out, out, symlinks=True)
    path = (out / "last").resolve() / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=rf"{file}: not a .*truncated"):
        train(dropping(corpus), corpus, settings(grad_accum=2), out=out, resume=True)


def test_the_vocabulary_must_be_the_texts(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="corpus: got str, takes a Corpus"):
        train(tiny(corpus), "story.txt", settings(), out=tmp_path / "run")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="vocab_size: got 99, takes that of the text's tokenizer"):
        train(tiny(corpus, vocab_size=99), corpus, settings(), out=tmp_path / "run")
    with pytest.raises(ValueError, match="shorter than the context"):
        train(tiny(corpus, max_len=4000), corpus, settings(), out=tmp_path / "run")


def test_a_tokenizer_that_no_checkpoint_brings_back_is_refused_before_the_run(
    corpus: Corpus, tmp_path: Path
) -> None:
    class Lower(CharTokenizer):
        """Its files would be read as a CharTokenizer's."""

    own = dataclasses.replace(corpus, tokenizer=Lower(corpus.tokenizer.tokens))
    with pytest.raises(TypeError, match=r"corpus\.tokenizer: got Lower, takes a CharTokenizer or a Word"):
        train(tiny(corpus), own, settings(), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_configurations_of_another_type_are_named(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="config: got dict, takes a SpikeDecoderConfig"):
        train({}, corpus, out=tmp_path / "run")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="train_config: got dict, takes a TrainConfig"):
        train(tiny(corpus), corpus, {"steps": 3}, out=tmp_path / "run")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="reporter: got function, takes a Reporter or None"):
        train(tiny(corpus), corpus, out=tmp_path / "run", reporter=lambda step: None)  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_metrics_of_lost_steps_are_dropped(corpus: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(tiny(corpus), corpus, settings(), out=out, reporter=StopAt(6))
    with open(out / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 9, "loss": 1.0}\n\0\xff\n{"step": 6, "lo')
    train(tiny(corpus), corpus, settings(), out=out, resume=True)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [3, 6, 9, 12]
    assert [line["step"] for line in lines if "val_loss" in line] == [5, 10, 12]


def test_metrics_are_json_whatever_the_numbers(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path)
    metrics.start(0, 1, {})
    metrics.step(1, {"loss": math.nan, "lr": 0.1, "grad_norm": math.inf})
    metrics.evaluated(1, Evaluation(-math.inf, math.nan, 0.5, 9, 9, {"a": math.nan, "b": 0.25}))

    def refuse(name: str) -> None:
        pytest.fail(f"{name} is not JSON")

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    step, evaluated = (json.loads(line, parse_constant=refuse) for line in lines)
    assert step == {"step": 1, "loss": None, "lr": 0.1, "grad_norm": None}
    assert (evaluated["val_loss"], evaluated["val_bits_per_token"], evaluated["val_accuracy"]) == (
        None,
        None,
        0.5,
    )
    assert evaluated["spike_rates"] == {"a": None, "b": 0.25}


def test_a_dead_layer_is_reported_during_the_run(corpus: Corpus, tmp_path: Path) -> None:
    messages, silent = Messages(), tiny(corpus, embedding_gain=1.0)
    result = train(silent, corpus, settings(steps=2), out=tmp_path / "run", reporter=messages)
    assert any("dead" in text for text in messages.texts) and result.warnings


def test_tensorboard(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tiny(corpus), corpus, settings(steps=6, tensorboard=True), out=tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [3, 6]
    assert [e.step for e in events.Scalars("held_out/bits")] == [5, 6]
    layer, tags = "blocks.0.mlp.fc1", events.Tags()
    assert {f"{name}/{layer}" for name in ("dead", "saturated", "spike_rate_at_timestep_2")} <= set(
        tags["scalars"]
    )
    assert not any("timestep_3" in tag for tag in tags["scalars"])
    # what it says is what the last model does on the same text
    model = SpikeDecoder.from_pretrained(tmp_path / "run" / "last")
    tokens, _ = next(held_out_batches(corpus.val, 16, 2))
    activity = record(model, tokens, potentials=True)
    for tag, value in (
        (f"dead/{layer}", activity.dead()[layer]),
        (f"saturated/{layer}", activity.saturated()[layer]),
        (f"spike_rate_at_timestep_2/{layer}", float(activity.rates()[layer][1])),
    ):
        assert [e.step for e in events.Scalars(tag)] == [5, 6]
        assert events.Scalars(tag)[-1].value == pytest.approx(value), tag
    potentials = activity.potentials[layer]
    histogram = events.Histograms(f"membrane_potential/{layer}")[-1].histogram_value
    assert histogram.num == potentials.numel() and histogram.max == pytest.approx(float(potentials.max()))
    train(tiny(corpus, spike_degree=0), corpus, settings(steps=1, tensorboard=True), out=tmp_path / "ann")
    train(tiny(corpus), corpus, settings(steps=6), out=tmp_path / "plain")
    watched, plain = ((tmp_path / name / "last" / "model.safetensors") for name in ("run", "plain"))
    assert watched.read_bytes() == plain.read_bytes()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"tensorboard: not installed.*pip install"):
        train(tiny(corpus), corpus, settings(steps=1, tensorboard=True), out=tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_a_compiled_step_trains(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # traced and differentiated ahead of time as always, but run without building C++, which takes minutes
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    plain = train(tiny(corpus), corpus, settings(steps=3), out=tmp_path / "plain")
    compiled = train(tiny(corpus), corpus, settings(steps=3, compile=True), out=tmp_path / "compiled")
    assert compiled.train_loss == pytest.approx(plain.train_loss, rel=1e-3)
    SpikeDecoder.from_pretrained(tmp_path / "compiled" / "last")


def test_tensorboard_of_a_run_that_went_on(corpus: Corpus, tmp_path: Path) -> None:
    """What it had when it stopped stays, each step is there once."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    c, out = settings(steps=8, log_every=1, eval_every=4, tensorboard=True), tmp_path / "run"
    assert train(tiny(corpus), corpus, c, out=out, reporter=StopAt(6)).interrupted
    time.sleep(1.1)  # its files are read in the order of their names, which begin with the second
    train(tiny(corpus), corpus, c, out=out, resume=True)
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == list(range(1, 9))
    assert [e.step for e in events.Scalars("held_out/bits")] == [4, 8]
    assert [e.step for e in events.Scalars("baseline_bits/unigram")] == [0]


def test_fp16_is_refused_with_power_norm(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mixed_precision: got 'fp16', takes .* with norm = 'power'"):
        train(tiny(corpus, norm="power"), corpus, settings(mixed_precision="fp16"), out=tmp_path / "run")
