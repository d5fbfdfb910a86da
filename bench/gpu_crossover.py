"""Turn a GPU run's times over spike rates into the table that `auto` reads, and into a page.

    python bench/gpu_crossover.py DIR/results.json       # of `gpu.py`: writes spikedecoder/ops/crossover.json

For each operator, dtype and shape, the table has the measured rate up to which, from the lowest on, the CUDA
extension took less time than Triton, which `auto` would choose otherwise, and than cuBLAS on dense spikes. 0
means at none.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

TABLE = Path(__file__).resolve().parents[1] / "spikedecoder" / "ops" / "crossover.json"
TRITON, CUDA, DENSE = "triton", "cuda", "dense"  # rows of `gpu_rates.py`
SHAPE = ("operator", "dtype", "rows", "channels", "outputs")
MARGIN = 1.05  # what is faster by less may be noise

Shape = tuple[Any, ...]
Times = dict[float, dict[str, float]]  # ms by rate and row


def is_point(row: dict[str, Any]) -> bool:
    """Whether a row belongs to a sweep over rates."""
    return "rate" in row


def shapes(rows: list[dict[str, Any]]) -> dict[Shape, Times]:
    found: dict[Shape, Times] = {}
    for row in rows:
        if is_point(row):
            times = found.setdefault(tuple(row[name] for name in SHAPE), {})
            at_rate = times.setdefault(row["rate"], {})
            if "ms" in row:
                at_rate[row["row"]] = row["ms"]
    return found


def faster_up_to(times: Times, than: str) -> float | None:
    """The rate up to which the extension took less time; None if no rate has times of both."""
    rates = sorted(rate for rate, ms in times.items() if CUDA in ms and than in ms)
    if not rates:
        return None
    best = 0.0
    for rate in rates:
        if MARGIN * times[rate][CUDA] >= times[rate][than]:
            break
        best = rate
    return best


def table(result: dict[str, Any]) -> dict[str, Any]:
    """The table to commit. Raises ValueError if the result is not that of a GPU, or holds no rates."""
    environment = result["environment"] or {}
    gpu = environment.get("gpu")
    if result["dry_run"] or not gpu:
        raise ValueError("the result is that of a dry run, or of no GPU")
    entries = []
    for shape, times in shapes((result["operators"] or {"rows": []})["rows"]).items():
        entry = {"capability": gpu["capability"], **dict(zip(SHAPE, shape, strict=True))}
        entry |= {f"below_{than}": faster_up_to(times, than) for than in (TRITON, DENSE)}
        if entry["outputs"] is None and entry["below_triton"]:
            entry["below_triton"] = 1.0  # packing takes as long at any rate
        if entry["below_triton"] is not None:
            entries.append(entry)
    if not entries:
        raise ValueError("the result has no times of the CUDA extension and of Triton beside each other")
    kept = {key: environment[key] for key in ("date", "versions") if key in environment}
    return {"measured": {"gpu": gpu["name"], **kept}, "entries": entries}


def write(found: dict[str, Any], path: Path) -> None:
    """Write the table, one entry per line."""
    entries = ",\n".join(f"  {json.dumps(entry)}" for entry in found["entries"])
    measured = json.dumps(found["measured"])
    path.write_text(f'{{\n "measured": {measured},\n "entries": [\n{entries}\n ]\n}}\n')


def page(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown with a table of ms for each shape, one column per rate."""
    lines = []
    for shape, times in shapes(rows).items():
        of_shape = [row for row in rows if is_point(row) and tuple(row[name] for name in SHAPE) == shape]
        operator, dtype, m, k, n = shape
        lines += [
            f"### {operator} {dtype} M={m} K={k}" + ("" if n is None else f" N={n}") + ", ms by rate",
            "",
        ]
        lines += [
            "| row | " + " | ".join(f"{rate:g}" for rate in times) + " |",
            "|---|" + "---|" * len(times),
        ]
        for name in dict.fromkeys(row["row"] for row in of_shape):
            cells = [
                f"{ms[name]:g}" if name in ms else _reason(of_shape, name, rate) for rate, ms in times.items()
            ]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        ends = {than: faster_up_to(times, than) for than in (TRITON, DENSE)}
        said = [f"than {than} up to {rate:g}" for than, rate in ends.items() if rate is not None]
        lines += (
            ["", "The extension is faster " + ", ".join(said) + ".", ""] if said and n is not None else [""]
        )
    return lines


def _reason(rows: list[dict[str, Any]], name: str, rate: float) -> str:
    row = next((row for row in rows if (row["row"], row["rate"]) == (name, rate)), {})
    text = next((row[key] for key in ("wrong", "failed", "skipped") if key in row), "-")
    return " ".join(text.split())[:40]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, help="results.json of bench/gpu.py")
    parser.add_argument("--out", type=Path, default=TABLE)
    options = parser.parse_args()
    found = table(json.loads(options.result.read_text()))
    write(found, options.out)
    for entry in found["entries"]:
        print(*entry.values())


if __name__ == "__main__":
    main()
