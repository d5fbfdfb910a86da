"""How the package is built: what setup.py chooses and configures, the sdist, a wheel without a compiler."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools

from spikedecoder import ext
from spikedecoder.ext import _programs, _sources

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
VARIABLES = ("SPIKEDECODER_BUILD", "SPIKEDECODER_CUDA_ARCHS", "CXX", "CUDACXX", "CUDA_HOME", "CUDA_PATH")
BOTH = ["spikedecoder._C", "spikedecoder._C_cuda"]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Give it the names of programs: the only ones here then, nvcc also where CUDA_HOME says."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def with_programs(*programs, **environment):
        folder = tmp_path / "-".join(["bin", *programs])
        folder.mkdir(exist_ok=True)
        for program in programs:
            (folder / program).write_text("#!/bin/sh\nexit 1\n")
            (folder / program).chmod(0o755)
        # or a toolkit in /usr/local would be found
        for name, value in {"PATH": folder, "CUDA_HOME": tmp_path / "none", **environment}.items():
            monkeypatch.setenv(name, str(value))
        return folder

    return with_programs


@pytest.fixture
def setup_arguments(monkeypatch):
    """What setup.py would call `setup` with."""

    def read():
        arguments = {}
        monkeypatch.setattr(setuptools, "setup", lambda **given: arguments.update(given))
        monkeypatch.chdir(ROOT)
        runpy.run_path(str(ROOT / "setup.py"))
        return arguments

    return read


@pytest.mark.parametrize(
    ("mode", "programs", "chosen"),
    [
        (None, ["c++", "nvcc"], BOTH),
        (None, ["clang++"], BOTH[:1]),
        (None, [], []),
        (None, ["nvcc"], []),
        ("", ["g++", "nvcc"], BOTH),
        ("auto", ["c++", "nvcc"], BOTH),
        ("cpu", ["c++", "nvcc"], BOTH[:1]),
        ("cpu", [], "SPIKEDECODER_BUILD=cpu: needs GCC or Clang"),
        ("cuda", ["c++", "nvcc"], BOTH),
        ("cuda", ["c++"], "SPIKEDECODER_BUILD=cuda: needs nvcc"),
        ("cuda", ["nvcc"], "SPIKEDECODER_BUILD=cuda: needs GCC or Clang"),
        ("off", ["c++", "nvcc"], []),
        ("all", ["c++"], "SPIKEDECODER_BUILD: got 'all', takes one of auto, cpu, cuda, off"),
    ],
)
def test_what_is_built(mode, programs, chosen, machine, setup_arguments, capsys):
    machine(*programs, **({} if mode is None else {"SPIKEDECODER_BUILD": mode}))
    if isinstance(chosen, str):
        with pytest.raises(SystemExit, match=chosen):
            setup_arguments()
        return
    assert [extension.name for extension in setup_arguments()["ext_modules"]] == chosen
    assert ("no C++ compiler" in capsys.readouterr().out) == (mode != "off" and not chosen)


def test_programs_are_looked_for_where_the_environment_says(machine, tmp_path):
    toolkit = machine("nvcc")
    (tmp_path / "toolkit").mkdir()
    toolkit.rename(tmp_path / "toolkit" / "bin")
    nvcc = str(tmp_path / "toolkit" / "bin" / "nvcc")
    for environment in (
        {"CUDACXX": nvcc},
        {"CUDA_HOME": tmp_path / "toolkit"},
        {"CUDA_HOME": "", "CUDA_PATH": tmp_path / "toolkit"},
        {"PATH": tmp_path / "toolkit" / "bin"},
    ):
        with pytest.MonkeyPatch.context() as patch:
            folder = machine("c++")
            for name, value in environment.items():
                patch.setenv(name, str(value))
            assert _programs.find_nvcc() == nvcc
    machine("c++", "my-c++")
    assert _programs.find_compiler() == str(tmp_path / "bin-c++-my-c++" / "c++")
    machine("c++", "my-c++", CXX=" ")
    assert _programs.find_compiler() == str(tmp_path / "bin-c++-my-c++" / "c++")
    machine("c++", "my-c++", CXX="my-c++ -pipe")
    assert _programs.find_compiler() == str(tmp_path / "bin-c++-my-c++" / "my-c++")
    assert folder.name == "bin-c++"


@pytest.mark.parametrize("variable", ["CXX", "CUDACXX"])
def test_a_program_that_is_not_there_is_an_error(variable, machine, setup_arguments):
    machine("c++", "nvcc", **{variable: "no-such-compiler"})
    with pytest.raises(SystemExit, match=f"{variable}: got 'no-such-compiler', which is not a program here"):
        setup_arguments()


@pytest.fixture
def run_build(setup_arguments, tmp_path, monkeypatch):
    """Runs setup.py's build with a CMake that does nothing; returns the command and the lines it ran."""

    def run():
        arguments = setup_arguments()
        command = arguments["cmdclass"]["build_ext"](
            setuptools.Distribution({"name": "spikedecoder", "ext_modules": arguments["ext_modules"]})
        )
        command.build_lib, command.build_temp = str(tmp_path / "lib"), str(tmp_path / "temp")
        command.ensure_finalized()
        ran = []

        def cmake(line, check):
            ran.append(line)
            for name in BOTH:
                (tmp_path / "temp" / "cmake" / Path(command.get_ext_filename(name)).name).write_text(name)

        monkeypatch.setitem(sys.modules, "pybind11", SimpleNamespace(get_cmake_dir=lambda: "pybind11's"))
        monkeypatch.setattr(subprocess, "run", cmake)
        command.run()
        return command, ran

    return run


