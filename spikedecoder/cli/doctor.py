"""``spikedecoder doctor``: what this machine has, and which backend computes each operator here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
from pathlib import Path
from typing import Annotated, Any

import typer

# what each optional package is needed for, and how to install it
_OPTIONAL = {
    "triton": ("the Triton kernels", "pip install triton"),
    "tensorboard": ("train --tensorboard", "pip install 'spikedecoder[tensorboard]'"),
    "matplotlib": ("plots", "pip install 'spikedecoder[viz]'"),
    "gradio": ("the web app", "pip install 'spikedecoder[app]'"),
    "optuna": ("sweeps", "pip install 'spikedecoder[sweep]'"),
    "fastapi": ("serving", "pip install 'spikedecoder[serve]'"),
}
# how to get a missing compiler or CUDA toolkit, by `platform.system()`
_COMPILERS = {
    "Linux": "apt install g++ (Debian, Ubuntu), or dnf install gcc-c++ (Fedora)",
    "Darwin": "xcode-select --install",
    "Windows": "they need GCC or Clang under Linux: wsl --install, and all of this in there",
}
_TOOLKITS = {
    "Linux": "conda install -c nvidia cuda-toolkit, or https://developer.nvidia.com/cuda-downloads; an nvcc "
    "elsewhere is named by CUDACXX or CUDA_HOME",
    "Darwin": "there is no CUDA for macOS",
    "Windows": "wsl --install, and all of this in there",
}
_SHAPES = {"spike_attention": (4, 1, 4, 128, 24), "spike_attention_lif": (4, 1, 4, 128, 24)}
_SHAPE = (4, 1, 128, 96)


def doctor(
    checkpoint: Annotated[
        str | None,
        typer.Option(
            "--checkpoint",
            "-c",
            help="Examine this model instead: a model's folder, a run's (its best model), or a hub name.",
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option("--text", help="With --checkpoint: text for it to read. Default: the built-in text."),
    ] = None,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print one line: a JSON object with all of it.")
    ] = False,
) -> None:
    """Show what this machine has, which backend computes each operator here, and why.

    "works" means tried: it runs a small training step and compares the C++ kernels with the reference.
    With --checkpoint, show instead what is wrong with a model, and what to change:
    layers that are dead or saturated, gradients that vanish, thresholds that drift.

    Exit code: 0 all works, 1 the training step fails or kernels differ, 2 wrong input.
    """
    if checkpoint is not None:
        from spikedecoder.cli.diagnosis import examine_checkpoint

        examine_checkpoint(checkpoint, text, json_output)
        return
    if text is not None:
        raise ValueError("--text: got a text without --checkpoint, takes both or neither")
    report = examine()
    if json_output:
        print(json.dumps(report))
    else:
        _show(report)
    if not report["training_step"]["works"] or report["kernels"]["differ"]:
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """All that `doctor` prints, as data."""
    import torch

    import spikedecoder
    from spikedecoder import ext
    from spikedecoder.ops import _dispatch

    devices = ["cpu"]
    if torch.cuda.is_available():
        devices += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    names = {"cpu": platform.processor() or platform.machine()}
    names.update({d: torch.cuda.get_device_name(d) for d in devices if d != "cpu"})
    operators: dict[str, dict[str, dict[str, str]]] = {}
    for device in dict.fromkeys(d.partition(":")[0] for d in devices):
        operators[device] = {
            name: dict(
                _dispatch.explain(
                    name,
                    _dispatch.Call(torch.device(device), torch.float32, _SHAPES.get(name, _SHAPE)),
                )
            )
            for name in _dispatch.OPERATORS
        }
    tools = {"compiler": _look_for("compiler"), "nvcc": _look_for("nvcc")}
    extension = ext.info()
    return {
        "spikedecoder": spikedecoder.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(),
        "devices": names,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        **{tool: path for tool, (path, _) in tools.items()},
        "mend": {tool: mend for tool, (_, mend) in tools.items() if mend is not None},
        "requested_backend": _dispatch.requested_backend(),
        "operators": operators,
        "extension": extension,
        "kernels": _compare() if extension["cpu"].get("stale") is False else {"agree": 0, "differ": []},
        "optional": {name: _version(name) for name in _OPTIONAL},
        "training_step": _try_step(),
    }


def _look_for(tool: str) -> tuple[str | None, str | None]:
    """The path of the program that setup.py would use; if there is none, None and how to get it."""
    from spikedecoder.ext import _programs

    find, commands = {
        "compiler": (_programs.find_compiler, _COMPILERS),
        "nvcc": (_programs.find_nvcc, _TOOLKITS),
    }[tool]
    try:
        path = find()
    except ValueError as error:
        return None, f"{error}; name another, or unset it"
    return path, None if path else commands.get(platform.system(), commands["Linux"])


def _compare() -> dict[str, Any]:
    """Compare the C++ kernels and their gradients with the reference: how many cases agree, which differ."""
    import torch

    from spikedecoder.ops import BackendError, use_backend
    from spikedecoder.testing import cases, flipped, make_inputs, run

    agree, differ = 0, []
    for case in cases():
        try:
            with use_backend("cpu"):
                found = run(case, make_inputs(case))
        except BackendError:  # there is no C++ kernel for it
            continue
        with use_backend("reference"):
            expected = run(case, make_inputs(case))
        moved = flipped(found["out"], expected["out"]) if case.operator.endswith("lif") else 0.0
        if moved == 0 or case.exact:
            same = all(torch.allclose(found[k], expected[k], rtol=1e-3, atol=1e-3) for k in expected)
        else:  # a sum in another order may flip a spike, and change gradients with it
            same = moved < 5e-3
        agree += same
        differ += [] if same else [str(case)]
    return {"agree": agree, "differ": differ}


def _try_step() -> dict[str, Any]:
    """Forward and backward of a very small model on the CPU."""
    import torch

    from spikedecoder import SpikeDecoder, SpikeDecoderConfig

    config = SpikeDecoderConfig.preset(
        "default-lif", vocab_size=8, max_len=8, token_dim=12, position_dim=4, blocks=1, timesteps=2
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = SpikeDecoder(config)
            tokens = torch.randint(0, 8, (2, 8))
        loss = model.loss(tokens, tokens)
        loss.backward()
        weight = model.head.linear.weight
        assert weight.grad is not None and bool(weight.grad.isfinite().all())
    except Exception as error:  # to report what is wrong is what this command is for
        return {"works": False, "error": f"{type(error).__name__}: {error}"}
    return {"works": True, "loss": float(loss.detach())}


def _part(info: dict[str, Any]) -> str:
    """One part of the extension in a line: how it was built, and how to fix it."""
    words = {
        "compiler": "built by {}",
        "variant": "running {}",
        "variants": "of {}",
        "vendor": "CPU by {}",
        "features": "CPU has {}",
        "openmp": "OpenMP {}",
        "threads": "{} threads",
        "architectures": "for {}",
        "asked": "built with SPIKEDECODER_BUILD={}",
    }
    said = []
    for key, text in words.items():
        value = info.get(key)
        if value is not None:
            said.append(
                text.format(", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value)
            )
    if "mend" in info:
        said.append(info["mend"])
    return "; ".join(said)


def _version(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(
        f"spikedecoder {report['spikedecoder']}, Python {report['python']}, torch {report['torch']}, "
        f"{report['system']}"
    )
    for device, name in report["devices"].items():
        extra = f", {report['threads']} threads, {report['cpu_capability']}" if device == "cpu" else ""
        console.print(f"{device}: {name}{extra}")
    console.print(f"backend asked for: {report['requested_backend']} (use_backend, or SPIKEDECODER_BACKEND)")
    for device, operators in report["operators"].items():
        table = Table(title=f"operators on {device}", title_justify="left")
        table.add_column("operator", no_wrap=True)
        table.add_column("backend", no_wrap=True)
        table.add_column("others")
        for name, rows in operators.items():
            chosen = next((b for b, reason in rows.items() if reason == "chosen"), "none")
            others = "; ".join(f"{b}: {reason}" for b, reason in rows.items() if b != chosen)
            table.add_row(name, chosen, others)
        console.print(table)
    for part, title in (("cpu", "C++ kernels"), ("cuda", "CUDA kernels")):
        console.print(f"{title}: {_part(report['extension'][part])}", markup=False)
    for tool, part, kernels in (("compiler", "cpu", "C++ kernels"), ("nvcc", "cuda", "CUDA kernels")):
        anew = ", which are there, anew" if report["extension"][part]["built"] else ""
        missing = f"none found; needed to build the {kernels}{anew}: {report['mend'].get(tool)}"
        console.print(f"{tool}: {report[tool] or missing}", markup=False)
    for package, (use, command) in _OPTIONAL.items():
        version = report["optional"][package]
        console.print(f"{package}: {version or f'not installed; needed for {use}: {command}'}", markup=False)
    agree, differ = report["kernels"]["agree"], report["kernels"]["differ"]
    if differ:
        console.print(f"C++ kernels that differ from the reference: {', '.join(differ)}", markup=False)
    elif agree:
        console.print(f"C++ kernels beside the reference: {agree} cases agree")
    step = report["training_step"]
    console.print(
        f"a training step of a small model: {'works' if step['works'] else step['error']}", markup=False
    )
