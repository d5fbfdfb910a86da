"""The extension in its process: choice of variant, threads, fork, memory, bad arguments; and its absence."""

from __future__ import annotations

import ast
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import operators
import pytest
import torch

from spikedecoder import _waiting, ext, ops
from spikedecoder.ext import _sources
from spikedecoder.params import LIFParams

needs_extension = pytest.mark.skipif(not ext.is_built(), reason=ext.NOT_BUILT)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SPIKEDECODER_")}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**clean, **environment},
    )


VARIANT = "from spikedecoder.ext.cpu import native; print(native.variant())"


@needs_extension
def test_a_variant_can_be_asked_for():
    from spikedecoder.ext.cpu import native

    for name in native.variants():
        assert run_python(VARIANT, SPIKEDECODER_CPU=name).stdout.strip() == name
    assert run_python(VARIANT).stdout.strip() == native.variants()[0]
    assert native.variants()[-1] == "baseline"


@needs_extension
def test_a_variant_that_the_cpu_lacks_is_an_error(monkeypatch):
    from spikedecoder.ext import cpu

    monkeypatch.setenv("SPIKEDECODER_CPU", "avx1024")
    with pytest.raises(ValueError, match="SPIKEDECODER_CPU: got 'avx1024', takes what this CPU has: "):
        cpu._choose_variant()


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_of_results(dtype, monkeypatch):
    """Aligned; freed with the last tensor, or when none was made of it; torch's where malloc is not tuned."""
    from spikedecoder.ext import cpu
    from spikedecoder.ext.cpu import _memory

    large = 1 << 20
    shape, size = (3, large, 2), 3 * large * 2 * dtype.itemsize
    monkeypatch.setattr(cpu, "KEEPS_FREED_MEMORY", True)
    x = _memory.empty(shape, dtype)
    assert (x.shape, x.dtype, x.is_contiguous(), x.data_ptr() % 64) == (shape, dtype, True, 0)
    view = x.fill_(3)[2, -1]
    del x
    for small in ((), (5, 0), (1, 3)):
        y = _memory.empty(small, dtype)
        assert (y.shape, y.dtype, y.is_contiguous(), y.data_ptr() % 64) == (small, dtype, True, 0)
    again = _memory.empty(shape, dtype)
    assert torch.equal(view, torch.tensor([3, 3], dtype=dtype))
    del again
    first = _memory.empty(shape, dtype).data_ptr()
    for _ in range(50):
        _memory.empty(shape, dtype)
        cpu.native.empty(shape, _memory._TYPES[dtype])
    assert abs(_memory.empty(shape, dtype).data_ptr() - first) < 20 * size
    with pytest.raises(ValueError, match="sizes"):
        cpu.native.empty([-1, 4], 0)
    with pytest.raises(MemoryError):
        cpu.native.empty([1 << 45], 0)
    with pytest.raises(RuntimeError, match="resizable"):
        _memory.empty(shape, dtype).resize_(2 * size)
    monkeypatch.setattr(cpu, "KEEPS_FREED_MEMORY", False)
    assert _memory.empty(shape, dtype).resize_(7, 2 * large).shape == (7, 2 * large)


@pytest.mark.parametrize(
    ("load", "turns"),
    [("0.9 0.5 0.2 1/81 7", "10000"), ("0.1 0.1 0.1 2/81 7", "1000"), ("none", "1000"), (None, "1000")],
    ids=("alone", "beside others", "not Linux's", "no file"),
)
def test_waiting_threads_spin_long_where_nothing_else_runs(tmp_path, load, turns):
    path = tmp_path / "loadavg"
    if load is not None:
        path.write_text(load)
    assert _waiting.spins(path) == turns


def test_how_threads_wait_can_be_given():
    code = (
        "import os, spikedecoder; print(*(os.environ.get(n) for n in ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY')))"
    )
    assert run_python(code, GOMP_SPINCOUNT="77").stdout.split() == ["77", "None"]
    without = "import os; del os.environ['GOMP_SPINCOUNT']; " + code
    assert run_python(without, GOMP_SPINCOUNT="", OMP_WAIT_POLICY="passive").stdout.split() == [
        "None",
        "passive",
    ]
    assert run_python(without, GOMP_SPINCOUNT="").stdout.split()[0] in (_waiting.LONG, _waiting.SHORT)


