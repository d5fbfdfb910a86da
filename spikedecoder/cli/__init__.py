"""The command line: ``spikedecoder train``, ``generate`` and the others; one module each."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Annotated

import typer

from spikedecoder.cli.convert import convert
from spikedecoder.cli.doctor import doctor
from spikedecoder.cli.energy import energy
from spikedecoder.cli.generate import generate
from spikedecoder.cli.gui import gui
from spikedecoder.cli.plot import plot
from spikedecoder.cli.serve import serve
from spikedecoder.cli.sweep import sweep
from spikedecoder.cli.train import train

app = typer.Typer(
    name="spikedecoder",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from spikedecoder import __version__

        print(f"spikedecoder {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Train and run language models whose every activation is a spike."""


app.command()(train)
app.command()(generate)
app.command()(serve)
app.command()(energy)
app.command()(plot)
app.command()(sweep)
app.command()(gui)
app.command()(convert)
app.command()(doctor)

_DEBUG = "SPIKEDECODER_DEBUG"


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 the training failed, 2 wrong input, 130 interrupted.

    An error that the user can fix is one line on stderr; SPIKEDECODER_DEBUG=1 shows its traceback.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    on_main_thread = threading.current_thread() is threading.main_thread()
    if on_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _on_interrupt)
    try:
        code = app(arguments, standalone_mode=False)
        sys.stdout.flush()
    except KeyboardInterrupt:
        _say("interrupted")
        code = 130
    except (BrokenPipeError, SystemExit) as error:  # typer turns the first into the second
        if BrokenPipeError not in (type(error), type(error.__context__)):
            raise
        # the reader of our output has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        code = _answer(error)
    sys.exit(code or 0)


def _on_interrupt(_number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt or, amid an import, exit at once: modules of C++ abort then, and others swallow
    the exception or fail because they are half imported."""
    while frame is not None and frame.f_code is not main.__code__:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, b"error: interrupted\n")
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


def _answer(error: Exception) -> int:
    """Print an error and return the exit code; raises it again if no user could fix it."""
    # depending on its version, typer brings its own click: recognise click's errors by their attributes
    if hasattr(error, "exit_code"):
        if hasattr(error, "format_message"):
            _say(error.format_message() or "missing command; see --help")
            return 2
        return int(error.exit_code)
    if type(error).__name__ == "Abort":
        _say("aborted")
        return 130

    from spikedecoder.ops import BackendError
    from spikedecoder.training import SavingError, TrainingError
    from spikedecoder.training.memory import is_lack_of_memory

    if isinstance(error, TrainingError | SavingError):
        return _fail(error, 1)
    if isinstance(error, ValueError | TypeError | OSError | BackendError):
        return _fail(error, 2)
    if is_lack_of_memory(error):
        known = str(error).startswith("not enough memory")
        reason = f": {error}" if str(error) else ""
        return _fail(error if known else MemoryError(f"not enough memory{reason}"), 2)
    raise error


def _fail(error: BaseException, code: int) -> int:
    if os.environ.get(_DEBUG):
        raise error
    _say(" ".join(str(error).split()) or type(error).__name__)
    return code


def _say(text: str) -> None:
    print(f"error: {text}", file=sys.stderr)
