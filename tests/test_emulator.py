"""The kernels' PTX, interpreted on the CPU beside the reference.

`bench/emulate.py` compiles in a process of its own, since the tests run kernels under Triton's interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spikedecoder.ext import _programs

BENCH = Path(__file__).parent.parent / "bench"


def run(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, *(("-c", code) if code else (str(BENCH / "emulate.py"),)), *arguments]
    return subprocess.run(command, env=environment, cwd=BENCH, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("90", ("--sample", "19")),
        ("80", ("--sample", "37")),
        ("100", ("--sample", "41")),
        ("120", ("--sample", "53")),
        # Triton 3.9 loses the order of products of a loop, unless `stages` keeps it
        ("100", ("--only", "spike_linear", "--case", "chunks-narrow")),
    ],
)
def test_the_kernels_ptx_is_the_reference(target, options):
    """Some of the calls; `python bench/emulate.py` runs all of them."""
    pytest.importorskip("triton")
    done = run("--target", target, *options)
    assert done.returncode == 0, done.stderr
    assert " 0 wrong, 0 not run" in done.stdout


MEMORY = """
import torch
from emulate import Launch, emulated, memory_of
rows = torch.zeros(4, 8)
arguments = {"one": rows[0], "some": rows[2:, :3], "last": rows[3], "none": rows[:0], "n": 5}
blocks = memory_of(Launch(None, (), arguments, {})).blocks
print([(block.base - rows.data_ptr(), block.data.size, block.unit) for block in blocks])
with emulated(90, 2):
    print(torch.empty(3).isnan().all().item(), rows.new_empty(3, dtype=torch.bfloat16).isnan().all().item())
print(torch.are_deterministic_algorithms_enabled())
"""


@pytest.mark.slow
def test_launches_reach_their_tensors_which_are_nan_at_first():
    pytest.importorskip("triton")
    done = run(code=MEMORY)
    assert done.stdout.splitlines() == ["[(0, 32, 4), (64, 64, 4)]", "True True", "False"], done.stderr


BROKEN = """
import re, sys
import emulate
code = emulate.gpu_code
def changed(launch, target):
    text, shared = code(launch, target)
    new = re.sub({old!r}, {new!r}, text)
    assert launch.kernel.__name__ != "norm_lif_backward" or new != text, "nothing to change"
    return new, shared
emulate.gpu_code = changed
sys.argv[1:] = ["--only", "norm_lif", "--dtype", "bf16", "--case", {case!r}]
sys.exit(emulate.main())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "case", "message"),
    [
        (r"set\.ltu\.u32\.f32", "set.geu.u32.f32", "norm_lif-layer-train", "are off by"),
        (r"0xffff0000|-65536", "0x7fff0000", "norm_lif-layer-train", "differ"),
        (r"bar\.sync\s+0;", "", "norm_lif-wide", "with no barrier behind"),
        (r"cp\.async\.wait_group\s+\d+;", "cp.async.wait_group 99;", "norm_lif-wide", "before cp.async"),
    ],
)
def test_a_kernel_that_is_wrong_is_found(old, new, case, message):
    pytest.importorskip("triton")
    done = run(code=BROKEN.format(old=old, new=new, case=case))
    assert done.returncode == 1, done.stdout + done.stderr
    assert message in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(_programs.find_nvcc() is None, reason="needs nvcc")
def test_the_cuda_extensions_ptx_is_the_reference():
    done = subprocess.run(
        [sys.executable, str(BENCH / "emulate_cuda.py")], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 wrong: gather " in done.stdout