@needs_extension
def test_malloc_is_tuned_unless_told_otherwise():
    """Once some large blocks have come and gone, up to eleven as heaps lie, one more faults no pages in."""
    code = """
import resource, torch, spikedecoder.ext.cpu
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(24):
    faults()
print(faults(), spikedecoder.ext.cpu.KEEPS_FREED_MEMORY)
"""
    tuned, kept = run_python(code).stdout.split()
    untuned, not_kept = run_python(code, SPIKEDECODER_TUNE_MALLOC="0").stdout.split()
    if kept == "False":
        pytest.skip("this C library has no mallopt")
    assert not_kept == "False"
    pages = (64 << 20) // 4096
    assert int(tuned) < pages / 100
    assert int(untuned) > int(tuned)


@needs_extension
@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(), reason="needs Linux's huge pages"
)
def test_large_results_lie_in_huge_pages_where_linux_has_them():
    code = """
from pathlib import Path
import torch, spikedecoder.ext.cpu as cpu
from spikedecoder.ext.cpu._memory import empty
kept = [empty([8 << 20]).fill_(1) for _ in range(4)]
size = asked = 0
for line in Path("/proc/self/smaps").read_text().splitlines():
    name, *values = line.split()
    if name == "Size:":
        size = int(values[0])
    elif name == "VmFlags:" and "hg" in values:
        asked += size
print(asked, cpu.KEEPS_FREED_MEMORY)
"""
    asked, kept = run_python(code).stdout.split()
    not_asked, _ = run_python(code, SPIKEDECODER_TUNE_MALLOC="0").stdout.split()
    if kept == "False":
        pytest.skip("this C library has no mallopt")
    assert int(asked) > 4 * (32 << 10)  # KiB
    assert int(not_asked) == 0


@needs_extension
def test_from_several_python_threads():
    """Also products with bfloat16 weights, whose choice, columns and rounding threads share."""
    torch.manual_seed(0)
    x, s = torch.randn(4, 50, 333), (torch.rand(4, 64, 200) < 0.2).float()
    weights = [torch.randn(96, 200).to(dtype) for dtype in (torch.float32, torch.bfloat16)]

    def results() -> list[torch.Tensor]:
        own = [w.clone().requires_grad_() for w in weights]
        products = [ops.spike_linear(s.to(w.dtype), w) for w in own]
        return [
            ops.lif(x),
            *products,
            *torch.autograd.grad([y.float().square().sum() for y in products], own),
        ]

    with ops.use_backend("cpu"):
        expected = results()
        wrong = []

        def work():
            for _ in range(20):
                if not all(map(torch.equal, results(), expected)):
                    wrong.append(threading.get_ident())

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


@needs_extension
def test_the_number_of_threads_does_not_change_the_result():
    from spikedecoder.ext.cpu import lif, norm_lif, spike_linear

    before = torch.get_num_threads()
    x, s = torch.randn(4, 64, 1000), (torch.rand(4096, 200) < 0.1).float()
    weight, bias, p = torch.ones(1000), torch.zeros(1000), LIFParams()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(
                (
                    *lif.forward(x, 1.0, None, p),
                    *norm_lif.forward(x, weight, bias, None, None, 1e-5, 1.0, p),
                    *spike_linear.forward(s, torch.arange(600.0).view(3, 200), None, "gather"),
                )
            )
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@needs_extension
def test_fewer_threads_than_asked_for():
    """OpenMP may give a team of one where two were asked for: every part is done all the same."""
    code = """
import torch
torch.set_num_threads(2)
from spikedecoder.ext.cpu import lif, norm_lif
from spikedecoder.params import LIFParams
torch.manual_seed(0)
x, p = torch.randn(4, 64, 1000), LIFParams()
threshold = torch.tensor(0.7)
print(lif.backward(x, None, x, threshold, None, p)[1].item())
weight, bias = torch.ones(1000), torch.zeros(1000)
_, mean, rstd = norm_lif.forward(x, weight, bias, None, None, 1e-5, 1.0, p)
print(norm_lif.backward_layer(x, x, weight, bias, mean, rstd, 1.0, p)[1].sum().item())
"""
    limited, free = (run_python(code, OMP_THREAD_LIMIT=limit).stdout.split() for limit in ("1", "16"))
    assert len(free) == 2
    assert [float(a) for a in limited] == pytest.approx([float(b) for b in free], rel=1e-5)


