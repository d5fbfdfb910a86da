"""The CUDA module: its machine code, read without a GPU; its operators, on one."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from spikedecoder import ext, ops
from spikedecoder.ext import _sources
from spikedecoder.ops._dispatch import Call
from spikedecoder.testing import cases, make_inputs, run

needs_module = pytest.mark.skipif(not ext.is_cuda_built(), reason=ext.CUDA_NOT_BUILT)


def cuobjdump() -> str | None:
    """The toolkit's, or the one that Triton brings."""
    triton = importlib.util.find_spec("triton")
    bundled = (
        Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else None
    )
    return str(bundled) if bundled and bundled.exists() else shutil.which("cuobjdump")


def dump(*options: str) -> str:
    tool = cuobjdump()
    if tool is None:
        pytest.skip("needs cuobjdump")
    module = importlib.util.find_spec("spikedecoder._C_cuda").origin
    return subprocess.run([tool, *options, module], capture_output=True, text=True, check=True).stdout


def test_a_build_that_could_have_it_has_it():
    """Else every test of it would be skipped without a word."""
    noted = ext.asked_for()
    asked = noted.get("build")
    if asked not in ("auto", "cuda") or not noted.get("nvcc"):
        pytest.skip(f"nothing was built here with nvcc (SPIKEDECODER_BUILD: {asked or 'nothing noted'})")
    assert ext.is_cuda_built(), ext.CUDA_NOT_BUILT


@needs_module
def test_by_default_it_is_for_sm_80_90_and_100_with_ptx():
    archs = ext.asked_for().get("cuda_archs", "80;90;100")
    if archs != "80;90;100":
        pytest.skip(f"it was built with SPIKEDECODER_CUDA_ARCHS={archs}")
    assert ext.info()["cuda"]["architectures"] == ["80-real", "90-real", "100-real", "100-virtual"]
    assert set(re.findall(r"sm_(\d+)", dump("-lelf"))) == {"80", "90", "100"}
    assert set(re.findall(r"sm_(\d+)", dump("-lptx"))) == {"100"}


@needs_module
def test_there_is_machine_code_for_each_architecture_and_ptx():
    architectures = ext.info()["cuda"]["architectures"]
    code, ptx = dump("-lelf"), dump("-lptx")
    for architecture in architectures:
        number, _, kind = architecture.partition("-")
        assert f"sm_{number}." in (code if kind == "real" else ptx)
    assert sum(a.endswith("virtual") for a in architectures) == 1


@needs_module
def test_no_kernel_spills():
    usage = re.findall(r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", dump("-res-usage"))
    assert any("gather_kernel" in name for name, *_ in usage)
    for name, registers, stack, local in usage:
        assert (int(stack), int(local)) == (0, 0), name
        assert int(registers) <= 64, name


@needs_module
@pytest.mark.parametrize("element", ["f", "6__half", "13__nv_bfloat16"])
def test_the_source_is_loaded_16_bytes_at_a_time(element):
    for function in dump("-sass").split("Function : ")[1:]:
        if re.match(rf"\S*gather_kernelI{element}Li[48]E", function):
            assert "LDG.E.128" in function
            assert "STG.E.128" in function
            break
    else:
        pytest.fail("no such kernel")


def test_without_a_gpu_the_reason_is_given():
    from spikedecoder.ext.cuda import NO_GPU, pack_spikes

    reason = pack_spikes.why_not(Call(torch.device("cuda"), torch.float32, (1, 64)))
    if torch.cuda.is_available():
        assert reason is None or not ext.is_cuda_built()
    else:
        assert reason == (NO_GPU if ext.is_cuda_built() else ext.CUDA_NOT_BUILT)


def test_a_module_built_from_other_sources_is_not_used_and_said_so(monkeypatch):
    """On a machine with a GPU; both the module and the GPU are made up."""
    from spikedecoder.ext import cuda

    module = ModuleType("spikedecoder._C_cuda")
    module.__spec__ = importlib.util.spec_from_loader(module.__name__, None)
    module.sources = "other"
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.warns(UserWarning, match=re.escape(ext.STALE)):
        assert cuda._load() == (None, ext.STALE)
    module.sources = _sources.fingerprint()
    assert cuda._load() == (module, None)


def test_a_kernel_is_queued_on_the_device_of_its_tensor_and_the_current_one_stays(monkeypatch):
    """A GPU that is not there: the runtime's calls are recorded."""
    from spikedecoder.ext.cuda import _arguments

    current, queued = [0], []

    @contextlib.contextmanager
    def device(index):
        before, current[0] = current[0], index
        yield
        current[0] = before

    def kernel(*arguments):
        queued.append((*arguments, current[0]))
        current[0] = arguments[-2]  # as cudaSetDevice leaves it

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7 + device))
    _arguments.launch(kernel, SimpleNamespace(device=1, get_device=lambda: 1), 40, 2)
    assert queued == [(40, 2, 1, 8, 1)]
    assert current == [0]


@pytest.mark.gpu
@needs_module
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_gpu_that_is_not_the_current_one():
    s, weight = torch.ones(3, 70, device="cuda:1"), torch.ones(5, 70, device="cuda:1")
    with torch.cuda.device(0), ops.use_backend("cuda"):
        assert torch.equal(ops.spike_linear(s, weight), s @ weight.t())
        assert torch.cuda.current_device() == 0


@pytest.mark.gpu
@needs_module
@pytest.mark.parametrize("case", cases("pack_spikes", "spike_linear"), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_parity(case, dtype):
    with ops.use_backend("cuda"):
        actual = run(case, make_inputs(case, dtype, "cuda"))
    with ops.use_backend("reference"):
        expected = run(case, make_inputs(case, torch.float64, "cuda"))
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    for name in actual:
        torch.testing.assert_close(
            actual[name].double(), expected[name].double(), rtol=tolerance, atol=tolerance
        )


@pytest.mark.gpu
@needs_module
def test_large_and_odd_shapes():
    """Whole numbers: every order of summation gives the same floats."""
    from spikedecoder.ext.cuda import pack_spikes, spike_linear

    generator = torch.Generator("cuda").manual_seed(0)
    for m, k, n in ((5000, 130, 77), (3, 4100, 2048), (1, 1, 1), (70_000, 64, 8)):
        s = (torch.rand(m, k, generator=generator, device="cuda") < 0.1).float()
        weight = torch.randint(-8, 9, (n, k), generator=generator, device="cuda").float()
        grad = torch.randint(-8, 9, (m, n), generator=generator, device="cuda").float()
        y, words = spike_linear.forward(s, weight, None)
        assert torch.equal(y, s @ weight.t())
        assert torch.equal(spike_linear.from_words(words, k, weight, None), y)
        assert torch.equal(pack_spikes.unpack(words, k, torch.float32), s)
        assert torch.equal(spike_linear.weight_grad(words, k, grad), grad.t() @ s)
