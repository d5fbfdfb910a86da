"""The command line before any command runs: help, version, wrong words, Ctrl-C while torch is imported."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import spikedecoder
from spikedecoder.cli import app, main

COMMANDS = [str(command.callback.__name__) for command in app.registered_commands if command.callback]


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main([*arguments])
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


@pytest.fixture
def slow_torch(tmp_path: Path) -> dict[str, str]:
    """The environment of a process in which the import of torch says so and takes a minute."""
    (tmp_path / "torch.py").write_text("import time\nprint('torch', flush=True)\ntime.sleep(60)\n")
    root = Path(spikedecoder.__file__).parents[1]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(root)])}


def test_commands() -> None:
    assert {"train", "generate", "doctor"} < set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    assert command in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"spikedecoder {spikedecoder.__version__}\n"


def test_output_may_be_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert run("train", "--print-config") == 0
    assert run("train", "--set", "blocks") == 2


@pytest.mark.parametrize("unbuffered", ["", "1"])  # found out at the end, or while the command runs
def test_the_reader_of_the_output_may_go(unbuffered: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "spikedecoder", "--version"],
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == ("", 0)


def test_no_such_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("trian") == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and "trian" in said.err


def test_nothing_that_needs_no_torch_waits_for_it(slow_torch: dict[str, str]) -> None:
    code = (
        "import sys, spikedecoder\n"
        "from spikedecoder.cli import main\n"
        f"for arguments in (['--version'], ['train', '--nope'], *([c, '--help'] for c in {COMMANDS})):\n"
        "    try:\n"
        "        main(arguments)\n"
        "    except SystemExit as exit_:\n"
        "        assert exit_.code == (2 if '--nope' in arguments else 0), arguments\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=slow_torch, capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 0, done.stderr
    assert spikedecoder.__version__ in done.stdout and "--preset" in done.stdout


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_ctrl_c_while_torch_is_imported(slow_torch: dict[str, str]) -> None:
    code = (
        "import signal\n"  # a shell's background job is born deaf to it
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from spikedecoder.cli import main\n"
        "main(['train'])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=slow_torch,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "torch\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said in ("", "error: interrupted\n")  # by typer's version


def test_every_environment_variable_is_documented() -> None:
    root = Path(__file__).parent.parent
    read = {
        name
        for path in (root / "setup.py", *(root / "spikedecoder").rglob("*.py"))
        for name in re.findall(r"SPIKEDECODER_[A-Z_]+", path.read_text("utf-8"))
    }
    read -= {"SPIKEDECODER_CUDA", "SPIKEDECODER_SOURCES"}  # what CMake is given
    documented = re.findall(r"^\| `(\w+)`", (root / "docs" / "design.md").read_text("utf-8"), re.M)
    assert sorted(read) == sorted(name for name in documented if name.startswith("SPIKEDECODER_"))


def test_variables_that_find_programs_and_those_of_tests_are_documented() -> None:
    root = Path(__file__).parent.parent
    read = r"environ(?:\.get\(|\[)\"(\w+)\""
    programs = re.findall(read, (root / "spikedecoder/ext/_programs.py").read_text("utf-8"))
    assert "CUDA_PATH" in programs
    design = (root / "docs" / "design.md").read_text("utf-8")
    assert all(f"`{name}`" in design for name in programs)
    tests = {
        name
        for folder in ("tests", "bench")
        for path in (root / folder).rglob("*.py")
        for name in re.findall(read, path.read_text("utf-8"))
        if name.startswith("SPIKEDECODER_")
    }
    own = tests - set(re.findall(r"^\| `(\w+)`", design, re.M))
    assert own >= {"SPIKEDECODER_BOOK", "SPIKEDECODER_GOLDEN", "SPIKEDECODER_CHROMIUM"}
    assert all(f"`{name}" in (root / "CONTRIBUTING.md").read_text("utf-8") for name in own)


def test_the_package_gives_what_it_promises() -> None:
    assert set(spikedecoder.__all__) <= set(dir(spikedecoder))
    for name in spikedecoder.__all__:
        assert getattr(spikedecoder, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        spikedecoder.nothing  # noqa: B018


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_ctrl_c_amid_an_import_that_would_swallow_it(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import os, signal\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n    [None for _ in range(1000)]\n"
        "except KeyboardInterrupt:\n    pass\n"
    )
    code = (
        "import signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import spikedecoder.cli as c\n"
        "c.app = lambda *_, **__: __import__('slow')\n"
        "c.main([])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted\n")


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
def test_a_closed_standard_input_is_an_empty_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "spikedecoder", "train", "--text", "-", "--out", str(tmp_path / "run")]
    done = subprocess.run(f"{shlex.join(command)} <&-", shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: standard input: the file is empty\n")


def test_the_apps_folder_of_runs_is_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert run("gui", "--runs", str(tmp_path / "file")) == 2
    assert "--runs: " in capsys.readouterr().err
