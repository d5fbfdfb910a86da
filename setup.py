"""What pyproject.toml cannot say: where `kernels/` goes, and how the compiled extension is built.

The extension is `spikedecoder._C` (C++, any CPU) and, if nvcc is found, `spikedecoder._C_cuda`. Both are
built from `csrc/` by CMake and ninja, without torch. Environment variables:

    SPIKEDECODER_BUILD       auto (default): what can be built here; cpu: without CUDA; cuda: with CUDA, or
                             fail; off: pure Python, which leaves the reference and Triton backends.
    SPIKEDECODER_CUDA_ARCHS  architectures of the CUDA module, such as "80;90", or "all".
    CXX, CUDACXX, MAX_JOBS   compiler, nvcc (without options or a launcher), parallel compile jobs.

With auto and no C++ compiler, the install succeeds without the extension and says so. A compile error always
fails the install.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
KERNELS = "spikedecoder.kernels"
MODES = ("auto", "cpu", "cuda", "off")
CUDA_ARCHS = "80;90;100"
ALL_CUDA_ARCHS = "80;86;89;90;100;120"


def from_package(file: str, function: str, *arguments: Path) -> str | None:
    """Call a function in a file of spikedecoder/ext without importing the package, and so torch."""
    try:
        return runpy.run_path(str(ROOT / "spikedecoder" / "ext" / file))[function](*arguments)
    except ValueError as error:
        raise SystemExit(str(error)) from None


def find_compiler() -> str | None:
    return from_package("_programs.py", "find_compiler")


def find_nvcc() -> str | None:
    return from_package("_programs.py", "find_nvcc")


def build_mode() -> str:
    mode = os.environ.get("SPIKEDECODER_BUILD") or "auto"
    if mode not in MODES:
        raise SystemExit(f"SPIKEDECODER_BUILD: got {mode!r}, takes one of {', '.join(MODES)}")
    return mode


def chosen_modules() -> list[str]:
    mode = build_mode()
    if mode == "off":
        return []
    if find_compiler() is None:
        if mode != "auto":
            raise SystemExit(f"SPIKEDECODER_BUILD={mode}: needs GCC or Clang (set CXX, or install g++)")
        print("spikedecoder: no C++ compiler (GCC or Clang) found: installing without the compiled extension")
        return []
    has_cuda_source = (ROOT / "csrc" / "bindings_cuda.cpp").exists()
    if mode == "cuda" and find_nvcc() is None:
        raise SystemExit("SPIKEDECODER_BUILD=cuda: needs nvcc (set CUDACXX or CUDA_HOME)")
    with_cuda = has_cuda_source and mode in ("auto", "cuda") and find_nvcc() is not None
    return ["spikedecoder._C", *(["spikedecoder._C_cuda"] if with_cuda else [])]


class CMakeBuild(build_ext):
    """Builds all modules in one CMake project, and puts each where setuptools expects it."""

    def run(self) -> None:
        if not self.extensions:
            return
        import pybind11

        if shutil.which("cmake") is None:
            raise SystemExit("no cmake on PATH: pip install cmake ninja, or leave out --no-build-isolation")
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        names = [extension.name for extension in self.extensions]
        with_cuda = "spikedecoder._C_cuda" in names
        nvcc = None if build_mode() == "cpu" else find_nvcc()
        configure = [
            *("cmake", "-G", "Ninja", "-S", str(ROOT / "csrc"), "-B", str(build)),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DSPIKEDECODER_CUDA={'ON' if with_cuda else 'OFF'}",
            f"-DSPIKEDECODER_SOURCES={from_package('_sources.py', 'fingerprint', ROOT / 'csrc')}",
        ]
        archs = os.environ.get("SPIKEDECODER_CUDA_ARCHS") or CUDA_ARCHS
        if with_cuda:
            configure += [
                f"-DCMAKE_CUDA_COMPILER={nvcc}",
                f"-DSPIKEDECODER_CUDA_ARCHS={ALL_CUDA_ARCHS if archs == 'all' else archs}",
            ]
        # a build folder that another Python configured would keep that Python's headers
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        subprocess.run(configure, check=True)
        jobs = os.environ.get("MAX_JOBS")
        subprocess.run(["cmake", "--build", str(build), *(["--parallel", jobs] if jobs else [])], check=True)
        for name in names:
            target = Path(self.get_ext_fullpath(name)).resolve()
            target.parent.mkdir(parents=True, exist_ok=True)
            built = build / Path(self.get_ext_filename(name)).name
            # renamed into place: a process that has the old module loaded keeps its own copy
            partial = target.with_name(target.name + ".part")
            shutil.copy2(built, partial)
            os.replace(partial, target)
        # recorded beside them: what was asked for, to tell a missing module from one that was not wanted
        record = Path(self.get_ext_fullpath("spikedecoder._C")).resolve().with_name("_build.json")
        noted = {"build": build_mode(), "cuda_archs": archs, "nvcc": nvcc or ""}
        partial = record.with_name(record.name + ".part")
        partial.write_text(json.dumps(noted) + "\n", "utf-8")
        os.replace(partial, record)


setup(
    packages=[
        *find_packages(include=["spikedecoder", "spikedecoder.*"]),
        KERNELS,
        *(f"{KERNELS}.{name}" for name in find_packages("kernels")),
    ],
    package_dir={KERNELS: "kernels"},
    package_data={
        "spikedecoder": ["py.typed"],
        "spikedecoder.energy": ["*.toml"],
        "spikedecoder.ops": ["*.json"],
    },
    ext_modules=[Extension(name, sources=[]) for name in chosen_modules()],
    cmdclass={"build_ext": CMakeBuild},
    zip_safe=False,
)
