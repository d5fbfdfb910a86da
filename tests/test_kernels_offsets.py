"""Every kernel reaches the last element of tensors beyond 2^31, with no such tensor in memory.

The launches are recorded on tensors without memory; of each the first and the last programs then run under
the interpreter with pointers that point nowhere: loads give zeros, and every address is held against the
tensor that it must lie in. An offset that wrapped at 32 bits would lie outside or fall short of the end.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spikedecoder.params import ILIFParams, LIFParams

pytest.importorskip("triton")
import triton
import triton.language as tl
from triton.runtime import interpreter

from spikedecoder.kernels import _launch

pytestmark = pytest.mark.triton_interpreter
P = LIFParams()
BIG = 1 << 31


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def span(x: Tensor) -> int:
    """Elements from the first to the last."""
    return 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0


class Memory:
    """Addresses of tensors that are nowhere; what was touched of each."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.furthest: list[int] = []

    def pointer(self, x: Tensor) -> Any:
        self.tensors.append(x)
        self.furthest.append(-1)
        kind = tl.str_to_ty(triton.runtime.jit.mangle_type(x), None)
        address = np.array([len(self.tensors) << 48], dtype=np.uint64)
        return tl.tensor(interpreter.TensorHandle(address, kind), kind)

    def touch(self, pointers: Any, mask: Any) -> None:
        addresses = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, mask.data.shape))
        active = addresses[np.broadcast_to(mask.data, addresses.shape).astype(bool)]
        if active.size == 0:
            return
        owner = int(active.flat[0] >> 48) - 1
        assert 0 <= owner < len(self.tensors), "an address outside all tensors"
        size = self.tensors[owner].element_size()
        offsets = active.astype(np.int64) - ((owner + 1) << 48)
        low, high = int(offsets.min()) // size, int(offsets.max()) // size
        assert low >= 0 and high < span(self.tensors[owner]), f"elements {low} to {high} of tensor {owner}"
        self.furthest[owner] = max(self.furthest[owner], high)

    def load(self, builder: Any, pointers: Any, mask: Any, other: Any, *_: Any) -> Any:
        self.touch(pointers, mask)
        kind = pointers.get_element_ty()
        return interpreter.TensorHandle(np.zeros(pointers.data.shape, interpreter._get_np_dtype(kind)), kind)

    def store(self, builder: Any, pointers: Any, value: Any, mask: Any, *_: Any) -> None:
        self.touch(pointers, mask)


def run(launch: _launch.Launch, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[int, int]]:
    """Of each tensor by its argument's name: (the last element touched, the last there is)."""
    memory, builder = Memory(), type(interpreter.interpreter_builder)
    fn = launch.kernel.rewrite()
    constants = interpreter.GridExecutor(launch.kernel.fn, launch.kernel.arg_names, launch.grid).constexprs
    names, arguments = [], {}
    for name, value in launch.arguments.items():
        if isinstance(value, Tensor):
            names.append(name)
            arguments[name] = memory.pointer(value)
        else:
            arguments[name] = value if name in constants else interpreter._implicit_cvt(value)
    grid = (*launch.grid, 1, 1)[:3]
    with monkeypatch.context() as patch:
        patch.setattr(builder, "create_masked_load", lambda self, *a: memory.load(self, *a))
        patch.setattr(builder, "create_masked_store", lambda self, *a: memory.store(self, *a))
        scope = interpreter._patch_lang(launch.kernel.fn)
        try:
            interpreter.interpreter_builder.set_grid_dim(*grid)
            for index in itertools.product(*({0, n - 1} for n in grid)):
                interpreter.interpreter_builder.set_grid_idx(*index)
                fn(**inspect.getcallargs(fn, **arguments))
        finally:
            scope.restore()
    ends = (span(x) - 1 for x in memory.tensors)
    return dict(zip(names, zip(memory.furthest, ends, strict=True), strict=True))


