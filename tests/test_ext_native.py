"""The C++ tests of the kernels under AddressSanitizer and UndefinedBehaviorSanitizer, and what they link."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from spikedecoder import ext

# checks by a call in place of code at every access: the same checks, compiled in two thirds of the time
OUTLINED = "--param=asan-instrumentation-with-call-threshold=0"
CSRC = Path(__file__).parent.parent / "csrc"
# those that this CPU can run, where the module is built: the code of others would be compiled for nothing
VARIANTS = ext.info()["cpu"].get("variants")
MISSING = [tool for tool in ("cmake", "ninja", "c++", "nm") if shutil.which(tool) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}"),
]


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    folder = tmp_path_factory.mktemp("native")
    options = ["-DSPIKEDECODER_PYTHON_MODULE=OFF", "-DSPIKEDECODER_NATIVE_TESTS=ON"]
    if VARIANTS is not None:
        options.append(f"-DSPIKEDECODER_VARIANTS={';'.join(VARIANTS)}")
    probe = ["c++", OUTLINED, "-fsyntax-only", "-x", "c++", os.devnull]  # an option of GCC
    if subprocess.run(probe, capture_output=True).returncode == 0:
        options.append(f"-DCMAKE_CXX_FLAGS={OUTLINED}")
    for command in (
        ["cmake", "-G", "Ninja", "-S", CSRC, "-B", folder, *options],
        ["cmake", "--build", folder],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_kernels_under_sanitizers(build):
    # libgomp's threads live as long as the program: what they hold is not a leak of ours
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "UBSAN_OPTIONS": "print_stacktrace=1"}
    done = subprocess.run([build / "test_kernels"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    for variant in VARIANTS or ["baseline"]:
        assert f"{variant}: 0 failures" in done.stdout


@pytest.mark.parametrize(
    ("variant", "kernel"), [("amx", "tile_sums"), ("avx512", "lif_forward"), ("avx2", "lif_forward")]
)
def test_code_for_newer_cpus_stays_in_its_variant(build, variant, kernel):
    """What a variant's objects define for others is in its namespace: no inline function of the standard
    library, compiled for AVX-512, can be linked in place of the plain one."""
    objects = sorted((build / "CMakeFiles" / f"kernels_{variant}.dir").glob("*.o"))
    if not objects:
        pytest.skip("not for this CPU, or of a compiler that does not know it")
    command = ["nm", "-C", "--defined-only", "--extern-only", *objects]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    symbols = re.findall(r"^[0-9a-f]+ [A-Za-z] (.+)$", listed, re.MULTILINE)
    assert any(kernel in symbol for symbol in symbols)
    own = re.compile(rf"(void )?spikedecoder::{variant}::|DW\.ref\.|__odr_asan")
    assert [symbol for symbol in symbols if not own.match(symbol)] == []
