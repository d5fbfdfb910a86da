"""Training over several processes, and beside an Accelerator of the caller's."""

# ruff: noqa: F811 (fixtures)

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training import STORY, Messages, corpus, files, settings, tiny  # noqa: F401

from spikedecoder import SpikeDecoder
from spikedecoder.data import Corpus
from spikedecoder.training import evaluate, train


def in_two_processes(folder: Path, script: str, *arguments: str) -> str:
    """What torchrun prints, run in this folder."""
    (folder / "story.txt").write_text(STORY)
    (folder / "two.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "two.py", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_two_processes_share_a_batch(corpus: Corpus, tmp_path: Path) -> None:
    device = "cpu" if torch.accelerator.is_available() else "auto"
    command = (
        f"train --json --text story.txt --out two --device {device} --threads 1 --max-steps 4"
        " --preset default-lif --batch-size 2 --max-len 16 --heads 2 --blocks 1 --timesteps 2"
    ).split()
    # a BatchNorm whose statistics the processes share; currents that meet no threshold exactly
    changes = {"norm": "batch", "v_threshold": 0.97, "attention_scale": 1.0}
    assignments = ["token_dim=12", "position_dim=4", "warmup=0", "sync_norm=true"]
    for assignment in [*assignments, *(f"{name}={value}" for name, value in changes.items())]:
        command += ["--set", assignment]
    printed = in_two_processes(tmp_path, "from spikedecoder.cli import main; main()", *command)
    assert json.loads(printed)["steps"] == 4  # one process speaks
    train(
        tiny(corpus, **changes),
        corpus,
        settings(steps=4, batch_size=4, warmup=0, lr=8e-3),
        out=tmp_path / "one",
    )
    two = json.loads((tmp_path / "two" / "last" / "trainer.json").read_text())
    # sums in another order, and then a spike here and there
    ours = json.loads((tmp_path / "one" / "last" / "trainer.json").read_text())
    assert two["recent_losses"][0] == pytest.approx(ours["recent_losses"][0], rel=1e-5)
    assert two["evaluation"]["loss"] == pytest.approx(ours["evaluation"]["loss"], rel=0.02)
    assert two["evaluation"]["tokens"] == ours["evaluation"]["tokens"]


PROCESSES = """
import json, os, sys
from pathlib import Path
from spikedecoder.data import prepare_corpus
from spikedecoder.training import evaluate, train
from training import STORY, settings, tiny
rank = int(os.environ["RANK"])
text = Path(f"{rank}.txt")
text.write_text(STORY[rank:])
corpus, own = (prepare_corpus([path], cache_dir=f"cache{rank}") for path in ("story.txt", text))
config = tiny(corpus, norm="batch", token_dim=28, heads=4, blocks=2)
c = settings(steps=40, batch_size=8, eval_every=10, warmup=0, lr=8e-3, device="cpu")
try:
    train(config, own, c, out="apart")
except ValueError as error:
    found = {"error": str(error)}
result = train(config, corpus, c, out="run")
found |= {"said": result.evaluation.loss, "is": evaluate(result.model, corpus.val).loss}
again = train(config, corpus, c.replace(steps=42), out="run", resume=True)
found |= {"again": again.evaluation.loss, "step": again.step}
Path(f"{rank}.json").write_text(json.dumps(found))
"""


@pytest.mark.slow
def test_processes_evaluate_the_model_that_is_saved(corpus: Corpus, tmp_path: Path) -> None:
    """Each has running statistics of its own batches, and the checkpoint those of the first."""
    in_two_processes(tmp_path, PROCESSES)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1] and ranks[0]["step"] == 42 and not (tmp_path / "apart").exists()
    assert ranks[0]["error"].startswith("corpus: got 2 different ones in 2 processes, takes the same one")
    assert ranks[0]["said"] == pytest.approx(ranks[0]["is"], rel=1e-6)
    model = SpikeDecoder.from_pretrained(tmp_path / "run" / "last")
    evaluation = evaluate(model, corpus.val)
    assert evaluation is not None and evaluation.loss == pytest.approx(ranks[0]["again"], rel=1e-6)
    messages, c = Messages(), settings(steps=43, batch_size=8, warmup=0, lr=8e-3)
    train(model.config, corpus, c, out=tmp_path / "run", resume=True, reporter=messages)
    assert (
        "had 2 processes and has 1 now, so that a step takes 8 windows of text in place of 16"
        in (messages.texts[0])
    )


def test_a_run_and_an_accelerator_of_the_callers_do_not_meet(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    plain = train(tiny(corpus), corpus, settings(), out=tmp_path / "plain")
    try:  # what a run leaves behind would refuse another precision
        theirs = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=3)
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
        train(tiny(corpus), corpus, settings(), out=tmp_path / "beside")
        assert (theirs.mixed_precision, theirs.gradient_accumulation_steps) == ("bf16", 3)
        assert files(tmp_path / "beside" / "last") == files(plain.out / "last")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
