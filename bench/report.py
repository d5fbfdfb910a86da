"""Turn a benchmark's JSON into a committed result: small, with machine, versions, date and command.

python bench/report.py result.json NAME COMMAND...    writes bench/results/NAME.json and NAME.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def condense(raw: dict[str, Any], command: str) -> dict[str, Any]:
    """What is worth keeping of pytest-benchmark's JSON; times in milliseconds."""
    rows = [
        {
            "group": b["group"],
            "name": b["name"],
            "min_ms": round(b["stats"]["min"] * 1e3, 4),
            "median_ms": round(b["stats"]["median"] * 1e3, 4),
            "rounds": b["stats"]["rounds"],
            **b["extra_info"],
        }
        for b in raw["benchmarks"]
    ]
    return {
        "date": raw["datetime"][:10],
        "commit": raw["commit_info"].get("id", "")[:12],
        "command": command,
        "machine": raw["machine_info"],
        "rows": rows,
    }


def render(result: dict[str, Any]) -> str:
    """The result as Markdown: one table per group, each row compared with the group's slowest."""
    machine = result["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
    lines = [
        f"{result['date']}, commit {result['commit']}: {machine['gpu'] or machine['processor']}, "
        f"{machine['cores']} cores ({machine['threads']} threads), {machine['memory_gib']} GiB; {versions}.",
        "",
        f"`{result['command']}`",
    ]
    for group in dict.fromkeys(row["group"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["group"] == group]
        slowest = max(row["min_ms"] for row in rows)
        extra = list(dict.fromkeys(k for row in rows for k in row if k not in _COMMON))
        lines += ["", f"### {group}", ""]
        lines.append("| " + " | ".join(["", "min ms", "median ms", "times faster", *extra]) + " |")
        lines.append("|" + "---|" * (4 + len(extra)))
        for row in rows:
            cells = [
                row["name"],
                f"{row['min_ms']:g}",
                f"{row['median_ms']:g}",
                f"{slowest / row['min_ms']:.2f}",
            ]
            lines.append("| " + " | ".join([*cells, *(str(row.get(k, "")) for k in extra)]) + " |")
    return "\n".join(lines) + "\n"


_COMMON = ("group", "name", "min_ms", "median_ms", "rounds")


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    source, name, *command = sys.argv[1:]
    result = condense(json.loads(Path(source).read_text()), " ".join(command))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(render(result))
    print(render(result))


if __name__ == "__main__":
    main()