def lif() -> None:
    from spikedecoder.kernels import lif as k

    for x in (meta(2, 1 << 22, 1024), meta(2, (1 << 23) + 3, 1001)):
        channel = meta(x.shape[-1], dtype=torch.float32)
        for limit in (1.0, channel):
            k.forward(x, limit, meta(*x.shape[1:], dtype=torch.float32), P)
            k.backward(x, meta(*x.shape[1:], dtype=torch.float32), x, limit, None, P)
    for shape in ((2, 1 << 28, 512), (16, 200_000_000, 1)):  # the latter has more rows times T than 2^31
        k.forward_packed(meta(*shape), 1.0, None, P, want_v=False)


def norm() -> None:
    from spikedecoder.kernels import norm as k

    for shape in ((1 << 23, 512), ((1 << 21) + 3, 1025), (3 << 30, 2)):
        x, channel = meta(*shape), meta(shape[-1], dtype=torch.float32)
        y, mean, rstd = k.forward(x, channel, channel, 1e-5, torch.float32)
        k.backward(y, x, mean, rstd, channel)


def norm_lif() -> None:
    from spikedecoder.kernels import norm_lif as k

    for shape in ((6, 1 << 22, 512), (2, (1 << 23) + 3, 1001), (2, 1 << 20, 8192), (1 << 16, 1 << 16, 2)):
        if shape[0] > 100:  # more rows than 2^31; so many timesteps only where none is walked
            k.moments(meta(*shape), True)
            continue
        x, channel = meta(*shape), meta(shape[-1], dtype=torch.float32)
        _, mean, rstd = k.forward(x, channel, channel, None, None, 1e-5, channel, P)
        k.backward_layer(x, x, channel, channel, mean, rstd, channel, P)
        k.forward(x, channel, channel, channel, channel, 1e-5, 1.0, P)
        k.backward_reduce(x, x, channel, channel, channel, channel, channel, P)
        k.backward_apply(x, x, channel, channel, channel, channel, 1.0, P, channel, channel, channel)


def norm_ilif() -> None:
    from spikedecoder.kernels import norm_lif as k

    p = ILIFParams(4)
    for shape in ((1 << 23, 512), (2, (1 << 23) + 3, 1001), (3 << 30, 2)):
        x, channel = meta(*shape), meta(shape[-1], dtype=torch.float32)
        _, mean, rstd = k.forward(x, channel, channel, None, None, 1e-5, 1.0, p)
        k.backward_layer(x, x, channel, channel, mean, rstd, 1.0, p)
        k.forward(x, channel, channel, channel, channel, 1e-5, 1.0, p)
        k.backward_reduce(x, x, channel, channel, channel, channel, 1.0, p)
        k.backward_apply(x, x, channel, channel, channel, channel, 1.0, p, channel, channel, channel)


def many_rows() -> None:
    from spikedecoder.kernels import norm_lif as k

    x, channel = (
        meta(3, 1 << 30, 2),
        meta(2, dtype=torch.float32),
    )  # 3 2^30 rows, each timestep fewer than 2^31
    _, mean, rstd = k.forward(x, channel, channel, None, None, 1e-5, 1.0, P)
    k.backward_layer(x, x, channel, channel, mean, rstd, 1.0, P)


def small() -> None:
    from spikedecoder.kernels import binarize, ilif, pack_spikes

    x, neurons = meta(1 << 24, 512), ILIFParams(4)
    binarize.backward(binarize.forward(x, 2.0), x, 2.0)
    _, mask = ilif.forward(x, neurons, True)
    ilif.backward(x, mask, neurons)
    pack_spikes.unpack(pack_spikes.pack(meta(1 << 28, 512)), 512, torch.bfloat16)