@pytest.mark.parametrize("more", ["ccache nvcc", "nvcc -ccbin g++-12"])
def test_nvcc_is_named_alone(more, machine, setup_arguments, tmp_path, run_build):
    """CMake takes the path of one program, and tests that as the compiler."""
    machine("c++", "nvcc", "ccache", "cmake", CUDACXX=more)
    message = f"CUDACXX: got {re.escape(repr(more))}, takes nvcc alone.*CUDA_COMPILER_LAUNCHER.*CUDAFLAGS"
    with pytest.raises(SystemExit, match=message):
        setup_arguments()
    (tmp_path / "my tools").mkdir()
    nvcc = shutil.copy(shutil.which("nvcc"), tmp_path / "my tools" / "nvcc")
    machine("c++", "cmake", CUDACXX=nvcc)
    assert _programs.find_nvcc() == str(nvcc)
    # without CUDA, it does not matter, not even after everything was compiled
    machine("c++", "cmake", CUDACXX=more, SPIKEDECODER_BUILD="cpu")
    command, (configure, _) = run_build()
    assert "-DSPIKEDECODER_CUDA=OFF" in configure
    noted = Path(command.get_ext_fullpath("spikedecoder._C")).with_name("_build.json")
    assert json.loads(noted.read_text())["nvcc"] == ""


@pytest.mark.parametrize("archs", [None, "all", "89"])
def test_what_cmake_is_told_and_what_is_noted(archs, machine, run_build, tmp_path, monkeypatch):
    folder = machine("c++", "nvcc", "cmake", **({} if archs is None else {"SPIKEDECODER_CUDA_ARCHS": archs}))
    command, (configure, build) = run_build()
    assert build[:2] == ["cmake", "--build"]
    for option in (
        "-DSPIKEDECODER_CUDA=ON",
        f"-DCMAKE_CUDA_COMPILER={folder / 'nvcc'}",
        f"-DSPIKEDECODER_SOURCES={_sources.fingerprint()}",
        f"-DSPIKEDECODER_CUDA_ARCHS={'80;86;89;90;100;120' if archs == 'all' else archs or '80;90;100'}",
    ):
        assert option in configure
    for name in BOTH:
        assert Path(command.get_ext_fullpath(name)).read_text() == name
    noted = tmp_path / "lib" / "spikedecoder" / "_build.json"
    monkeypatch.setattr(ext, "__file__", str(noted.parent / "ext" / "__init__.py"))
    nvcc = str(folder / "nvcc")
    assert ext.asked_for() == {"build": "auto", "cuda_archs": archs or "80;90;100", "nvcc": nvcc}
    assert ext.info()["cuda"]["asked"] == "auto"
    noted.write_text("")  # cut off
    assert ext.asked_for() == {}
    noted.unlink()
    assert ext.asked_for() == {} and "asked" not in ext.info()["cuda"]


def run_python(*arguments: str, cwd: Path, code: int = 0, **environment: str) -> str:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SPIKEDECODER_") and k not in VARIABLES}
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        env={**clean, **environment},
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr if code else done.stdout


