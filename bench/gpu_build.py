"""Provide the CUDA extension on this machine: a ready-made one if it is there, else one built in place.

    python bench/gpu_build.py              # prints what is there as a line of JSON; status 1: nothing usable
    python bench/gpu_build.py --no-build   # builds nothing; status 0

A module is for one version of Python, given in its name; those for other versions are reported and not used.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from spikedecoder.ext._programs import find_nvcc

ROOT = Path(__file__).resolve().parents[1]
MODULE = "_C_cuda"
_STATE = """
import json, pathlib, torch, spikedecoder
from spikedecoder import ext
folder = str(pathlib.Path(spikedecoder.__file__).resolve().parent)
architecture = "%d%d" % torch.cuda.get_device_capability() if torch.cuda.is_available() else None
try: found = ext.info()["cuda"]
except ImportError as error: found = {"built": True, "loaded": False, "mend": f"it cannot be loaded: {error}"}
print(json.dumps({"folder": folder, "architecture": architecture, "loaded": False, **found}))
"""


def state() -> dict[str, Any]:
    """What a fresh process finds, started outside the checkout like all that is measured."""
    done = subprocess.run([sys.executable, "-c", _STATE], capture_output=True, text=True, cwd="/")
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("{"):
            return json.loads(line)
    last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
    return {
        "built": False,
        "loaded": False,
        "mend": f"a process that asks ended with {done.returncode}: {last}",
    }


def is_usable(found: dict[str, Any]) -> bool:
    return bool(found["built"] and found["loaded"])


def of_other_pythons(folder: Path) -> list[str]:
    """Names of CUDA modules in `folder` that are for another Python."""
    own = {MODULE + suffix for suffix in importlib.machinery.EXTENSION_SUFFIXES}
    return sorted(path.name for path in folder.glob(f"{MODULE}.*so") if path.name not in own)


def build(architecture: str | None) -> str | None:
    """Build both modules into the checkout; returns why that failed, or None."""
    environment = {**os.environ, "SPIKEDECODER_BUILD": "cuda"}
    environment.setdefault("SPIKEDECODER_CUDA_ARCHS", architecture or "90")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=sys.stderr)  # all of it is in the log
    return f"the build ended with {done.returncode}" if done.returncode else None


def provide(may_build: bool) -> dict[str, Any]:
    """What is there in the end. "how" is "ready-made", "built in N s", or "missing", then with "why"."""
    found = state()
    said: dict[str, Any] = {"python": sys.implementation.cache_tag}
    if is_usable(found):
        return {**said, "how": "ready-made", **found}
    why = [str(found["mend"])]
    if others := of_other_pythons(ROOT / "spikedecoder"):
        why.append(f"{', '.join(others)}: of another Python, this is {sys.implementation.cache_tag}")
    if may_build and find_nvcc() is None:
        why.append("it cannot be built: no nvcc (PATH, CUDACXX, CUDA_HOME)")
    elif may_build:
        print(f"{'; '.join(why)}: building it", file=sys.stderr, flush=True)
        start = time.monotonic()
        failed = build(found.get("architecture"))
        seconds = time.monotonic() - start
        found = state()
        if is_usable(found):
            return {**said, "how": f"built in {seconds:.0f} s", **found}
        why = [failed or str(found["mend"])]
        if found.get("folder", "") != str(ROOT / "spikedecoder"):
            why.append(f"the package that runs is {found.get('folder')}, not this checkout's")
    return {**said, "how": "missing", **found, "why": "; ".join(why)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-build", action="store_true", help="only say what is there")
    options = parser.parse_args()
    try:
        found = provide(not options.no_build)
    except KeyboardInterrupt:  # the stage's time is over
        found = {"how": "missing", "built": False, "loaded": False, "why": "interrupted while it was built"}
    print(json.dumps(found))
    return 0 if is_usable(found) or options.no_build else 1


if __name__ == "__main__":
    sys.exit(main())
