"""The whole GPU run in one call, within ten minutes: environment, build, parity, benchmarks, profiles.

    python bench/gpu.py --out results/gpu                # on a machine with a GPU
    python bench/gpu.py --out /tmp/gpu --dry-run         # on any machine: the same stages, tiny, interpreted

Each stage runs one or more processes side by side under a time limit of its own. If one fails or runs out of
time, that is noted and the next stage begins. At the limit it is interrupted, as by Ctrl-C, so that it can
still write what it has. Everything is written under --out: results.json, results.md, a log of each process,
how each stage ended (stage-NAME.json), traces, and, if matplotlib is installed, a roofline. The exit status
is 0 if every process succeeded.

The package has to be installed; where nothing can be downloaded, on top of an image's own torch and triton.
The stage `build` builds the CUDA extension in place if there is nvcc, unless a ready-made one is there
(`gpu_build.py`). To bring one ready-made, build it for the Python and the GPU architecture of the machine
that will run it, here 3.12 and 90 (that Python needs setuptools and pybind11; cmake, ninja and nvcc must be
on the PATH):

    SPIKEDECODER_BUILD=cuda SPIKEDECODER_CUDA_ARCHS=90 python3.12 setup.py build_ext --inplace

and copy the files that git ignores along with the checkout: spikedecoder/_C.cpython-312-x86_64-linux-gnu.so
and spikedecoder/_C_cuda.cpython-312-x86_64-linux-gnu.so. Then run there, in the root of the checkout (both
commands together take at most ten minutes):

    SPIKEDECODER_BUILD=off python3 -m pip install -q --no-deps --no-build-isolation -e . \\
        && python3 bench/gpu.py --out /tmp/gpu --limit 555

A second call with --only operators-compiled measures the rows for which there was no time. Calls into one
folder add up: its results hold the stages of all of them, and one that is run again replaces its own. If each
call had a folder of its own, copy all files into one, those of later calls over those of earlier ones, and

    python bench/gpu.py --out FOLDER --redraw

From the results, `python bench/gpu_crossover.py FOLDER/results.json` writes the table that `auto` reads.

Peers are measured where they can be imported: spikingjelly (needs loguru), fla-core (needs einops).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import gpu_crossover

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TOTAL = 580.0  # seconds of the whole run
GRACE = 5.0  # seconds of these that a process has to end after it was interrupted
# seconds of each; those without results so far come first. "compiled": the compiled references of all others
OPERATORS = {
    "rates": 75, "elements": 30, "spike_attention": 60, "lif": 85, "norm_lif": 70, "spike_linear": 25,
    "linear_norm_lif": 20, "compiled": 200,
}  # fmt: skip

_ENVIRONMENT = """
import datetime, json, platform, importlib.metadata as m, torch
def version(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return None
names = ("spikedecoder", "torch", "triton", "numpy", "spikingjelly", "fla-core", "pytest")
gpu = None
if torch.cuda.is_available():
    p = torch.cuda.get_device_properties(0)
    gpu = {"name": p.name, "capability": f"{p.major}.{p.minor}",
           "memory_gib": round(p.total_memory / 2**30, 1),
           "multiprocessors": p.multi_processor_count, "cuda": torch.version.cuda}
today = datetime.date.today().isoformat()
print(json.dumps({"date": today, "python": platform.python_version(), "system": platform.platform(),
                  "gpu": gpu,
                  "versions": {n: version(n) for n in names}}))
"""


@dataclass
class Stage:
    """Processes, as (name, command), that run side by side, and the seconds until all are ended."""

    name: str
    limit: float
    processes: list[tuple[str, list[str]]]


@dataclass
class Outcome:
    stage: str
    seconds: float = 0.0
    status: dict[str, str] = field(default_factory=dict)  # of each process: "ok", "exit N", "time limit", ...
    left_out: bool = False

    @property
    def ok(self) -> bool:
        return bool(self.status) and all(s == "ok" for s in self.status.values())


def stages(out: Path, dry: bool) -> list[Stage]:
    """The stages in order: the tests, then what has no results in bench/results yet, then what has; last the
    compiled references, which take long to compile and get the time that is left."""
    python = [sys.executable]
    tiny = ["--dry-run"] if dry else []
    model = [*python, str(HERE / "bench_gpu_model.py"), *tiny]
    ops = [*python, str(HERE / "bench_gpu_ops.py"), *tiny]
    generate = [*python, str(HERE / "bench_generate.py"), "--device", "cpu" if dry else "cuda", *tiny]
    build = "from spikedecoder import ops; import torch; x = torch.ones(4, 8, device={!r}); "
    build += "ops.use_backend('triton'); print(ops.lif(x).sum())"
    pytest = [*python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header"]
    kernels = [str(ROOT / f"tests/test_kernels_{name}.py") for name in ("parity", "norm", "launch")]
    marked = ("convergence", "torch_features", "generation_graph", "model_parts", "training")
    others = ("others", [*pytest, "-m", "gpu", *(str(ROOT / f"tests/test_{name}.py") for name in marked)])
    extension = ("extension", [*pytest, str(ROOT / "tests/test_ext_cuda.py")])
    runs = [str(ROOT / f"tests/test_{name}.py") for name in ("training_graph", "training_runs")]
    if dry:  # `others` are all skipped, but imported
        parity = [("parity", [*pytest, kernels[0], "-k", "is_the_reference and lif-one"]), others, extension]
    else:  # compiling takes most of the time: spread over processes
        dtypes = {"float32": "float32", "float16": "float16 and not bfloat16", "bfloat16": "bfloat16"}
        kinds = {
            "lif": "not norm and not attention",
            "norm": "norm",
            "attention": "attention and not attention_lif",
            "attention-lif": "attention_lif",
        }
        groups = {f"{k}-{d}": f"{kinds[k]} and {dtypes[d]}" for k in kinds for d in dtypes}
        no_dtype = "not float32 and not float16 and not bfloat16"
        groups |= {"norm-rest": f"norm and {no_dtype}", "rest": f"not norm and {no_dtype}"}
        parity = [(name, [*pytest, *kernels, "-k", expression]) for name, expression in groups.items()]
        parity += [extension, others, ("runs", [*pytest, "-m", "gpu", *runs])]
        # not test_kernels_offsets.py, which runs under the interpreter and needs no GPU
        parity += [
            (name, [*pytest, str(ROOT / f"tests/test_kernels_{name}.py")]) for name in ("model", "opcheck")
        ]
        # so that what the model's steps compile is already in the caches of Triton and inductor
        warm = {"reference": ["--compile", "default"], "triton": ["--recompute"]}
        parity += [
            (f"compile-{row}", [*model, "--row", row, "--seconds", "0", *flags])
            for row, flags in warm.items()
        ]
    rows = {
        "triton-recompute-graph": ["--row", "triton", "--recompute", "--graph"],
        "triton-graph": ["--row", "triton", "--graph"],
        "triton": ["--row", "triton"],
        "reference": ["--row", "reference"],
        "reference-compiled": ["--row", "reference", "--compile", "default"],
        "reference-graph": ["--row", "reference", "--graph"],  # shows how much of "reference" is the host's
        "triton-reduce-overhead": ["--row", "triton", "--compile", "reduce-overhead"],
    }
    steps = {
        name: Stage(f"model-{name}", 90 if "--compile" in flags else 60, [("step", [*model, *flags])])
        for name, flags in rows.items()
    }
    profiles = [
        Stage(
            f"profile-{row}",
            40,
            [("trace", [*model, "--row", row, "--profile", str(out / f"trace-{row}.json.gz")])],
        )
        for row in ("triton",)
    ]
    operators = {  # each in a process of its own: after a fault on the GPU, a process can run nothing else
        name: Stage(
            f"operators-{name}",
            limit,
            [("rows", [*ops, *_which(name), "--limit", f"{limit - 10}", "--out", _rows_of(out, name)])],
        )
        for name, limit in ((name, (3 if dry else 1) * limit) for name, limit in OPERATORS.items())
    }
    return [
        Stage("environment", 60, [("report", [*python, "-c", _ENVIRONMENT])]),
        Stage(
            "build",
            120,
            [
                ("extension", [*python, str(HERE / "gpu_build.py"), *(["--no-build"] if dry else [])]),
                ("lif", [*python, "-c", build.format("cpu" if dry else "cuda")]),
            ],
        ),
        Stage("parity", 200, parity),
        *(operators[name] for name in ("rates", "elements")),
        steps["reference-graph"],
        *(operators[name] for name in ("spike_attention", "lif")),
        steps["triton-recompute-graph"],
        operators["norm_lif"],
        *(steps[name] for name in ("triton-graph", "triton", "reference", "reference-compiled")),
        *(operators[name] for name in ("spike_linear", "linear_norm_lif")),
        *profiles,
        Stage("generate", 60, [("token", generate)]),
        steps["triton-reduce-overhead"],
        operators["compiled"],
    ]


def _which(operators: str) -> list[str]:
    """Arguments for `bench_gpu_ops.py`."""
    return ["--rows", "compiled"] if operators == "compiled" else ["--rows", "others", "--only", operators]


def _rows_of(out: Path, operator: str) -> str:
    return str(out / f"operators-{operator}.json")


def run_stage(stage: Stage, out: Path, seconds: float, environment: dict[str, str]) -> Outcome:
    """Run the processes side by side; each writes STAGE-NAME.log. All are ended at the limit."""
    outcome, start = Outcome(stage.name), time.monotonic()
    (out / f"{stage.name}.json").unlink(missing_ok=True)  # the rows of operators, from an earlier call
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        # as for a background job of a shell; processes started here would ignore it, too
        signal.signal(signal.SIGINT, signal.default_int_handler)
    running = []
    for name, command in stage.processes:
        with (out / f"{stage.name}-{name}.log").open("w") as log:
            try:  # not in the checkout, whose packages would be found before those that are installed
                process = subprocess.Popen(
                    command, stdout=log, stderr=subprocess.STDOUT, cwd=out, env=environment,
                    start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                outcome.status[name] = str(error)
                continue
        running.append((name, process))
    _wait([process for _, process in running], start + seconds)
    late = [(name, process) for name, process in running if process.poll() is None]
    for _, process in late:
        _signal(process, signal.SIGINT)
    _wait([process for _, process in late], time.monotonic() + GRACE)
    for name, process in running:
        _signal(process, signal.SIGKILL)  # with all that it started, which would disturb later stages
        code = process.wait()
        outcome.status[name] = "ok" if code == 0 else f"exit {code}"
    outcome.status |= {name: f"time limit of {seconds:.0f} s" for name, _ in late}
    outcome.seconds = round(time.monotonic() - start, 1)
    return outcome


def _wait(processes: list[subprocess.Popen[bytes]], until: float) -> None:
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.1, until - time.monotonic()))


def _signal(process: subprocess.Popen[bytes], which: int) -> None:
    """Send a signal to a process and all that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, which)


