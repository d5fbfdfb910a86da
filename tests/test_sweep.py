"""Search: every trial once, whoever runs it and whatever kills it; the best is a file that trains."""

from __future__ import annotations

import contextlib
import csv
import functools
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from spikedecoder.cli import main
from spikedecoder.data import CharTokenizer
from spikedecoder.sweep import Search, sweep
from spikedecoder.training import train
from spikedecoder.training.checkpoints import read_step

optuna = pytest.importorskip("optuna")

STORY = "the cat sat on the mat. the dog ate the hat. a rat ran to the cat and sat. " * 40
TINY = """
preset = "default-lif"
[model]
blocks = 1
heads = 2
max_len = 16
token_dim = 12
position_dim = 4
[train]
steps = {steps}
batch_size = 2
eval_tokens = 200
threads = 1
save_every = 2
"""


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def story(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text(STORY)
    return path


def search_file(folder: Path, rest: str, steps: int = 6) -> Path:
    path = folder / "search.toml"
    path.write_text(TINY.format(steps=steps) + rest)
    return path


def search(rest: str, steps: int = 6) -> Search:
    from spikedecoder.cli.settings import tomllib

    return Search.from_dict(tomllib.loads(TINY.format(steps=steps) + rest))


def run(capsys, *arguments, code=0):
    with pytest.raises(SystemExit) as exit_:
        main([*map(str, arguments)])
    captured = capsys.readouterr()
    assert exit_.value.code == code, captured.err
    return captured


def test_a_grid_from_file_to_a_config_that_trains_the_same(story, tmp_path, capsys):
    file = search_file(
        tmp_path,
        """
        [space]
        lr = { low = 1e-3, high = 1e-2, log = true, points = 2 }
        timesteps = { choices = [1, 2] }
        v_reset = { choices = ["none"] }
        [study]
        sampler = "grid"
        """,
    )
    out = tmp_path / "sweep"
    said = run(capsys, "sweep", file, "--text", story, "--out", out).out
    with open(out / "results.csv") as f:
        rows = list(csv.DictReader(f))
    points = {(round(float(r["lr"]), 6), r["timesteps"]) for r in rows}
    assert points == {(0.001, "1"), (0.001, "2"), (0.01, "1"), (0.01, "2")} and len(rows) == 4
    best = min(rows, key=lambda r: float(r["bits"]))
    assert "best.toml" in said and f"{float(best['bits']):.4f}" in said
    assert {p.name for p in out.glob("*.png")} == {"history.png", "slices.png", "curves.png"}
    kept = [p.parent.name for p in (out / "trials").glob("*/checkpoints")]
    assert kept == [best["folder"]]

    config = ["--config", out / "best.toml", "--text", story, "--out", tmp_path / "again", "--json"]
    again = json.loads(run(capsys, "train", *config).out.splitlines()[-1])
    assert again["best"]["val_bits_per_token"] == float(best["bits"])  # the very same run

    # nothing is left to do
    result = json.loads(run(capsys, "sweep", file, "--text", story, "--out", out, "--json").out)
    assert len(result["trials"]) == 4 and result["best"]["bits"] == float(best["bits"])


def test_a_large_grid_is_queued_once_without_a_look_at_all_trials_for_each_point(tmp_path, monkeypatch):
    from spikedecoder.sweep.study import fill_grid, open_study

    space = "lr = { low = 1e-3, high = 1e-2, log = true, points = 3 }\nv_reset = { choices = [0.0, 'none'] }"
    whole = search(f"[space]\n{space}\n[study]\nsampler = 'grid'")
    study, looks = open_study(tmp_path / "sweep", whole, "text"), []
    real = study.get_trials
    monkeypatch.setattr(study, "get_trials", lambda *a, **k: looks.append(1) or real(*a, **k))
    fill_grid(study, whole)
    study.ask()  # one is no longer waiting
    fill_grid(study, whole)
    assert len(looks) == 2 and len(real()) == 6


SPACE = """
[space]
lr = { low = 1e-3, high = 1e-2, log = true }
timesteps = { low = 1, high = 3 }
[study]
startup = 2
prune = false
"""


def test_a_study_that_stops_between_trials_goes_on_as_if_it_had_not(story, tmp_path):
    import dataclasses

    whole = search(SPACE, steps=2)
    options = {"texts": [str(story)], "say": lambda _: None}
    at_once = sweep(dataclasses.replace(whole, trials=4), tmp_path / "one", **options)
    sweep(dataclasses.replace(whole, trials=3), tmp_path / "two", **options)
    later = sweep(dataclasses.replace(whole, trials=4), tmp_path / "two", **options)
    same = [[(t["params"], t["bits"]) for t in result.trials] for result in (at_once, later)]
    assert len(same[0]) == 4 and same[0] == same[1]
    assert len({t["params"]["lr"] for t in later.trials}) == 4


def test_bad_trials_are_stopped_and_impossible_ones_said(story, tmp_path):
    said: list[str] = []
    found = sweep(
        search(
            """
            [space]
            lr = { choices = [1e-2, 8e-3, 1e-6] }
            token_shift = { choices = [1, 40] }
            [study]
            sampler = "grid"
            startup = 2
            """,
            steps=20,
        ),
        tmp_path / "sweep",
        texts=[str(story)],
        say=said.append,
    )
    states = {(t["params"]["lr"], t["params"]["token_shift"]): t for t in found.trials}
    assert {key: t["state"] for key, t in states.items()} == {
        (1e-2, 1): "complete",
        (8e-3, 1): "complete",
        (1e-6, 1): "pruned",
        **{(lr, 40): "fail" for lr in (1e-2, 8e-3, 1e-6)},
    }
    pruned = states[1e-6, 1]
    assert pruned["step"] == 4  # at the first look, of five
    assert metrics(tmp_path / "sweep", pruned)[-1]["step"] == 4
    assert "token_shift: got 40, takes 1 to" in states[1e-2, 40]["error"]
    assert any("stopped at step 4" in line for line in said)
    assert found.best["bits"] == min(t["bits"] for t in found.trials if t["state"] == "complete")


@pytest.mark.parametrize("how", ["pruned", "complete"])
def test_a_signal_during_the_last_step_of_a_trial_ends_the_sweep(story, tmp_path, monkeypatch, how):
    """Of a trial that was about to be over anyway, so that nothing is left of it to go on with."""
    from spikedecoder.sweep import worker
    from spikedecoder.training.signals import stop_on_signals

    def trained(*arguments, reporter, **options):
        result = train(*arguments, reporter=reporter, **options)
        with stop_on_signals():
            signal.raise_signal(signal.SIGINT)
        if how == "pruned":
            raise optuna.TrialPruned
        return result

    monkeypatch.setattr(worker, "train", trained)
    before = signal.getsignal(signal.SIGINT)
    found = sweep(search(SPACE), tmp_path / "sweep", texts=[str(story)], say=lambda _: None)
    assert found.interrupted and len(found.trials) == 1
    assert signal.getsignal(signal.SIGINT) is before


def test_the_searches_of_the_benchmarks_can_be_run():
    """Every choice, and both ends of every range, make a configuration."""
    from spikedecoder.cli.settings import tomllib

    files = sorted((Path(__file__).parents[1] / "bench" / "searches").glob("*.toml"))
    assert files
    for file in files:
        wanted = Search.from_dict(tomllib.loads(file.read_text()))
        for dimension in wanted.space:
            for value in dimension.choices or (dimension.low, dimension.high):
                wanted.settings({dimension.name: value})
                wanted.config({dimension.name: value}, CharTokenizer.from_text("a text"))


def test_a_file_is_no_folder_of_a_study(story, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file: a file, takes a folder"):
        sweep(search(SPACE), tmp_path / "file", texts=[str(story)])


def metrics(out: Path, trial: dict) -> list[dict]:
    lines = (out / "trials" / trial["folder"] / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


@pytest.mark.parametrize("killed", [False, True])
def test_a_trial_is_given_up_after_three_kills_and_after_no_number_of_stops(
    story, tmp_path, monkeypatch, killed
):
    from spikedecoder.sweep import worker

    def ends(*_, **__):
        if killed:
            raise SystemExit
        return SimpleNamespace(interrupted="SIGINT")

    whole = search("[space]\nseed = { choices = [1] }\n[study]\nsampler = 'grid'", steps=2)
    go = functools.partial(sweep, whole, tmp_path / "sweep", texts=[str(story)], say=lambda _: None)
    with monkeypatch.context() as patch:
        patch.setattr(worker, "train", ends)
        for _ in range(3):
            with pytest.raises(SystemExit) if killed else contextlib.nullcontext():
                assert go().interrupted
    [trial] = go().trials
    assert trial["folder"] == "0000" and trial["state"] == ("fail" if killed else "complete")


def test_a_trials_run_that_cannot_be_read_is_left_alone(story, tmp_path, monkeypatch):
    from spikedecoder.sweep import worker

    whole = search("[space]\nseed = { choices = [1] }\n[study]\nsampler = 'grid'", steps=1)
    go = functools.partial(sweep, whole, tmp_path / "sweep", texts=[str(story)], say=lambda _: None)
    with monkeypatch.context() as patch:
        patch.setattr(worker, "train", lambda *_, **__: SimpleNamespace(interrupted="SIGINT"))
        go()
    run_file = tmp_path / "sweep" / "trials" / "0000" / "run.json"
    run_file.parent.mkdir(parents=True)
    later = '{"format": "spikedecoder-run", "version": 2}'
    run_file.write_text(later)
    [trial] = go().trials
    assert trial["state"] == "fail" and "not the description of a training run" in trial["error"]
    assert run_file.read_text() == later


def test_a_trial_that_needs_too_much_memory_fails_alone(story, tmp_path, monkeypatch):
    from spikedecoder.sweep import worker

    def too_large(config, data, settings, **options):
        if settings.seed == 1:
            raise MemoryError("not enough memory on cpu\nfor steps of 2 x 16 tokens")
        return train(config, data, settings, **options)

    monkeypatch.setattr(worker, "train", too_large)
    whole, told = search("[space]\nseed = { choices = [1, 2] }\n[study]\nsampler = 'grid'", steps=1), []
    found = sweep(whole, tmp_path / "sweep", texts=[str(story)], say=told.append)
    failed, complete = sorted(found.trials, key=lambda t: t["params"]["seed"])
    assert (failed["state"], complete["state"]) == ("fail", "complete")
    assert failed["error"] == "not enough memory on cpu for steps of 2 x 16 tokens"
    assert any("failed: not enough memory" in line for line in told)


def test_a_study_whose_process_was_killed_while_writing_goes_on(story, tmp_path):
    go = functools.partial(sweep, texts=[str(story)], say=lambda _: None)
    whole = search("[space]\nseed = { choices = [1] }\n[study]\nsampler = 'grid'", steps=1)
    go(whole, tmp_path / "sweep")
    killed = tmp_path / "killed"
    with contextlib.closing(sqlite3.connect(tmp_path / "sweep" / "study.db")) as database:
        database.execute("pragma cache_size = 1")  # writes before the commit
        database.execute("create table more (text)")
        database.executemany("insert into more values (?)", [("x" * 1000,)] * 100)
        shutil.copytree(tmp_path / "sweep", killed)
    assert (killed / "study.db-journal").stat().st_size > 0
    assert [t["state"] for t in go(whole, killed).trials] == ["complete"]


@pytest.mark.parametrize("heard", [True, False])
def test_several_processes_say_what_one_would(story, tmp_path, capfd, heard):
    """To the caller's `say`, not to standard output; one that fails ends the sweep."""
    told: list[str] = []

    def say(line: str) -> None:
        told.append(line)
        if not heard:
            raise BrokenPipeError

    whole = search("[space]\nseed = { choices = [1, 2] }\n[study]\nsampler = 'grid'", steps=1)
    with contextlib.nullcontext() if heard else pytest.raises(BrokenPipeError):
        found = sweep(whole, tmp_path / "sweep", texts=[str(story)], jobs=2, say=say)
        bits = {f"trial {t['number']} (seed {t['params']['seed']})": t["bits"] for t in found.trials}
        assert sorted(told) == sorted(f"{trial}: {n:.3f} bits per token" for trial, n in bits.items())
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("suggested", [0, 1, 2])
def test_a_grid_loses_no_point_whose_process_died_while_it_asked_for_the_values(tmp_path, suggested):
    from spikedecoder.sweep.study import claim, fill_grid, open_study, requeue_stale

    whole = search(
        "[space]\nlr = { choices = [0.1, 0.2, 0.3] }\nseed = { choices = [1, 2] }\n[study]\nsampler = 'grid'"
    )
    study = open_study(tmp_path, whole, "text")
    fill_grid(study, whole)
    dead = claim(study, whole)
    for dimension in whole.space[:suggested]:
        dead.suggest_categorical(dimension.name, dimension.values())
    assert requeue_stale(study, tmp_path) == [dead.number]
    fill_grid(study, whole)
    seen = []
    while (trial := claim(study, whole)) is not None:
        seen.append(tuple(whole.suggest(trial).values()))
        study.tell(trial, 1.0)
    assert sorted(seen) == [(lr, seed) for lr in (0.1, 0.2, 0.3) for seed in (1, 2)]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")
def test_a_stop_a_kill_and_several_processes(story, tmp_path):
    """Stopped, then killed with -9, then finished: each point of the grid is done once, none anew."""
    rest = """
    [space]
    seed = { choices = [1, 2, 3, 4] }
    [study]
    sampler = "grid"
    prune = false
    """
    whole, out, told = search(rest, steps=60), tmp_path / "sweep", []
    options = {"texts": [str(story)], "say": told.append}

    def steps() -> dict[str, int]:
        return {p.parent.name: read_step(p) for p in out.glob("trials/*/last")}

    def interrupt() -> None:
        while not steps():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    stopped = sweep(whole, out, **options)
    thread.join()
    assert stopped.interrupted and stopped.best is None
    begun = steps()
    assert len(begun) == 1 and 0 < begun["0000"] < 60

    program = "from spikedecoder.cli import main; main()"
    file = search_file(tmp_path, rest, steps=60)
    command = [sys.executable, "-c", program, "sweep", file, "--text", story, "--out", out, "--jobs", "2"]
    parent = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    wait_for(lambda: sum(begun.get(name, 0) < step < 60 for name, step in steps().items()) >= 2, parent)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    workers = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == 2
    for pid in workers:
        os.kill(int(pid), signal.SIGKILL)
    _, errors = parent.communicate(timeout=60)
    assert parent.returncode == 1 and "a process ended with code -9; the same command takes up" in errors

    told.clear()
    result = sweep(whole, out, **options)
    assert any("taken up again" in line for line in told)
    assert sorted(t["params"]["seed"] for t in result.trials) == [1, 2, 3, 4]
    assert [t["error"] for t in result.trials if t["state"] != "complete"] == [] and not result.interrupted
    for trial in result.trials:
        evaluated = [x["step"] for x in metrics(out, trial) if "val_loss" in x]
        assert evaluated == [12, 24, 36, 48, 60], evaluated  # one history, no step done twice in it
    assert len(list(out.glob("trials/*/run.json"))) == 4


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("", "space: got no field to search"),
        ("[space]\nlearn = { choices = [1] }", "space: unknown field 'learn'"),
        ("[space]\nlr = 3", "space: lr: got 3, takes"),
        ("[space]\nlr = { low = 1 }", "lr: got no high, takes low and high"),
        ("[space]\nlr = { low = 1, high = 1 }", "takes low < high"),
        ("[space]\nlr = { low = 0, high = 1, log = true }", "low: got 0.0 with log"),
        ("[space]\nlr = { low = 1, high = 2, lo = 3 }", "lr: unknown field 'lo'; did you mean low"),
        ("[space]\ntimesteps = { low = 1.5, high = 2 }", "timesteps: low: got 1.5"),
        ("[space]\ntimesteps = { choices = [1, 1] }", "stands there twice"),
        ("[space]\ntimesteps = { choices = ['a'] }", "timesteps: got 'a'"),
        ("[space]\nnorm = { low = 1, high = 2 }", "norm: takes choices"),
        ("[space]\nnorm = { choices = [] }", "takes a list of values"),
        ("[space]\nlr = { choices = [nan, 0.1] }", "lr: choices: got nan, takes finite numbers"),
        ("[space]\nlr = { choices = [0.1, inf] }", "lr: choices: got inf, takes finite numbers"),
        ("[space]\nlr = { low = 1, high = 2, step = nan }", "lr: step: got nan, takes > 0"),
        ("[space]\nneuron = { choices = ['lif', 'ilif'] }", "neuron: one kind refuses what the other takes"),
        ("[space]\ntokenizer = { choices = ['char', 'word'] }", "changes what is measured"),
        ("[space]\nblocks = { choices = [1, 2] }", "blocks: stands in [space] and in [model]"),
        ("[space]\nlr = { low = 1, high = 2 }\n[study]\nsampler = 'grid'", "a grid needs choices, step, or"),
        (
            "[space]\nlr = { low = 0.1, high = 1, points = 1000000000 }\n[study]\nsampler = 'grid'",
            "lr: a grid of more than 10,000 values",
        ),
        (
            "[space]\nlr = { low = 0.1, high = 1, step = 1e-300 }\n[study]\nsampler = 'grid'",
            "lr: a grid of more than 10,000 values",
        ),
        ("[space]\nlr = { low = 1, high = 2 }\n[study]\nsampler = 'gp'", "sampler: got 'gp', takes tpe"),
        ("[space]\nlr = { low = 1, high = 2 }\n[study]\ntrials = 0", "trials: got 0"),
        ("[space]\nlr = { low = 1, high = 2 }\n[study]\ntrial = 1", "did you mean trials"),
        ("[space]\nlr = { low = 1, high = 2 }\n[other]\na = 1", "unknown field 'other'"),
    ],
)
def test_bad_searches_are_named(rest, message):
    with pytest.raises(ValueError) as error:
        search(rest)
    assert message in str(error.value)


def test_stopped_as_often_as_one_likes_it_makes_the_same_trials(story, tmp_path, monkeypatch):
    wanted, options = search(SPACE + "trials = 3\n"), {"texts": [str(story)], "say": lambda _: None}
    whole = sweep(wanted, tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        patch.setattr(
            "spikedecoder.sweep.worker._Watcher.tick", lambda *_: os.kill(os.getpid(), signal.SIGINT)
        )
        for _ in range(5):
            assert sweep(wanted, tmp_path / "stopped", **options).interrupted
    stopped = sweep(wanted, tmp_path / "stopped", **options)
    rows = [[(t["state"], t["params"], t["bits"]) for t in result.trials] for result in (whole, stopped)]
    assert rows[0] == rows[1] and len(rows[0]) == 3


def test_any_folder_name_goes_on(story, tmp_path, capsys):
    file, out = search_file(tmp_path, SPACE + "trials = 1\n", steps=1), tmp_path / "new" / "lr? 50% #1 {a}"
    for trials in ("1", "2"):
        run(capsys, "sweep", file, "--text", story, "--out", out, "--trials", trials)
    assert (out / "results.csv").read_text().count("complete") == 2
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_a_study_of_another_schema_space_or_text(story, tmp_path, capsys):
    rest, quick = SPACE + "trials = 1\n", 1
    file, out = search_file(tmp_path, rest, steps=quick), tmp_path / "sweep"

    def fails(message: str, *arguments) -> None:
        captured = run(capsys, *arguments, code=2)
        lines = captured.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], lines

    command = ["sweep", file, "--text", story, "--out", out]
    out.mkdir()
    (out / "study.db").write_text("no database at all, but long enough to be taken for one" * 20)
    fails("not a study file", *command)
    (out / "study.db").unlink()
    with sqlite3.connect(out / "study.db") as database:
        database.execute("create table cats (name text)")
    fails("a database of another schema", *command)
    (out / "study.db").unlink()
    optuna.create_study(storage=f"sqlite:///{out / 'study.db'}", study_name="mine")
    fails("holds the study 'mine'", *command)
    (out / "study.db").unlink()

    run(capsys, *command)
    search_file(tmp_path, rest.replace("high = 3", "high = 4"), steps=quick)
    fails("the study has space: timesteps = 1 to 3, the search file 1 to 4", *command)
    search_file(tmp_path, rest, steps=quick + 1)
    fails("the study has train: steps = 1, the search file 2", *command)
    search_file(tmp_path, rest, steps=quick)
    other = tmp_path / "other.txt"
    other.write_text(STORY.replace("cat", "cow"))
    fails("the study is of another text", "sweep", file, "--text", other, "--out", out)
    with sqlite3.connect(out / "study.db") as database:  # a later version of Optuna's tables
        database.execute("update alembic_version set version_num = 'v99'")
    fails("a study file of another schema", *command)
    (out / "study.db").unlink()
    fails("holds trials but no study.db", *command)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    fails("holds a training run", "sweep", file, "--text", other, "--out", tmp_path / "run")
    fails("no such file", "sweep", tmp_path / "none.toml", "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_without_optuna_the_way_to_get_it_is_said(story, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ValueError, match=r"pip install 'spikedecoder\[sweep\]'"):
        sweep(search(SPACE), tmp_path / "sweep", texts=[str(story)])
    assert not (tmp_path / "sweep").exists()
