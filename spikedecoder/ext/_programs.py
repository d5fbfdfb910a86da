"""Programs that the extension is built by. Imports nothing of the package: setup.py runs this file too."""

from __future__ import annotations

import os
import shutil


def find_compiler() -> str | None:
    """GCC or Clang: the kernels use attributes that only these know."""
    return None if os.name == "nt" else _find("CXX", "c++", "g++", "clang++")


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return _find("CUDACXX", "nvcc", f"{home}/bin/nvcc")


def _find(variable: str, *names: str) -> str | None:
    """What the environment variable names, which has to be there, else the first of these programs."""
    asked = os.environ.get(variable, "").strip()
    if asked:
        found = shutil.which(asked.split()[0])
        if found is None:
            raise ValueError(f"{variable}: got {asked!r}, which is not a program here")
        return found
    return next((found for name in names if (found := shutil.which(name))), None)