@needs_extension
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("used", [True, False], ids=["operators", "torch alone"])
@pytest.mark.parametrize("preset", ["default", "default-lif"])
def test_a_forked_child_does_not_hang(preset, used):
    """The parent's OpenMP threads are gone in the child; waiting for them would hang it. `used`: whether the
    parent has run operators, or only torch's own."""
    code = f"""
import os, signal, sys, torch
import spikedecoder
torch.set_num_threads(2)
def work():
    torch.manual_seed(0)
    config = spikedecoder.SpikeDecoderConfig.preset({preset!r}, vocab_size=30, blocks=1)
    model = spikedecoder.SpikeDecoder(config)
    ids = torch.arange(4 * 128).reshape(4, 128) % 30
    loss = model.loss(ids, ids)
    loss.backward()
    return loss.item(), model.generate(ids[:1, :4], 8, seed=0).tolist()
torch.rand(1 << 20).sigmoid().sum()
before = work() if {used} else None
child = os.fork()
if child == 0:
    signal.alarm(60)
    after = work()
    # sums are taken in another order, which may move a spike
    same = before is None or abs(after[0] - before[0]) < 0.02 * before[0]
    os._exit(0 if same and len(after[1][0]) == 12 else 1)
assert torch.get_num_threads() == 2
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


@needs_extension
@pytest.mark.parametrize(
    "start", [m for m in ("fork", "spawn") if m in multiprocessing.get_all_start_methods()]
)
def test_in_workers_of_a_data_loader(start):
    """Sums, neurons and their gradients, in a worker started after this process has used its threads."""
    dataset = operators.Operators()
    expected = dataset[1]
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=None, num_workers=1, multiprocessing_context=start, timeout=100
    )
    _, found = loader
    for name, value in expected.items():
        # the number of threads is another there, and with it the order of sums over rows
        torch.testing.assert_close(found[name], value, msg=name)


@needs_extension
def test_the_gil_is_released():
    """Python runs on while a kernel does: no pause is as long as the kernel."""
    from spikedecoder.ext.cpu import lif

    x = torch.randn(64, 1 << 18)

    def longest_pause() -> float:
        """Of this thread while another runs the kernel, in parts of the kernel's time."""
        spent = []

        def work():
            start = time.perf_counter()
            lif.forward(x, 1.0, None, LIFParams())
            spent.append(time.perf_counter() - start)

        thread = threading.Thread(target=work)
        longest, last = 0.0, time.perf_counter()
        thread.start()
        while thread.is_alive():
            now = time.perf_counter()
            longest, last = max(longest, now - last), now
        return longest / spent[0]

    # other processes make pauses too, but not in every one of five runs; a held GIL does
    assert min(longest_pause() for _ in range(5)) < 0.8


@needs_extension
def test_bad_arguments_are_refused_before_anything_is_touched():
    from spikedecoder.ext.cpu import native

    x = torch.randn(8)
    for sizes in ((-1, 8), (1 << 40, 1 << 40)):
        with pytest.raises(ValueError, match="sizes"):
            native.pack(x.data_ptr(), 0, x.data_ptr(), *sizes, 1)
    with pytest.raises(ValueError, match="values: got a null address"):
        native.pack(0, 0, x.data_ptr(), 1, 8, 1)
    with pytest.raises(ValueError, match="words: address is not aligned"):
        native.pack(x.data_ptr(), 0, x.data_ptr() + 4, 1, 8, 1)
    with pytest.raises(ValueError, match="type: takes 0"):
        native.pack(x.data_ptr(), 3, x.data_ptr(), 1, 8, 1)
    with pytest.raises(ValueError, match="a_type: takes 0"):
        native.matmul(x.data_ptr(), 2, x.data_ptr(), 0, 0, x.data_ptr(), 0, 0, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="grad: got a null address"):
        native.dense_weight_grad(x.data_ptr(), 0, 0, 0, x.data_ptr(), 1, 8, 8, 1)
    with pytest.raises(ValueError, match="type: takes 0"):
        native.dense_weight_grad(x.data_ptr(), 3, x.data_ptr(), 0, x.data_ptr(), 1, 8, 8, 1)
    with pytest.raises(ValueError, match="sizes"):
        native.dense_weight_grad(x.data_ptr(), 0, x.data_ptr(), 0, x.data_ptr(), 1, -1, 8, 1)
    with pytest.raises(ValueError, match="threads"):
        native.pack(x.data_ptr(), 0, x.data_ptr(), 1, 8, 0)
    with pytest.raises(ValueError, match="tau"):
        native.Neuron(0.5, 0.0, True, 0, 4.0, True)
    with pytest.raises(ValueError, match="no variant"):
        native.use_variant("mmx")


