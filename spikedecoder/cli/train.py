"""``spikedecoder train``: train a model on a text."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spikedecoder.presets import PRESETS

if TYPE_CHECKING:
    from spikedecoder.cli.settings import Overrides
    from spikedecoder.config import SpikeDecoderConfig
    from spikedecoder.data import Corpus, Tokenizer
    from spikedecoder.model import SpikeDecoder
    from spikedecoder.training import TrainConfig, TrainResult

_MODEL, _TRAINING, _TEXT = "Model", "Training", "Text"


def train(
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            help="Text file to learn; repeatable (joined; the end is held out); - is standard input.",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    corpus: Annotated[
        str | None,
        typer.Option(
            help="builtin (Python's own documentation), or war-and-peace (downloaded once).",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="char (every alphabet), word, original-char or original-word (a to z).",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    min_count: Annotated[
        int | None, typer.Option(help="Words seen less often are unknown.", rich_help_panel=_TEXT)
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help=f"One of {', '.join(PRESETS)}.", rich_help_panel=_MODEL),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="TOML file with tables model and train, and perhaps a key preset."),
    ] = None,
    print_config: Annotated[
        bool,
        typer.Option(
            "--print-config", help="Print all settings, explained, as a file for --config, and exit."
        ),
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="New folder for checkpoints and metrics; default: runs/PRESET-TEXT-N.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with the run in this folder, from its last checkpoint.")
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            help="Fine-tune this model (a folder, a run, or a name on the hub): begin with its weights, "
            "shape and vocabulary, and the settings of its run.",
        ),
    ] = None,
    max_steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="Steps in all; the schedule is stretched to them.", rich_help_panel=_TRAINING
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Of weights, batches and dropout.", rich_help_panel=_TRAINING),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps.", rich_help_panel=_TRAINING)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Windows per step and process.", rich_help_panel=_TRAINING)
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Highest learning rate.", rich_help_panel=_TRAINING)
    ] = None,
    eval_every: Annotated[
        int | None, typer.Option(help="Steps between evaluations; 0: at the end.", rich_help_panel=_TRAINING)
    ] = None,
    save_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints; 0: at the end.", rich_help_panel=_TRAINING)
    ] = None,
    mixed_precision: Annotated[
        str | None, typer.Option(help="no, bf16 or fp16.", rich_help_panel=_TRAINING)
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of torch.", rich_help_panel=_TRAINING)
    ] = None,
    tensorboard: Annotated[
        bool | None,
        typer.Option(
            "--tensorboard/--no-tensorboard", help="Also write OUT/tensorboard.", rich_help_panel=_TRAINING
        ),
    ] = None,
    spike_degree: Annotated[
        int | None, typer.Option(help="0 (no spikes) to 4 (all).", rich_help_panel=_MODEL)
    ] = None,
    timesteps: Annotated[
        int | None, typer.Option(help="Timesteps of LIF neurons.", rich_help_panel=_MODEL)
    ] = None,
    neuron: Annotated[str | None, typer.Option(help="lif or ilif.", rich_help_panel=_MODEL)] = None,
    levels: Annotated[
        int | None, typer.Option(help="Largest integer of ilif neurons.", rich_help_panel=_MODEL)
    ] = None,
    blocks: Annotated[int | None, typer.Option(help="Decoder blocks.", rich_help_panel=_MODEL)] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads.", rich_help_panel=_MODEL)] = None,
    max_len: Annotated[int | None, typer.Option(help="Context, in tokens.", rich_help_panel=_MODEL)] = None,
    norm: Annotated[str | None, typer.Option(help="layer, batch or power.", rich_help_panel=_MODEL)] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Any other field of the model or the training; repeatable."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Result as a JSON object, the last line of standard output.")
    ] = False,
) -> None:
    """Train a spiking decoder on a text, then print some text that it writes.

    Without arguments: the default model on text that comes with Python, a few minutes on a laptop.
    Ctrl-C saves a checkpoint and says how to go on.

    Exit code: 0 done, 1 the training failed, 2 wrong input, 130 interrupted.
    """
    from spikedecoder.cli.settings import collect, to_toml

    flags: dict[str, Any] = {
        "tokenizer": tokenizer,
        "min_count": min_count,
        "steps": max_steps,
        "seed": seed,
        "device": device,
        "batch_size": batch_size,
        "lr": lr,
        "eval_every": eval_every,
        "save_every": save_every,
        "mixed_precision": mixed_precision,
        "threads": threads,
        "tensorboard": tensorboard,
        "spike_degree": spike_degree,
        "timesteps": timesteps,
        "neuron": neuron,
        "levels": levels,
        "blocks": blocks,
        "heads": heads,
        "max_len": max_len,
        "norm": norm,
    }
    if text and "-" in text and _processes() > 1:
        raise ValueError(
            "--text: got -, takes files where several processes train: they would part the input"
        )
    if text and corpus:
        raise ValueError("--text and --corpus: got both, takes one of them")
    overrides = collect(config, flags, set_ or [])
    if resume is not None:
        others = {"--preset": preset, "--config": config, "--out": out, "--corpus": corpus, "--init": init}
        for name, given in {**others, "--print-config": print_config or None}.items():
            if given is not None:
                raise ValueError(f"{name}: not together with --resume, which goes on with the run as it is")
        result = _resume(resume, overrides, text, as_json)
    else:
        preset = preset or overrides.preset
        for name, chosen in {"--preset": preset, "--print-config": print_config}.items():
            if init is not None and chosen:
                raise ValueError(f"{name}: not together with --init, whose model and settings are its own")
        preset = preset or "default"
        if print_config:
            sys.stdout.write(to_toml(preset, overrides))
            return
        result = _new(preset, init, overrides, text, corpus, out, as_json)
    if _first_process():
        _finish(result, as_json)
    if result.interrupted:
        raise typer.Exit(130)


def _new(
    preset: str,
    init: str | None,
    overrides: Overrides,
    text: list[str] | None,
    corpus: str | None,
    out: Path | None,
    as_json: bool,
) -> TrainResult:
    """Train a new run: of a preset, or one that starts from the model `init`."""
    from spikedecoder import training
    from spikedecoder.cli.settings import model_config
    from spikedecoder.config import SpikeDecoderConfig
    from spikedecoder.data import prepare_corpus
    from spikedecoder.training.devices import check_device
    from spikedecoder.training.run_folder import check_unused

    # first check what can be checked without reading the text
    if init is None:
        SpikeDecoderConfig.preset(preset)
        begin, settings = None, training.TrainConfig.preset(preset, **overrides.train)
    else:
        begin, settings = _begin(init, overrides.train)
    check_device(settings.device)
    if overrides.train.get("min_count", 1) > 1 and settings.tokenizer not in ("word", "original-word"):
        raise ValueError(
            f"min_count: got {settings.min_count}, takes --tokenizer word or original-word with it: "
            "it counts words"
        )
    if out is not None and _first_process():
        check_unused(out)
    data = prepare_corpus(
        text,
        corpus=corpus,
        tokenizer=settings.tokenizer if begin is None else begin.tokenizer,
        min_count=settings.min_count,
        val_fraction=settings.val_fraction,
    )
    if begin is None:
        config = model_config(preset, overrides.model, data.tokenizer)
    else:
        config = begin.config.replace(**overrides.model)
    _use_threads(settings.threads)
    source = {
        "preset": preset if init is None else None,
        "text": [_absolute(path) for path in text] if text else None,
        "corpus": corpus,
        "init": init,
    }
    while True:
        folder = out or training.free_folder(preset if init is None else "fine-tuned", data.name)
        begins = [f"begins with the weights of {init}"] if init else []
        reporter = training.ScreenReporter(not as_json, begins + _heading(config, data, settings, folder))
        try:
            return training.train(
                config, data, settings, out=folder, init=begin, reporter=reporter, source=source
            )
        except FileExistsError:
            # another process may have taken the free folder a moment ago: then try the next one
            if out is not None or _processes() > 1 or not folder.exists():
                raise


def _begin(where: str, changes: dict[str, Any]) -> tuple[SpikeDecoder, TrainConfig]:
    """The model to fine-tune, and the settings of its run (without a run, those of the default preset)."""
    from spikedecoder import SpikeDecoder, training
    from spikedecoder.checkpoint import CheckpointError

    for name in ("tokenizer", "min_count"):
        if name in changes:
            raise ValueError(f"{name}: not together with --init, whose model keeps its vocabulary")
    model = SpikeDecoder.from_pretrained(where)
    if model.tokenizer is None:
        raise ValueError(f"--init: the model in {where} has no tokenizer to read a text with")
    try:
        settings = training.RunInfo.read(Path(where)).train
    except CheckpointError:  # a model alone
        settings = training.TrainConfig.preset("default")
    return model, settings.replace(**{"tokenizer": model.tokenizer.kind, "min_count": 1, **changes})


def _resume(folder: Path, overrides: Overrides, text: list[str] | None, as_json: bool) -> TrainResult:
    from spikedecoder import training
    from spikedecoder.checkpoint import TOKENIZER
    from spikedecoder.data import prepare_corpus
    from spikedecoder.data.tokenizers import load_tokenizer
    from spikedecoder.training.checkpoints import latest, read_step

    info = training.RunInfo.read(folder)
    config = info.config.replace(**overrides.model)
    settings = info.train.replace(**overrides.train)
    texts = text or info.source.get("text")
    if texts and "-" in texts and not text:
        raise ValueError(f"--text: the run in {folder} read a pipe; give it the text again, as with --text -")
    source = info.source
    if text:  # perhaps in another place, but the same text, as its fingerprint will show
        source = {**source, "text": [_absolute(path) for path in text], "corpus": None}
    last = latest(folder)  # None if the run ended before its first checkpoint
    fine_tuned = info.source.get("init") is not None  # its first checkpoint is written before its run.json
    data = prepare_corpus(
        texts,
        corpus=None if texts else info.source.get("corpus"),
        tokenizer=load_tokenizer(last / TOKENIZER) if last and fine_tuned else settings.tokenizer,
        min_count=settings.min_count,
        val_fraction=settings.val_fraction,
    )
    if not (info.source or text) and data.fingerprint != info.fingerprint:
        raise ValueError(
            f"--text: the run in {folder} was begun from Python and does not say where its text is; give it, "
            "as with --text book.txt"
        )
    _use_threads(settings.threads or info.threads)
    heading = f"going on with the run in {folder}"
    if last is not None and read_step(last) == settings.steps:
        heading = f"the run in {folder} has done its {settings.steps} steps; --max-steps N trains longer"
    reporter = training.ScreenReporter(not as_json, [heading])
    return training.train(config, data, settings, out=folder, resume=True, reporter=reporter, source=source)


def _first_process() -> bool:
    """Whether this is the process that reports, if a launcher has started several."""
    return os.environ.get("RANK", "0") == "0"


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _use_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _heading(config: SpikeDecoderConfig, data: Corpus, settings: TrainConfig, folder: Path) -> list[str]:
    unknown = f"{_unknown(data.tokenizer)}: {data.unknown:.1%} of the held-out tokens, all of them one token"
    kind = "binary " if config.neuron == "ilif" else ""
    return [
        f"text: {data.name}, {data.characters:,} characters, {len(data.train):,} tokens to learn and "
        f"{len(data.val):,} held out, a vocabulary of {data.tokenizer.vocab_size}",
        *([data.left_out] if data.lost else []),
        *([unknown] if data.unknown else []),
        f"model: {config.blocks} blocks, {config.embed_dim} channels, {config.heads} heads, "
        + (f"{config.binary_timesteps} {kind}timesteps, " if config.spike_degree else "")
        + f"spike degree {config.spike_degree}; {settings.steps} steps of "
        f"{settings.batch_size * settings.grad_accum * _processes()} x {config.max_len} tokens; "
        f"output in {folder}",
    ]


def _unknown(tokenizer: Tokenizer) -> str:
    return "unknown words" if "word" in tokenizer.kind else "unknown characters"


def _finish(result: TrainResult, as_json: bool) -> None:
    from spikedecoder.training import ScreenReporter

    report = ScreenReporter(bar=False)
    values = result.to_dict()
    if result.interrupted:
        report.message(
            f"{result.interrupted}: stopped after step {result.step} of {result.steps} and saved; go on "
            f"with: spikedecoder train --resume {shlex.quote(str(result.out))}"
        )
    elif result.evaluation is not None:
        bits = ", ".join(f"{name} {value:.3f}" for name, value in result.baselines.items())
        report.message(
            f"held-out: {result.evaluation.bits:.3f} bits per token, accuracy "
            f"{result.evaluation.accuracy:.1%} ({result.evaluation.covers}"
            + (f", {result.unknown:.1%} of them {_unknown(result.model.tokenizer)}" if result.unknown else "")
            + "); "
            f"n-gram models of the same text: {bits}"
        )
        speed = f"{result.tokens_per_second:,.0f} tokens/s, " if result.tokens_per_second else ""
        report.message(f"{speed}peak memory {result.peak_rss_mib:,.0f} MiB; checkpoint: {result.checkpoint}")
        values["sample"] = _sample(result)
        if not as_json:
            from spikedecoder.cli.generate import _print

            _print(values["sample"] + "\n")
    if as_json:
        print(json.dumps(values))
    sys.stdout.flush()


def _sample(result: TrainResult, length: int = 200) -> str:
    """What the model writes after "The ", or from nothing if it does not know those characters."""
    from spikedecoder.generation import generate_text

    prompt = "" if result.model.tokenizer.unknown("The ") else "The "
    options: dict[str, Any] = {"temperature": 0.8, "seed": 0}
    return generate_text(result.model, None, [prompt], max_new_tokens=length, **options)[0]


def _absolute(path: str) -> str:
    """The path at which a text can be found again; - for a stream, which cannot."""
    if path == "-" or (Path(path).exists() and not Path(path).is_file()):
        return "-"
    return str(Path(path).resolve())