def backend(hook: str, out: Path, cwd: Path, **environment: str) -> Path:
    """What a build front end gets from this hook of setuptools, without isolation."""
    code = f"from setuptools import build_meta; print(build_meta.{hook}({str(out)!r}))"
    return out / run_python("-c", code, cwd=cwd, **environment).splitlines()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """An sdist, and from it a wheel where there is no compiler, both unpacked."""
    folder = tmp_path_factory.mktemp("built")
    ignored = shutil.ignore_patterns(
        ".*", "*.so", "__pycache__", "*.egg-info", "build", "dist", "runs", "venv"
    )
    shutil.copytree(ROOT, folder / "checkout", ignore=ignored)
    # what an earlier build in the checkout has left
    (folder / "checkout" / "spikedecoder" / "_build.json").write_text("{}")
    (folder / "checkout" / "spikedecoder" / "_C.abi3.so").touch()
    sdist = backend("build_sdist", folder, folder / "checkout", SPIKEDECODER_BUILD="off")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "sdist", **({"filter": "data"} if sys.version_info >= (3, 12) else {}))
    (unpacked,) = (folder / "sdist").iterdir()
    nowhere = folder / "nowhere"
    nowhere.mkdir()
    wheel = backend("build_wheel", folder, unpacked, PATH=str(nowhere))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "wheel")
    return SimpleNamespace(sdist=unpacked, wheel=folder / "wheel", name=wheel.name)


def run_wheel(built, *arguments: str, **more) -> str:
    """With -S, or an editable install of this package would add what the wheel lacks."""
    libraries = [path for path in sys.path if path.endswith("-packages")]
    path = os.pathsep.join([str(built.wheel), *libraries])
    return run_python("-S", *arguments, cwd=built.wheel.parent, PYTHONPATH=path, **more)


def test_the_sdist_holds_what_a_build_needs(built):
    for name in ("setup.py", "pyproject.toml", "constraints.txt", "kernels/lif.py", "tests/conftest.py"):
        assert (built.sdist / name).is_file(), name
    assert _sources.fingerprint(built.sdist / "csrc") == _sources.fingerprint(ROOT / "csrc")
    assert (built.sdist / "csrc" / "tests" / "test_kernels.cpp").is_file()
    assert not list(built.sdist.rglob("*.so")) and not list(built.sdist.rglob("_build.json"))


def test_a_wheel_without_a_compiler_runs_on_the_reference(built):
    assert built.name.endswith("-py3-none-any.whl")
    assert sorted(p.name for p in built.wheel.iterdir() if p.suffix != ".dist-info") == ["spikedecoder"]
    for name in ("py.typed", "energy/horowitz-45nm.toml", "kernels/lif.py", "ext/_programs.py"):
        assert (built.wheel / "spikedecoder" / name).is_file(), name
    assert not list(built.wheel.rglob("*.so")) and not list(built.wheel.rglob("_build.json"))
    where = "import spikedecoder.kernels as found; print(found.__file__)"
    found = run_wheel(built, "-c", where).strip()
    assert found == str(built.wheel / "spikedecoder" / "kernels" / "__init__.py")
    report = json.loads(run_wheel(built, "-m", "spikedecoder", "doctor", "--json"))
    assert report["training_step"]["works"] is True
    assert report["operators"]["cpu"]["lif"] == {"cpu": ext.NOT_BUILT, "reference": "chosen"}
    assert report["extension"]["cpu"] == {"built": False, "mend": ext.NOT_BUILT}


@pytest.fixture(scope="module")
def wheels():
    with open(ROOT / "pyproject.toml", "rb") as file:
        return tomllib.load(file)


def test_wheels_are_built_for_every_python_that_is_tested(wheels):
    names = wheels["tool"]["cibuildwheel"]["build"]
    tested = [c.rpartition(" :: ")[2] for c in wheels["project"]["classifiers"] if " :: 3." in c]
    assert {f"cp{version.replace('.', '')}-*" for version in tested} <= set(names)
    assert wheels["tool"]["cibuildwheel"]["macos"]["archs"] == ["arm64"]


def test_the_test_of_a_wheel_fails_without_the_compiled_part(built, wheels):
    python, *command = shlex.split(wheels["tool"]["cibuildwheel"]["test-command"])
    assert python == "python"
    environment = wheels["tool"]["cibuildwheel"]["test-environment"]
    if ext.is_built():
        assert "works" in run_python(*command, cwd=ROOT, **environment)
    assert "BackendError" in run_wheel(built, *command, code=1, **environment)