def _last_json(path: Path) -> Any:
    """The value of the last line of a log that is a JSON object; None without one."""
    if not path.exists():
        return None
    for line in reversed(path.read_text(errors="replace").splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except json.JSONDecodeError:
                continue
    return None


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
    return lines[-1].strip("= ") if lines else ""


def _operators(out: Path) -> dict[str, Any] | None:
    """The rows of all operators, with the ceilings that the first measured."""
    parts = []
    for name in OPERATORS:
        path = Path(_rows_of(out, name))
        with contextlib.suppress(OSError, json.JSONDecodeError):  # not there, or cut off
            parts.append(json.loads(path.read_text()))
    if not parts:
        return None
    joined = {key: [x for part in parts for x in part[key]] for key in ("rows", "left_out")}
    return {"ceilings": parts[0]["ceilings"], **joined}


def keep(out: Path, outcome: Outcome, dry: bool) -> None:
    """Write how a stage ended; one that was left out does not replace what an earlier call measured."""
    path = out / f"stage-{outcome.stage}.json"
    if outcome.left_out and path.exists():
        return
    _write(path, asdict(outcome) | {"ok": outcome.ok, "dry_run": dry})


def _write(path: Path, value: Any) -> None:
    partial = path.with_name(path.name + ".part")  # a run may be cut short at any time
    partial.write_text(json.dumps(value, indent=1))
    os.replace(partial, path)


def gather(out: Path) -> dict[str, Any]:
    """The results of all stages that were ever run into `out`."""
    order = [stage.name for stage in stages(out, False)]
    found = [json.loads(path.read_text()) for path in sorted(out.glob("stage-*.json"))]
    found.sort(key=lambda o: order.index(o["stage"]) if o["stage"] in order else len(order))
    dry = [o.pop("dry_run") for o in found]
    names = [o["stage"] for o in found]
    parity = {path.stem: _last_line(path) for path in sorted(out.glob("parity-*.log"))}
    return {
        "dry_run": any(dry),
        "environment": _last_json(out / "environment-report.log"),
        "extension": _last_json(out / "build-extension.log"),
        "stages": found,
        "parity": parity,
        "model": {
            name.removeprefix("model-"): _last_json(out / f"{name}-step.log")
            for name in names
            if name.startswith("model-")
        },
        "generate": _last_json(out / "generate-token.log"),
        "operators": _operators(out),
    }


_COLUMNS = ("ms", "gb_per_s", "of_copy", "tflop_per_s", "of_product", "peak_mib")


def render(result: dict[str, Any]) -> str:
    environment = result["environment"] or {}
    gpu = environment.get("gpu") or {"name": "no GPU"}
    versions = ", ".join(f"{k} {v}" for k, v in environment.get("versions", {}).items() if v)
    lines = [
        f"# GPU run: {gpu['name']}",
        "",
        f"{environment.get('date', '')} {json.dumps(gpu)}; {versions}",
        "",
    ]
    lines += [result["note"], ""] if "note" in result else []
    if extension := result.get("extension"):
        said = [
            f"{key} {extension[key]}"
            for key in ("python", "architectures", "compiler", "why")
            if key in extension
        ]
        lines += [f"CUDA extension: {extension['how']}; " + "; ".join(said), ""]
    if result["dry_run"]:
        lines += ["**Dry run: tiny shapes under the interpreter. The times mean nothing.**", ""]
    lines += ["| stage | seconds | processes |", "|---|---|---|"]
    for stage in result["stages"]:
        status = ", ".join(f"{name}: {s}" for name, s in stage["status"].items())
        lines.append(f"| {stage['stage']} | {stage['seconds']} | {status} |")
    lines += ["", "## Parity", ""]
    lines += [f"- {name}: {line}" for name, line in result["parity"].items()]
    lines += ["", "## Training step of the README character model", ""]
    lines += [
        "| row | ms | tokens/s | peak MiB | activations MiB | first losses |",
        "|---|---|---|---|---|---|",
    ]
    for row, found in result["model"].items():
        found = found or {}
        cells = (found.get(k, "-") for k in ("ms", "tokens_per_s", "peak_mib", "activations_mib", "losses"))
        lines.append(f"| {row} | " + " | ".join(map(str, cells)) + " |")
    lines += ["", "## A token of the README character model, ms", "", json.dumps(result.get("generate"))]
    operators = result["operators"] or {"rows": [], "ceilings": {}, "left_out": []}
    lines += ["", "## Operators", "", f"Measured ceilings: {json.dumps(operators['ceilings'])}", ""]
    lines += gpu_crossover.page(operators["rows"])
    apart = (row["group"] for row in operators["rows"] if not gpu_crossover.is_point(row))
    for group in dict.fromkeys(apart):
        rows = [row for row in operators["rows"] if row["group"] == group]
        slowest = next((r["ms"] for r in rows if r["row"] == "eager reference" and "ms" in r), None)
        lines += [
            f"### {group}",
            "",
            "| row | ms | GB/s | of copy | TFLOP/s | of product | peak MiB | times the reference |",
        ]
        lines.append("|---|---|---|---|---|---|---|---|")
        for row in rows:
            if "ms" not in row:
                reason = next((row[k] for k in ("wrong", "failed", "skipped") if k in row), "no time")
                lines.append(f"| {row['row']} | {' '.join(reason.split())[:200]} | | | | | | |")
                continue
            times = f"{slowest / row['ms']:.2f}" if slowest else "-"
            cells = (row.get(k, "-") for k in _COLUMNS)
            lines.append(f"| {row['row']} | " + " | ".join(map(str, cells)) + f" | {times} |")
        lines.append("")
    if operators["left_out"]:
        lines += ["Left out for lack of time: " + "; ".join(operators["left_out"]), ""]
    return "\n".join(lines)


def points(result: dict[str, Any]) -> list[tuple[str, float, float]]:
    """(group, operations per byte, TFLOP/s) of those of our rows whose operations are counted."""
    rows = (result["operators"] or {"rows": []})["rows"]
    ours = [r for r in rows if r["row"] == "ours" and r.get("tflop_per_s") and r.get("gb_per_s")]
    return [(r["group"], r["tflop_per_s"] / (r["gb_per_s"] / 1e3), r["tflop_per_s"]) for r in ours]


def roofline(result: dict[str, Any], path: Path) -> None:
    """Draw TFLOP/s over arithmetic intensity, under the measured ceilings; nothing if there are no points."""
    found = points(result)
    try:
        import matplotlib
    except ImportError:
        return
    if not found:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ceiling = result["operators"]["ceilings"]
    bandwidth, peak = (max(v, 1e-6) for v in (ceiling["copy_gb_per_s"] / 1e3, ceiling["bf16_tflop_per_s"]))
    figure, axes = plt.subplots(figsize=(7, 4.5))
    intensity = [2.0**i for i in range(0, 12)]
    axes.loglog(intensity, [min(peak, bandwidth * i) for i in intensity], "k-", label="measured ceilings")
    for group, x, y in found:
        axes.loglog([x], [y], "o", label=group[:48])
    axes.set_xlabel("operations per byte")
    axes.set_ylabel("TFLOP/s")
    axes.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def draw(out: Path) -> None:
    """Write results.json, of all stages that were ever run into `out`, then its page and its picture.

    A "note" that was added to results.json stays, and all of it if nothing else is there.
    """
    path = out / "results.json"
    result = json.loads(path.read_text()) if path.exists() else None
    if result is None or any(out.glob("stage-*.json")):
        result = gather(out) | ({"note": result["note"]} if result and "note" in result else {})
        _write(path, result)
    (out / "results.md").write_text(render(result))
    roofline(result, out / "roofline.png")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that is written")
    parser.add_argument("--limit", type=float, default=TOTAL, help="seconds of the whole run")
    parser.add_argument(
        "--only", action="append", help="a stage, or the beginning of its name; may be repeated"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny shapes on the CPU, under the interpreter"
    )
    parser.add_argument(
        "--redraw",
        action="store_true",
        help="only write the results, table and picture again, from the files in --out",
    )
    options = parser.parse_args()
    out = options.out.resolve()
    if options.redraw:
        draw(out)
        return 0
    out.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    if options.dry_run:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    else:
        environment.pop("TRITON_INTERPRET", None)
    end = time.monotonic() + options.limit
    outcomes: list[Outcome] = []
    for stage in stages(out, options.dry_run):
        if options.only and not any(stage.name.startswith(name) for name in options.only):
            continue
        seconds = min(stage.limit, end - GRACE - time.monotonic())
        if seconds < 1:
            outcomes.append(Outcome(stage.name, 0.0, {"all": "left out: no time left"}, left_out=True))
        else:
            outcomes.append(run_stage(stage, out, seconds, environment))
        print(f"{stage.name}: {outcomes[-1].status} in {outcomes[-1].seconds} s", flush=True)
        keep(out, outcomes[-1], options.dry_run)
        try:
            draw(out)  # after every stage: a run cut short leaves results
        except Exception:  # --redraw can make them later: go on with the other stages
            traceback.print_exc()
    if (out / "results.md").exists():
        print((out / "results.md").read_text())
    return 0 if outcomes and all(o.ok for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
