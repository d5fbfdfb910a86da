"""The original's `Trainer` under its old name: the same recipe for the shims of `spikedecoder.compat.model`.

AdamW (betas 0.9 and 0.95, weight decay 0.1 on Linear weights and thresholds), a learning rate annealed once
per epoch along a cosine (200 epochs, down to 5e-5), gradients clipped to norm 1, windows drawn without
replacement. For resumable runs, mixed precision and full evaluation use `spikedecoder.training` instead.
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from spikedecoder.compat.model import PSDconfig, _Config, _Shim
from spikedecoder.compat.utils import save_model_to_checkpoint
from spikedecoder.nn.evaluating import evaluating

WEIGHT_DECAY, BETAS = 0.1, (0.9, 0.95)
ANNEALING_EPOCHS, LEAST_LR = 200, 5e-5
MAX_NORM = 1.0


class Trainer:
    """``Trainer(config, model, train_dataset, test_dataset, epochs, ...).train()``.

    Args:
        config, model: a config and its model.
        train_dataset, test_dataset: items (x, y) of equally long strings, or of lists of words. Tokens beyond
            the model's max_len are cut off, with a warning (the original failed there).
        epochs: passes over train_dataset.
        documentation: write losses and accuracy for TensorBoard, into runs/.
        lr: learning rate. annealing: anneal it; False keeps it constant.
        batch_size: windows per step.
        inputLength: not used; the windows already have their length.
        gradientClipping: clip gradients to norm 1.
        checkPointRate: save every so many epochs, into `folder`.
        save_dataset: write the windows, one per line, beside the checkpoints. save_model: save at the end.
        num_workers: not used. The text is in memory and a batch is encoded in less than a millisecond, so
            worker processes would gain nothing, and forking them after torch started its threads is unsafe.
        prevEpochs: epochs trained before; the numbers in what is printed and saved go on from there. The
            learning rate is annealed from `lr` again, as in the original.
        profiling: print where two of the first steps spend their time.

    Raises TypeError, ValueError naming the argument.
    """

    def __init__(
        self,
        config: _Config,
        model: _Shim,
        train_dataset: Any,
        test_dataset: Any,
        epochs: int,
        documentation: bool = False,
        lr: float = 0.001,
        batch_size: int = 64,
        annealing: bool = True,
        inputLength: int = 128,
        gradientClipping: bool = True,
        checkPointRate: int = 100,
        save_dataset: bool = False,
        save_model: bool = True,
        num_workers: int = 0,
        prevEpochs: int = 0,
        profiling: bool = False,
    ) -> None:
        if not isinstance(model, _Shim):
            raise TypeError(f"model: got {type(model).__name__}, takes a model of spikedecoder.compat.model")
        if config is not model.config and config.options != model.config.options:
            raise ValueError("config: got another one than the model's, takes the one the model was made of")
        for name, value, low in (
            ("epochs", epochs, 0),
            ("batch_size", batch_size, 1),
            ("checkPointRate", checkPointRate, 1),
            ("prevEpochs", prevEpochs, 0),
            ("num_workers", num_workers, 0),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"{name}: got {value!r}, takes an integer >= {low}")
        if not (isinstance(lr, (int, float)) and math.isfinite(lr) and lr > 0):
            raise ValueError(f"lr: got {lr!r}, takes a finite number > 0")
        self.config, self.model = config, model
        self.train_dataset, self.test_dataset = train_dataset, test_dataset
        self.epochs, self.batch_size, self.lr = epochs, batch_size, lr
        self.annealing, self.gradient_clipping = annealing, gradientClipping
        self.checkpoint_rate, self.prev_epochs = checkPointRate, prevEpochs
        self.save_dataset, self.save_model = save_dataset, save_model
        self.documentation, self.profiling = documentation, profiling
        for name, dataset in (("train_dataset", train_dataset), ("test_dataset", test_dataset)):
            if not len(dataset):
                raise ValueError(f"{name}: got no windows, takes at least one")
            length = len(dataset[0][0])
            if length > self.max_len:
                message = f"{name}: windows of {length} tokens are cut to the model's max_len, {self.max_len}"
                warnings.warn(message, stacklevel=2)

    @property
    def max_len(self) -> int:
        return self.model.decoder.config.max_len

    @property
    def folder(self) -> Path:
        """Where checkpoints are saved: checkpoints/NAME, or checkpoints/spike_degree_D/NAME with a PSDconfig.
        NAME is that of the text's file, or "model"."""
        source = getattr(self.train_dataset, "src", None)
        name = Path(str(source)).stem if source else "model"
        if isinstance(self.config, PSDconfig):
            return Path("checkpoints") / f"spike_degree_{self.config.options['spike_degree']}" / name
        return Path("checkpoints") / name

    def train(self) -> None:
        """Train and save; prints a line of losses before the first epoch and after each."""
        start = time.perf_counter()
        model = self.model.to(torch.device(self.config.options["device"]))
        model.train()
        optimizer = model.configure_optimizer(WEIGHT_DECAY, self.lr, BETAS)
        schedule = CosineAnnealingLR(optimizer, ANNEALING_EPOCHS, eta_min=LEAST_LR)
        console = Console()
        writer = _tensorboard() if self.documentation else None
        parameters = sum(p.numel() for p in model.parameters())
        console.print(f"{parameters / 1e6:.2f} million parameters", highlight=False)
        self._evaluate(self.prev_epochs, console, writer, None)
        saved = None
        with _profiler(self.profiling) as profiler:
            for epoch in range(self.prev_epochs + 1, self.prev_epochs + self.epochs + 1):
                accuracy = self._epoch(epoch, optimizer, console, profiler)
                self._evaluate(epoch, console, writer, accuracy)
                if self.annealing:
                    schedule.step()
                if (epoch - self.prev_epochs) % self.checkpoint_rate == 0:
                    saved = self._save(epoch)
        last = self.prev_epochs + self.epochs
        if self.save_dataset:
            self._save_dataset()
        if self.save_model and (saved is None or not saved.name.startswith(f"checkpoint_epoch-{last}B")):
            self._save(last)
        if writer is not None:
            writer.close()
        console.print(f"{time.perf_counter() - start:.1f} seconds", highlight=False)

    def _epoch(self, epoch: int, optimizer: torch.optim.Optimizer, console: Console, profiler: Any) -> float:
        """One pass over the training windows; returns the share of tokens predicted correctly."""
        right = seen = 0
        bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:.0f} tokens/s"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        start = time.perf_counter()
        with bar:
            steps = math.ceil(len(self.train_dataset) / self.batch_size)
            task = bar.add_task("", total=steps, epoch=epoch, loss=math.nan, speed=0)
            for x, y in _batches(self.train_dataset, self.batch_size):
                x, y = self._cut(x), self._cut(y)
                logits, _, loss = self.model(x, y)
                value = loss.item()
                if not math.isfinite(value):
                    raise RuntimeError(
                        f"epoch {epoch}: the loss became {value}; try a smaller lr (now {self.lr}), or "
                        "gradientClipping=True"
                    )
                loss.backward()
                if self.gradient_clipping:
                    torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                if profiler is not None:
                    profiler.step()
                right += self._right(logits, y)
                seen += sum(map(len, y))
                speed = seen / (time.perf_counter() - start)
                bar.update(task, advance=1, loss=value, speed=speed)
        return right / seen

    def _evaluate(self, epoch: int, console: Console, writer: Any, accuracy: float | None) -> None:
        """Print and log the losses of a newly drawn batch of training windows and one of test windows."""
        losses = []
        for dataset in (self.train_dataset, self.test_dataset):
            x, y = next(_batches(dataset, self.batch_size))
            with torch.no_grad(), evaluating(self.model):
                losses.append(self.model(self._cut(x), self._cut(y))[2].item())
        line = f"epoch {epoch:5d} | train loss {losses[0]:.4f} | val loss {losses[1]:.4f}"
        console.print(
            line + ("" if accuracy is None else f" | train accuracy {accuracy:.4f}"), highlight=False
        )
        if writer is not None:
            writer.add_scalar("Training Loss", losses[0], epoch)
            writer.add_scalar("Validation Loss", losses[1], epoch)
            if accuracy is not None:
                writer.add_scalar("Accuracy", accuracy, epoch)

    def _cut(self, batch: list[Any]) -> list[Any]:
        return [x[: self.max_len] for x in batch]

    def _right(self, logits: Tensor, targets: list[Any]) -> int:
        best = logits.detach().argmax(-1).cpu().numpy()
        encode = self.model.embedder.encode
        return sum(int((row[: len(y)] == encode(y)).sum()) for row, y in zip(best, targets, strict=True))

    def _save(self, epoch: int) -> Path:
        size = len(self.train_dataset)
        return save_model_to_checkpoint(self.model, self.batch_size, size, self.folder, epoch)

    def _save_dataset(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, dataset in (("train", self.train_dataset), ("test", self.test_dataset)):
            with open(self.folder / f"dataset_{name}.txt", "w", encoding="utf-8") as file:
                for i in range(len(dataset)):
                    x = dataset[i][0]
                    file.write((x if isinstance(x, str) else " ".join(x)) + "\n")


def _batches(dataset: Any, size: int) -> Iterator[tuple[list[Any], list[Any]]]:
    """The batches of one pass, in an order drawn from torch's global generator."""
    order = torch.randperm(len(dataset))
    for start in range(0, len(order), size):
        items = [dataset[i] for i in order[start : start + size].tolist()]
        yield [x for x, _ in items], [y for _, y in items]


def _tensorboard() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(
            "documentation: got True, but there is no tensorboard: pip install 'spikedecoder[tensorboard]'"
        ) from None
    return SummaryWriter()


@contextlib.contextmanager
def _profiler(wanted: bool) -> Iterator[Any]:
    if not wanted:
        yield None
        return
    from torch.profiler import profile, schedule

    def report(p: Any) -> None:
        print(p.key_averages().table(sort_by="self_cpu_time_total", row_limit=10))

    with profile(schedule=schedule(wait=2, warmup=1, active=2, repeat=1), on_trace_ready=report) as p:
        yield p
