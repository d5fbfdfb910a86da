"""Where a run's numbers go: the screen, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from spikedecoder._files import finite, write_bytes
from spikedecoder.activity import Activity
from spikedecoder.training.evaluate import Evaluation
from spikedecoder.training.result import SavingError

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"


class Reporter:
    """Receives the events of a training run. This class ignores them; override the methods you need.

    wants_activity: whether to call `activity` at each evaluation, which costs a forward pass over a few
    windows.
    """

    wants_activity = False

    def start(self, step: int, steps: int, baselines: dict[str, float]) -> None:
        """Before the first step. `step` of `steps` are done already if the run was resumed.

        baselines: bits per token of n-gram models on the held-out tokens, by name.
        """

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Every `log_every` steps. metrics: loss, the mean over these steps, in nats per token; lr and
        grad_norm of the last step; tokens_per_second since this process began to train."""

    def tick(self, step: int, loss: float | None, tokens_per_second: float) -> None:
        """After every step; loss is None where reading it would mean waiting for the device."""

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        """After a held-out evaluation."""

    def activity(self, step: int, activity: Activity) -> None:
        """After an evaluation, if `wants_activity`: spikes and membrane potentials on some held-out text."""

    def message(self, text: str) -> None:
        """A message for the user."""

    def asks_to_stop(self) -> bool:
        """Called after every step; True ends the run as a signal does, with a checkpoint."""
        return False

    def close(self) -> None:
        """When the run ends, for whatever reason."""


class Several(Reporter):
    """Passes everything on to several reporters."""

    def __init__(self, *reporters: Reporter) -> None:
        self.reporters = reporters
        self.wants_activity = any(reporter.wants_activity for reporter in reporters)

    def start(self, step: int, steps: int, baselines: dict[str, float]) -> None:
        for reporter in self.reporters:
            reporter.start(step, steps, baselines)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        for reporter in self.reporters:
            reporter.step(step, metrics)

    def tick(self, step: int, loss: float | None, tokens_per_second: float) -> None:
        for reporter in self.reporters:
            reporter.tick(step, loss, tokens_per_second)

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        for reporter in self.reporters:
            reporter.evaluated(step, evaluation)

    def activity(self, step: int, activity: Activity) -> None:
        for reporter in self.reporters:
            if reporter.wants_activity:
                reporter.activity(step, activity)

    def message(self, text: str) -> None:
        for reporter in self.reporters:
            reporter.message(text)

    def asks_to_stop(self) -> bool:
        return any(reporter.asks_to_stop() for reporter in self.reporters)

    def close(self) -> None:
        for reporter in self.reporters:
            reporter.close()


