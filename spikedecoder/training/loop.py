"""The training loop."""

from __future__ import annotations

import contextlib
import hashlib
import math
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spikedecoder.activity import record
from spikedecoder.checkpoint import load_state
from spikedecoder.config import SpikeDecoderConfig
from spikedecoder.data import Corpus, WindowSampler, check_context, held_out_batches, ngram_bits
from spikedecoder.data.tokenizers import check_known
from spikedecoder.model import SpikeDecoder, check_model
from spikedecoder.nn.finite import not_finite
from spikedecoder.nn.norm import sync_norms
from spikedecoder.spike_stats import spiking_layers
from spikedecoder.training.checkpoints import (
    BEST,
    LAST,
    latest,
    load_checkpoint,
    publish,
    read_step,
    save_checkpoint,
)
from spikedecoder.training.config import TrainConfig
from spikedecoder.training.devices import make_accelerator, own_accelerate_state, own_modes, peak_rss_mib
from spikedecoder.training.evaluate import Evaluation, evaluate, health
from spikedecoder.training.graph import backward_of
from spikedecoder.training.memory import is_lack_of_memory, no_more_than_available
from spikedecoder.training.report import MetricsFile, Reporter, Several, TensorBoard
from spikedecoder.training.result import SavingError, TrainingError, TrainResult
from spikedecoder.training.run_folder import RunInfo, check_same, check_unused, locked, made
from spikedecoder.training.signals import Stop, stop_on_signals

_RECENT = 20  # the reported training loss is the mean of this many steps
_WATCHED = 2  # held-out windows on which neurons are recorded at an evaluation
_ONE = threading.RLock()  # one run at a time: it sets the process's generator, threads, limits and Accelerate