@needs_extension
def test_other_dtypes_and_devices_are_refused_with_the_reason():
    with (
        ops.use_backend("cpu"),
        pytest.raises(ops.BackendError, match=r"takes float32 and bfloat16, got torch\.float64"),
    ):
        ops.lif(torch.randn(2, 3, dtype=torch.float64))
    assert ops.lif(torch.randn(2, 3, dtype=torch.float64)).dtype == torch.float64  # auto finds another


def test_the_fingerprint_of_the_sources(tmp_path):
    shutil.copytree(_sources.CSRC, tmp_path / "csrc")
    copy = tmp_path / "csrc"
    assert _sources.fingerprint(copy) == _sources.fingerprint()
    (copy / "tests" / "test_kernels.cpp").write_text("")
    assert _sources.fingerprint(copy) == _sources.fingerprint()
    (copy / "lif.cpp").write_text((copy / "lif.cpp").read_text().replace("0.3", "0.4"))
    assert _sources.fingerprint(copy) != _sources.fingerprint()
    assert _sources.fingerprint(tmp_path) is None  # an installed package has no sources beside it


@needs_extension
def test_an_extension_built_from_other_sources_is_not_used():
    code = """
from spikedecoder.ext import _sources
_sources.fingerprint = lambda: "other"
import torch
from spikedecoder import ext, ops
from spikedecoder.ops._dispatch import Call, explain
ops.lif(torch.randn(2, 3))
print(dict(explain("lif", Call(torch.device("cpu"), torch.float32, (2, 3)))))
print(ext.info()["cpu"])
with ops.use_backend("cpu"):
    ops.lif(torch.randn(2, 3))
"""
    done = run_python(code)
    rows, info = map(ast.literal_eval, done.stdout.splitlines())
    assert rows == {"cpu": ext.STALE, "reference": "chosen"}
    assert info == {"built": True, "stale": True, "mend": ext.STALE}
    assert f"UserWarning: {ext.STALE}" in done.stderr  # auto does not fall back without a word
    assert "BackendError" in done.stderr


def test_info_says_what_there_is():
    info = ext.info()
    assert set(info) == {"cpu", "cuda"}
    if ext.is_built():
        assert info["cpu"]["variant"] in info["cpu"]["variants"]
        assert info["cpu"]["threads"] == torch.get_num_threads()
        assert info["cpu"]["compiler"]
        assert not info["cpu"]["stale"]
        assert isinstance(info["cpu"]["features"], list)
        assert info["cpu"]["vendor"] in ("intel", "amd", "other")
    else:
        assert info["cpu"]["mend"] == ext.NOT_BUILT
    for part in info.values():
        assert part["built"] or part["mend"]


def test_without_the_extension_the_reason_is_given_and_the_reference_runs():
    code = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "spikedecoder._C" else find(name, *a)
import torch
from spikedecoder import ext, ops
ops.lif(torch.randn(2, 3))
print(ext.info()["cpu"])
with ops.use_backend("cpu"):
    ops.lif(torch.randn(2, 3))
"""
    done = run_python(code)
    assert "'built': False" in done.stdout
    assert "BackendError" in done.stderr
    assert ext.NOT_BUILT in done.stderr