def linear() -> None:
    from spikedecoder.kernels import spike_linear as k

    for rows, inputs, outputs in ((1 << 25, 80, 320), (1 << 27, 320, 80)):
        words = meta(rows, -(-inputs // 64), dtype=torch.int64)
        y = k.from_words(words, inputs, meta(outputs, inputs), meta(outputs))
        k.weight_grad(words, inputs, y)
        k.weight_and_bias_grad(words, inputs, y)
    k.from_words(meta(64, 8, dtype=torch.int64), 512, meta(1 << 23, 512), None)


def linear_norm_lif() -> None:
    from spikedecoder.kernels import linear_norm_lif as k

    for inputs, outputs in ((80, 80), (80, 320)):
        s, channel = meta(2, 1 << 26, inputs), meta(outputs, dtype=torch.float32)
        for given in ((None, None), (channel, channel)):
            k.forward(s, meta(outputs, inputs), None, channel, channel, *given, 1e-5, 1.0, P)


def attention() -> None:
    from spikedecoder.kernels import spike_attention as k

    # many sequences, many heads in one, many segments
    for shape in ((2, 1 << 16, 64, 8, 64), (1, 1, 65, 1 << 21, 32), (1, 1 << 20, 130, 2, 16)):
        q = meta(*shape).transpose(2, 3)
        state = meta(*q.shape[:3], shape[-1], shape[-1], dtype=torch.float32)
        decay = meta(q.shape[2], dtype=torch.float32)
        k.forward(q, q, q, 0.125, None, state, True)
        k.backward(q, q, q, q, 0.125, None, None)
        k.backward(q, q, q, q, 0.125, decay, state)


def attention_lif() -> None:
    from spikedecoder.kernels import spike_attention_lif as k

    for shape in ((2, 1 << 16, 64, 8, 64), (2, 1, 65, 1 << 21, 32)):
        q = meta(*shape).transpose(2, 3)
        k.forward(q, q, q, 0.125, None, 1.0, P)


# loops over a whole tensor of partial results, which no real grid makes large
LOOPS = ("merge_bands", "add_parts")


def token_shift() -> None:
    from spikedecoder.kernels import token_shift as k

    x = meta(1 << 20, 40, 64)
    k.forward(x, 1)
    for groups in (4, 5):  # equally wide, and not: the last element is read some rows before its own
        k.forward(x, groups, back=True)


USES = [
    lif, norm, norm_lif, norm_ilif, many_rows, small, token_shift, linear, linear_norm_lif, attention,
    attention_lif,
]  # fmt: skip
IN_ONE = {linear_norm_lif: 100, attention_lif: 100}  # on sm_90 two kernels run in their place


@pytest.fixture(autouse=True)
def wide_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many programs that none walks long, and sequences in segments."""
    from spikedecoder.kernels import _norm, norm, norm_lif, spike_attention, spike_linear

    for module in (_norm, norm, norm_lif, spike_attention, spike_linear):
        monkeypatch.setattr(module, "multiprocessors", lambda device: 1 << 30)
    monkeypatch.setattr(spike_attention, "SEGMENT", 64)


def test_no_kernel_is_left_out() -> None:
    there = set()
    for path in Path(_launch.__file__).parent.glob("*.py"):
        there |= set(re.findall(r"@kernel\ndef (\w+)", path.read_text()))
    found = set()
    for use in USES:
        with _launch.record(IN_ONE.get(use, 90)) as launches:
            use()
        found |= {launch.kernel.__name__ for launch in launches}
    assert found == there


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_the_last_element_is_reached(use: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    with _launch.record(IN_ONE.get(use, 90)) as launches:
        use()
    seen: dict[object, str] = {}
    large = 0
    for launch in launches:
        shapes = tuple((n, v.shape) for n, v in launch.arguments.items() if isinstance(v, Tensor))
        name = launch.kernel.__name__
        if name in LOOPS or seen.setdefault((launch.key, shapes), name) in LOOPS:
            continue
        found = run(launch, monkeypatch)
        for argument, (last, end) in found.items():
            if end > BIG:
                large += 1
                assert last == end, f"{name}: {argument} is reached as far as element {last} of {end}"
    assert large


def test_an_offset_of_32_bits_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel below is wrong on purpose."""

    @triton.jit
    def narrow(x_ptr, rows, BLOCK: tl.constexpr):
        at = (rows - BLOCK + tl.arange(0, BLOCK)) * 1024
        tl.store(x_ptr + at, tl.zeros((BLOCK,), tl.float32), mask=tl.arange(0, BLOCK) < BLOCK)

    arguments = {"x_ptr": meta(1 << 22, 1024, dtype=torch.float32), "rows": 1 << 22, "BLOCK": 16}
    with pytest.raises(AssertionError, match="an address"):
        run(_launch.Launch(narrow, (1,), arguments, {}), monkeypatch)