def train(
    config: SpikeDecoderConfig,
    corpus: Corpus,
    train_config: TrainConfig | None = None,
    *,
    out: str | Path,
    resume: bool = False,
    init: SpikeDecoder | None = None,
    reporter: Reporter | None = None,
    source: dict[str, Any] | None = None,
) -> TrainResult:
    """Train a model on a corpus, writing checkpoints and metrics into `out`.

    config: vocab_size and pad_id must be those of corpus.tokenizer.
    corpus: what `prepare_corpus` returns. With several processes, the same in each; they share its batches.
    train_config: None takes the defaults of `TrainConfig`.
    out: a new or empty folder; with `resume`, the folder of an earlier run of this config and corpus.
    resume: continue from the last checkpoint in `out`. On a CPU, with the same number of threads and
        processes, the result is bit for bit that of a run that never stopped.
    init: a model whose weights a new run starts from, instead of random ones, as for fine-tuning. The weights
        must fit `config`, and its tokenizer, if it has one, must be that of the corpus
        (`prepare_corpus(..., tokenizer=init.tokenizer)`). Not together with `resume`.
    reporter: receives progress, metrics and messages; None: nothing is reported.
    source: kept in run.json, for example to say where the text came from.

    On SIGINT or SIGTERM, or if the reporter's `asks_to_stop` returns True, the current step is finished, a
    checkpoint is saved, and the result is returned with `interrupted` set. A second signal acts at once.
    Everything random is a function of (seed, step), so a checkpoint needs no generator state. The generator
    belongs to the process: if another thread is training, the call waits until that run ends.

    Raises TypeError (an argument of the wrong type), ValueError (settings that contradict each other or the
    text), FileExistsError (`out` is in use), CheckpointError (nothing to resume, or a broken checkpoint),
    SavingError (such as a full disk; the last checkpoint stays whole), MemoryError (a step needs more memory
    than there is; on Linux raised before the system would kill the process), TrainingError (the loss, a
    gradient or a weight became NaN or infinite; the last checkpoint is not overwritten).
    """
    if not isinstance(corpus, Corpus):
        raise TypeError(f"corpus: got {type(corpus).__name__}, takes a Corpus, as prepare_corpus makes it")
    if not isinstance(config, SpikeDecoderConfig):
        raise TypeError(f"config: got {type(config).__name__}, takes a SpikeDecoderConfig")
    if not isinstance(train_config, TrainConfig | None):
        raise TypeError(f"train_config: got {type(train_config).__name__}, takes a TrainConfig or None")
    if not isinstance(reporter, Reporter | None):
        raise TypeError(f"reporter: got {type(reporter).__name__}, takes a Reporter or None")
    if init is not None:
        init = check_model(init)
        _check_init(init, corpus, resume)
    settings, out = train_config or TrainConfig(), Path(out)
    info = RunInfo.read(out) if resume else None
    if info is not None:
        check_same(out, info, config, settings, corpus.fingerprint)
        source = info.source if source is None else source
    _check(config, corpus, settings)
    with contextlib.ExitStack() as stack:
        if not _ONE.acquire(blocking=False):
            (reporter or Reporter()).message(f"{out}: waits for the run of another thread to end")
            _ONE.acquire()
        stack.callback(_ONE.release)
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        stack.enter_context(own_accelerate_state())
        accelerator = make_accelerator(settings, find_unused_parameters=not config.learn_positions)
        stack.enter_context(own_modes(accelerator.device))
        _check_shared(corpus, accelerator)
        threads = settings.threads or (info.threads if info else None)
        if threads is not None:
            torch.set_num_threads(threads)
        outputs: list[Reporter] = []
        if accelerator.is_main_process:
            if info is None:
                check_unused(out)
            outputs = [reporter or Reporter(), MetricsFile(out)]
            if settings.tensorboard:
                outputs.append(TensorBoard(out))
            stack.enter_context(made(out) if info is None else locked(out))
        accelerator.wait_for_everyone()
        cuda = [accelerator.device] if accelerator.device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        stop = stack.enter_context(stop_on_signals())
        report = Several(*outputs)
        stack.callback(report.close)
        if info is not None and info.processes != accelerator.num_processes:
            then, now = info.processes, accelerator.num_processes
            windows = settings.batch_size * settings.grad_accum
            report.message(
                f"warning: the run in {out} had {then} processes and has {now} now, so that a step takes "
                f"{windows * now} windows of text in place of {windows * then}"
            )
        if accelerator.device.type == "cpu":
            stack.enter_context(no_more_than_available())
        try:
            run = _Run(config, corpus, settings, out, accelerator, report, stop)
            if init is not None:
                run.begin_with(init)
            if info is not None:
                run.restore()
            if accelerator.is_main_process:
                threads, processes = torch.get_num_threads(), accelerator.num_processes
                RunInfo(config, settings, corpus.fingerprint, threads, processes, source or {}).write(out)
            return run.train()
        except (MemoryError, RuntimeError) as error:
            if not is_lack_of_memory(error):
                raise
            raise MemoryError(
                f"not enough memory on {accelerator.device} for steps of {settings.batch_size} x "
                f"{config.max_len} tokens ({_first_line(error)}); try a smaller --batch-size (--set "
                "grad_accum=N sums up the gradients of N batches), a smaller --max-len, or a smaller model"
                + ("" if config.neuron == "ilif" or settings.recompute else ", or --set recompute=true")
            ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _check(config: SpikeDecoderConfig, corpus: Corpus, settings: TrainConfig) -> None:
    check_known(corpus.tokenizer, "corpus.tokenizer")
    for name, ids in (("train", corpus.train), ("val", corpus.val)):
        if not isinstance(ids, np.ndarray):
            raise TypeError(f"corpus.{name}: got {type(ids).__name__}, takes a numpy array of token ids")
    for name in ("vocab_size", "pad_id"):
        got, takes = getattr(config, name), getattr(corpus.tokenizer, name)
        if got != takes:
            raise ValueError(f"{name}: got {got}, takes that of the text's tokenizer, {takes}")
    check_context(corpus, config.max_len)
    if config.norm == "power" and settings.mixed_precision == "fp16":
        raise ValueError(
            "mixed_precision: got 'fp16', takes 'no' or 'bf16' with norm = 'power', whose running gradient "
            "would be that of the scaled loss"
        )


def _check_init(init: SpikeDecoder, corpus: Corpus, resume: bool) -> None:
    if resume:
        raise ValueError("init: not together with resume, which goes on with the run's own weights")
    if init.tokenizer is not None and init.tokenizer != corpus.tokenizer:
        raise ValueError(
            "init: its tokenizer is another than the corpus'; encode the text with that, as "
            "prepare_corpus(..., tokenizer=init.tokenizer) does"
        )


def _check_shared(corpus: Corpus, accelerator: Any) -> None:
    if accelerator.num_processes == 1:
        return
    from accelerate.utils import gather_object

    found = gather_object([corpus.fingerprint])
    if len(set(found)) > 1:
        raise ValueError(
            f"corpus: got {len(set(found))} different ones in {len(found)} processes, takes the same one in "
            "each: they share its batches"
        )


class _Run:
    def __init__(
        self,
        config: SpikeDecoderConfig,
        corpus: Corpus,
        settings: TrainConfig,
        out: Path,
        accelerator: Any,
        report: Reporter,
        stop: Stop,
    ) -> None:
        self.c, self.corpus, self.out = settings, corpus, out
        self.accelerator, self.report, self.stop = accelerator, report, stop
        torch.manual_seed(settings.seed)
        self.model = SpikeDecoder(config)
        self.model.tokenizer = corpus.tokenizer
        self.model.to(accelerator.device).train()
        self.model.recompute_activations(settings.recompute)
        if settings.sync_norm and accelerator.num_processes > 1:
            sync_norms(self.model)
        self.optimizer = torch.optim.AdamW(
            self.model.parameter_groups(settings.weight_decay),
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            fused=accelerator.device.type in ("cpu", "cuda"),
        )
        loss: Any = _Loss(self.model)
        self.loss, self.stepper = accelerator.prepare(
            torch.compile(loss) if settings.compile else loss, self.optimizer
        )
        self.backward = backward_of(self.loss, settings, accelerator)
        processes = accelerator.num_processes
        self.sampler = WindowSampler(
            corpus.train,
            config.max_len,
            settings.batch_size,
            settings.seed,
            accelerator.process_index,
            processes,
        )
        self.step_tokens = config.max_len * settings.batch_size * settings.grad_accum * processes
        self.on_cpu = accelerator.device.type == "cpu"

        self.step = 0
        self.saved = -1  # step of the last checkpoint, or -1 if an evaluation has been made since
        self.recent: deque[float] = deque(maxlen=max(_RECENT, min(settings.log_every, settings.steps)))
        self.norm = math.nan  # of the last gradient
        self.evaluation: Evaluation | None = None
        self.evaluated = -1  # step of `evaluation`
        self.best: dict[str, float] = {}
        self.warnings: list[str] = []
        self.pending: list[tuple[int, Tensor, Tensor]] = []  # step, loss and gradient norm, still unread
        self.seconds, self.steps_here = 0.0, 0

    def train(self) -> TrainResult:
        c = self.c
        baselines = self._baselines()
        self.report.start(self.step, c.steps, baselines)
        interrupted = self._evaluate_if_due()
        while not interrupted and self.step < c.steps:
            self._train_step()
            if self.report.asks_to_stop():
                self.stop.requested = self.stop.requested or "reporter"
            interrupted = self._agree(self.stop.requested)
            if self._due(c.log_every):  # before the evaluation: a run resumed from its checkpoint needs it
                self._log()
            interrupted = interrupted or self._evaluate_if_due()
            if self._due(c.save_every):
                self._save()
        self._save()
        return TrainResult(
            steps=c.steps,
            step=self.step,
            train_loss=self._mean_loss(_RECENT),
            tokens_per_second=self._speed(),
            evaluation=self.evaluation,
            evaluated_step=self.evaluated if self.evaluation else None,
            best=self.best,
            baselines=baselines,
            unknown=self.corpus.unknown,
            warnings=self.warnings,
            peak_rss_mib=peak_rss_mib(),
            checkpoint=self.out / LAST,
            out=self.out,
            model=self.model.eval(),
            interrupted=(self.stop.requested or "SIGINT") if interrupted else None,
        )

    def _due(self, every: int) -> bool:
        return self.step == self.c.steps or (every > 0 and self.step > 0 and self.step % every == 0)

    def _train_step(self) -> None:
        c, start = self.c, time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = c.lr_at(self.step)
        total = norm = torch.zeros((), device=self.accelerator.device)
        for index in range(self.step * c.grad_accum, (self.step + 1) * c.grad_accum):
            inputs, targets = self.sampler.batch(index)
            torch.manual_seed(_dropout_seed(c.seed, index, self.accelerator.process_index))
            with self.accelerator.accumulate(self.loss):
                loss = self.backward(self._on_device(inputs), self._on_device(targets))
                total = total + loss.float() / c.grad_accum
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(self.model.parameters(), c.clip or math.inf)
                    if self.on_cpu:
                        self._check_finite(self.step + 1, float(total), float(norm))
                self.stepper.step()
                self.stepper.zero_grad()
        self.step += 1
        self.pending.append((self.step, total, norm))
        self.seconds += time.perf_counter() - start
        self.steps_here += 1
        self.report.tick(self.step, float(total) if self.on_cpu else None, self._speed())

    def _on_device(self, tokens: Tensor) -> Tensor:
        """Copies from pinned memory, so that the host does not wait for the previous step."""
        device = self.accelerator.device
        if device.type == "cuda":
            return tokens.pin_memory().to(device, non_blocking=True)
        return tokens.to(device)

    def _read_losses(self) -> None:
        """Fetch and check the losses since the last call; waits for the device."""
        if not self.pending:
            return
        start = time.perf_counter()
        losses = self.accelerator.reduce(torch.stack([loss for _, loss, _ in self.pending]), "mean").tolist()
        norms = torch.stack([norm for _, _, norm in self.pending]).tolist()
        self.seconds += time.perf_counter() - start
        for (step, _, _), loss, norm in zip(self.pending, losses, norms, strict=True):
            self._check_finite(step, loss, norm)
        self.pending.clear()
        self.recent.extend(losses)
        self.norm = norms[-1]

    def _log(self) -> None:
        self._read_losses()
        self.report.step(
            self.step,
            {
                "loss": self._mean_loss(self.c.log_every),
                "lr": self.c.lr_at(self.step - 1),
                "grad_norm": self.norm,
                "tokens_per_second": self._speed(),
            },
        )

    def _check_finite(self, step: int, loss: float, norm: float) -> None:
        # with fp16, loss scaling occasionally makes gradients infinite and then skips the step
        if math.isfinite(loss) and (math.isfinite(norm) or self.c.mixed_precision == "fp16"):
            return
        what = f"the gradient's norm became {norm}" if math.isfinite(loss) else f"the loss became {loss}"
        raise self._failed(f"{what} in step {step}")

    def _failed(self, what: str) -> TrainingError:
        c, mixed = self.c, self.c.mixed_precision
        if latest(self.out):
            where = f": --init {self.out} --text ... --out NEW --lr ... begins a new run with its weights"
        else:
            where = f", in another folder (--out) or after deleting {self.out}"
        return TrainingError(
            f"{what}, so the run stops; {self._kept()}. Try a lower --lr (now {c.lr:g}), "
            f"a longer warmup (now {c.warmup} steps), "
            + (f"a smaller clip (now {c.clip:g})" if c.clip else "clip=1 (now off)")
            + ("" if mixed == "no" else f", or --set mixed_precision=no (now {mixed})")
            + where
        )

    def _evaluate_if_due(self) -> bool:
        """Evaluate if it is due and not yet done at this step; True if a signal interrupted it."""
        if not self._due(self.c.eval_every) or self.evaluated == self.step:
            return False
        self._read_losses()
        alone = self.accelerator.num_processes == 1
        if not alone:  # running statistics differ by process; a checkpoint holds those of the first
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, 0)
        evaluation = evaluate(
            self.model,
            self.corpus.val,
            batch_size=self.c.batch_size,
            max_tokens=self.c.eval_tokens,
            accelerator=self.accelerator,
            stop=(lambda: self.stop.requested is not None) if alone else lambda: False,
        )
        if evaluation is None:
            return True
        if not math.isfinite(evaluation.loss):
            raise self._failed(f"the held-out loss became {evaluation.loss} after step {self.step}")
        self.evaluation, self.evaluated, self.saved = evaluation, self.step, -1
        self.report.evaluated(self.step, evaluation)
        self._check_weights()
        self._watch()
        known, self.warnings = self.warnings, health(evaluation, self.model.config)
        for warning in self.warnings:
            if warning not in known:
                self.report.message(f"warning: {warning}")
        if evaluation.loss < self.best.get("val_loss", math.inf):
            self.best = {
                "step": self.step,
                "val_loss": evaluation.loss,
                "val_bits_per_token": evaluation.bits,
            }
            self._save(BEST)
        return False

    def _check_weights(self) -> None:
        if names := not_finite(self.model):
            raise self._failed(f"weights ({names[0]}) became infinite or NaN in step {self.step}")

    def _watch(self) -> None:
        """Record the neurons on the first held-out windows, if a reporter wants their activity."""
        if not self.report.wants_activity or not any(spiking_layers(self.model)):
            return
        c, pad = self.model.config, self.model.config.pad_id or 0
        tokens, _ = next(held_out_batches(self.corpus.val, c.max_len, _WATCHED, pad_id=pad))
        self.report.activity(self.step, record(self.model, tokens, potentials=True))

    def _save(self, *names: str) -> None:
        """Write a checkpoint of this step, unless there is one, and point "last" and `names` to it."""
        if self.saved == self.step:
            return
        self._read_losses()
        self._check_weights()
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = {
                "recent_losses": list(self.recent),
                "best": self.best,
                "evaluated": self.evaluated,
                "evaluation": self.evaluation.to_dict() if self.evaluation else None,
                "warnings": self.warnings,
                "scaler": scaler.state_dict() if scaler is not None else None,
            }
            try:
                folder = save_checkpoint(self.out, self.step, self.model, self.optimizer, state)
                publish(self.out, folder, (LAST, *names))
            except OSError as error:
                raise SavingError(
                    f"cannot save the checkpoint of step {self.step} ({error}); {self._kept()}. When that is "
                    f"mended, go on with --resume {self.out}"
                ) from error
        self.accelerator.wait_for_everyone()
        self.saved = self.step

    def begin_with(self, model: SpikeDecoder) -> None:
        """Copy the model's weights and save them as the first checkpoint; resuming then needs no `model`."""
        dtypes = {name: tensor.dtype for name, tensor in self.model.state_dict().items()}
        weights = {name: t.detach().to("cpu", dtypes.get(name)) for name, t in model.state_dict().items()}
        load_state(self.model, weights, "init")
        self._save()

    def restore(self) -> None:
        """Load the last checkpoint, if there is one yet."""
        folder = latest(self.out)
        if folder is None:
            self.report.message(f"{self.out}: the run has no checkpoint yet; it starts again")
            return
        state = load_checkpoint(folder, self.model, self.optimizer)
        if state["step"] > self.c.steps:
            raise ValueError(f"steps: got {self.c.steps}, but the run in {self.out} has done {state['step']}")
        self.step = self.saved = state["step"]
        self.recent.extend(state["recent_losses"])
        self.warnings = state["warnings"]
        evaluation = Evaluation(**state["evaluation"]) if state["evaluation"] else None
        now = np.count_nonzero(self._held_out()[1:] != self.model.config.pad_id)
        if evaluation is None or evaluation.tokens == now:
            self.best, self.evaluated, self.evaluation = state["best"], state["evaluated"], evaluation
            if self.accelerator.is_main_process and self.best.get("step") == self.step:
                publish(self.out, folder, (BEST,))  # a kill may have come between the two links
        else:
            self.report.message(
                f"evaluations predict {now:,} held-out tokens now, {evaluation.tokens:,} before: the best "
                "model is looked for anew"
            )
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def _kept(self) -> str:
        folder = latest(self.out)
        if folder is None:
            return "no checkpoint was written yet"
        return f"{self.out / LAST} holds step {read_step(folder)}"

    def _held_out(self) -> np.ndarray:
        """The tokens that an evaluation reads; it predicts all but the first."""
        return self.corpus.val if self.c.eval_tokens is None else self.corpus.val[: self.c.eval_tokens + 1]

    def _baselines(self) -> dict[str, float]:
        if not self.accelerator.is_main_process:
            return {}
        return ngram_bits(self.corpus.train, self._held_out(), self.corpus.tokenizer.vocab_size)

    def _mean_loss(self, steps: int) -> float:
        last = list(self.recent)[-steps:]
        return sum(last) / len(last) if last else math.nan

    def _speed(self) -> float:
        return self.step_tokens * self.steps_here / self.seconds if self.seconds else 0.0

    def _agree(self, requested: str | None) -> bool:
        """Whether any process was asked to stop."""
        if self.accelerator.num_processes == 1:
            return requested is not None
        asked = torch.tensor(float(requested is not None), device=self.accelerator.device)
        return float(self.accelerator.reduce(asked, "sum")) > 0


class _Loss(nn.Module):
    """The loss as a forward pass, because that is what data parallelism and autocast wrap."""

    def __init__(self, model: SpikeDecoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return self.model.loss(tokens, targets)


def _dropout_seed(seed: int, index: int, process: int) -> int:
    digest = hashlib.sha256(f"{seed}/{index}/{process}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
