"""Find the programs that build the extension. Imports nothing of the package: setup.py runs this file too."""

from __future__ import annotations

import os
import shutil


def find_compiler() -> str | None:
    """The C++ compiler, or None. It must be GCC or Clang: the kernels use attributes that only these know.

    Of a CXX of several words it is the first; CMake, which reads CXX itself, runs all of them.
    """
    return None if os.name == "nt" else _find("CXX", "c++", "g++", "clang++")


def find_nvcc() -> str | None:
    """nvcc, or None. Raises ValueError if CUDACXX names more than one program, as CMake takes a path."""
    asked = os.environ.get("CUDACXX", "").strip()
    if len(asked.split()) > 1 and shutil.which(asked) is None:
        raise ValueError(
            f"CUDACXX: got {asked!r}, takes nvcc alone; a launcher such as ccache goes into "
            "CMAKE_CUDA_COMPILER_LAUNCHER, options go into CUDAFLAGS"
        )
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return _find("CUDACXX", "nvcc", f"{home}/bin/nvcc")


def _find(variable: str, *names: str) -> str | None:
    """The program that the environment variable names, else the first of `names` that exists, or None.

    Raises ValueError if the one that the variable names does not exist.
    """
    asked = os.environ.get(variable, "").strip()
    if asked:
        found = shutil.which(asked) or shutil.which(asked.split()[0])  # the path may have spaces
        if found is None:
            raise ValueError(f"{variable}: got {asked!r}, which is not a program here")
        return found
    return next((found for name in names if (found := shutil.which(name))), None)
