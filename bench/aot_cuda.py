"""The CUDA kernels of csrc/*.cu as compiled: registers, spills, and the widths of their memory accesses.

    python bench/aot_cuda.py            writes docs/kernels_cuda.md

Reads the module that is installed; no GPU is needed. cuobjdump is that of the CUDA toolkit, or triton's.
"""

from __future__ import annotations

import collections
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "kernels_cuda.md"
# in SASS: loads and stores of global memory, and of local memory, where registers are spilled
_ACCESS = re.compile(r"\b(LDG|STG|LDL|STL)\.?([A-Z0-9_.]*)")
_WIDTHS = {"128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}


def _triton_tools() -> str:
    spec = importlib.util.find_spec("triton")
    return str(Path(spec.origin).parent / "backends" / "nvidia" / "bin") if spec and spec.origin else ""


def _cuobjdump(option: str, module: str) -> str:
    path = os.pathsep.join([os.environ.get("PATH", ""), _triton_tools()])
    tool = shutil.which("cuobjdump", path=path)
    if tool is None:
        sys.exit("cuobjdump: not found; it comes with the CUDA toolkit, and with triton")
    done = subprocess.run(
        [tool, option, module], capture_output=True, text=True, check=True, env={**os.environ, "PATH": path}
    )
    return done.stdout


def _short(mangled: str) -> str:
    """`gather_kernel<fp32, 4>` of a mangled name."""
    found = re.search(r"\d+([a-z_]+_kernel)(?:I(13__nv_bfloat16|6__half|f|h)(?:Li(\d+)E)?E)?", mangled)
    if found is None:
        return mangled
    types = {"13__nv_bfloat16": "bf16", "6__half": "fp16", "f": "fp32", "h": "bytes"}
    parameters = [p for p in (types.get(found[2] or ""), found[3]) if p]
    return f"{found[1]}<{', '.join(parameters)}>" if parameters else found[1]


def _sections(text: str) -> list[tuple[str, str, str]]:
    """(sm, function, its text)."""
    sections, sm = [], ""
    for part in re.split(r"(?=arch = sm_|Function *:? *_Z)", text):
        if found := re.match(r"arch = sm_(\d+)", part):
            sm = found[1]
        elif found := re.match(r"Function *:? *(_Z\w+)", part):
            sections.append((sm, found[1], part))
    return sections


def rows(module: str) -> list[str]:
    used = {(sm, name): text for sm, name, text in _sections(_cuobjdump("--dump-resource-usage", module))}
    lines = []
    for sm, name, text in sorted(
        _sections(_cuobjdump("-sass", module)), key=lambda s: (_short(s[1]), int(s[0]))
    ):
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", used[sm, name])
        if found is None:
            raise RuntimeError(f"no resource usage of {name} for sm_{sm}")
        registers, stack, shared, local = map(int, found.groups())
        widths: dict[str, set[int]] = collections.defaultdict(set)
        spills = stack + local
        for operation, suffix in _ACCESS.findall(text):
            if operation in ("LDL", "STL"):
                spills += 1
            else:
                widths[operation].add(next((_WIDTHS[p] for p in suffix.split(".") if p in _WIDTHS), 32))
        shown = [", ".join(map(str, sorted(widths[o], reverse=True))) or "-" for o in ("LDG", "STG")]
        lines.append(
            f"| {_short(name)} | {sm} | {registers} | {shared} | {spills} | {shown[0]} | {shown[1]} |"
        )
    return lines


def main() -> None:
    spec = importlib.util.find_spec("spikedecoder._C_cuda")
    if spec is None or spec.origin is None:
        sys.exit("spikedecoder._C_cuda: not built; install with SPIKEDECODER_BUILD=cuda where nvcc is")
    head = [
        "# The CUDA kernels of csrc/ as compiled",
        "",
        "Written by `python bench/aot_cuda.py`; nothing on this page was measured on a GPU. Access widths in",
        "bits; the second parameter of a kernel is how many columns a thread sums; spills are bytes of stack",
        "and local memory, and instructions that use it.",
        "",
        "| kernel | sm | registers | shared bytes | spills | loads | stores |",
        "|---|---|---|---|---|---|---|",
    ]
    PAGE.write_text("\n".join([*head, *rows(spec.origin)]) + "\n")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