class ScreenReporter(Reporter):
    """Prints messages and a line per evaluation to stderr, with a progress bar if it is a terminal.

    bar: False leaves out the progress bar. heading: lines to print when the first step is about to begin.
    """

    def __init__(self, bar: bool = True, heading: Sequence[str] = ()) -> None:
        self.heading = heading
        self.console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self._bar = bar and self.console.is_terminal
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._bits = self._loss = math.nan

    def start(self, step: int, steps: int, baselines: dict[str, float]) -> None:
        for line in self.heading:
            self.message(line)
        if not self._bar:
            return
        self._progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s"),
            TextColumn("held-out {task.fields[bits]} bits"),
            TimeRemainingColumn(compact=True),
            console=self.console,
        )
        self._task = self._progress.add_task("", total=steps, completed=step, loss="-", speed="-", bits="-")
        self._progress.start()

    def tick(self, step: int, loss: float | None, tokens_per_second: float) -> None:
        if loss is not None:
            self._loss = loss if math.isnan(self._loss) else 0.9 * self._loss + 0.1 * loss
        if self._progress is not None and self._task is not None:
            self._progress.update(
                self._task,
                completed=step,
                loss=_number(self._loss),
                speed=f"{tokens_per_second:,.0f}",
                bits=_number(self._bits),
            )

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        self._bits = evaluation.bits
        rates = evaluation.spike_rates.values()
        spikes = f", mean spike rate {sum(rates) / len(rates):.1%}" if rates else ""
        self.message(
            f"step {step}: held-out {evaluation.bits:.3f} bits per token (loss {evaluation.loss:.4f}), "
            f"accuracy {evaluation.accuracy:.1%}{spikes}; {evaluation.covers}"
        )

    def message(self, text: str) -> None:
        self.console.print(text, markup=False)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class MetricsFile(Reporter):
    """OUT/metrics.jsonl: a line of JSON per `log_every` steps and per evaluation; null if not finite."""

    def __init__(self, out: Path) -> None:
        self.path = out / METRICS

    def start(self, step: int, steps: int, baselines: dict[str, float]) -> None:
        """Drop the lines of steps that a killed run took after its last checkpoint."""
        kept = []
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line)
                except (ValueError, KeyError, TypeError):
                    pass  # a line cut short by the kill, or garbled by a power cut
        write_bytes(self.path, "".join(f"{line}\n" for line in kept).encode())

    def step(self, step: int, metrics: dict[str, float]) -> None:
        self._append({"step": step, **metrics})

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        values = {"val_loss": evaluation.loss, "val_bits_per_token": evaluation.bits}
        values["val_accuracy"] = evaluation.accuracy
        self._append(
            {"step": step, **values, "val_tokens": evaluation.tokens, "spike_rates": evaluation.spike_rates}
        )

    def _append(self, values: dict[str, Any]) -> None:
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(finite(values)) + "\n")
        except OSError as error:
            raise SavingError(
                f"cannot write {self.path} ({error}); the last checkpoint is whole: when that is mended, go "
                f"on with --resume {self.path.parent}"
            ) from error


class TensorBoard(Reporter):
    """OUT/tensorboard, for ``tensorboard --logdir``.

    Besides the metrics, at each evaluation and by layer: the mean spike rate, the spike rate of each
    timestep, the shares of neurons that never fired (dead) and that fired at every timestep of every token
    (saturated), and a histogram of membrane potentials before the reset. All of these but the mean rate are
    of the first windows of the held-out text. Raises ValueError if tensorboard is not installed.
    """

    wants_activity = True

    def __init__(self, out: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError(
                "tensorboard: not installed; run pip install 'spikedecoder[tensorboard]', or leave it out"
            ) from None
        self._folder, self._open = out / TENSORBOARD, SummaryWriter
        self._writer: Any = None

    def start(self, step: int, steps: int, baselines: dict[str, float]) -> None:
        again = self._folder.exists()  # what was written after the checkpoint is written once more
        self._writer = self._open(str(self._folder), purge_step=step + 1 if again else None)
        for name, bits in () if again else baselines.items():
            self._writer.add_scalar(f"baseline_bits/{name}", bits, 0)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(f"train/{name}", value, step)

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        for name, value in (
            ("loss", evaluation.loss),
            ("bits", evaluation.bits),
            ("accuracy", evaluation.accuracy),
        ):
            self._writer.add_scalar(f"held_out/{name}", value, step)
        for layer, rate in evaluation.spike_rates.items():
            self._writer.add_scalar(f"spike_rate/{layer}", rate, step)

    def activity(self, step: int, activity: Activity) -> None:
        for layer, rates in activity.rates().items():
            for t, rate in enumerate(rates.tolist(), start=1):
                self._writer.add_scalar(f"spike_rate_at_timestep_{t}/{layer}", rate, step)
        for name, shares in (("dead", activity.dead()), ("saturated", activity.saturated())):
            for layer, share in shares.items():
                self._writer.add_scalar(f"{name}/{layer}", share, step)
        for layer, potentials in activity.potentials.items():
            self._writer.add_histogram(f"membrane_potential/{layer}", potentials.float(), step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"
