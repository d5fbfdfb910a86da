"""What a launch asks Triton for does not change with batch size or sequence length: nothing compiles anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from spikedecoder.params import ILIFParams, LIFParams

pytest.importorskip("triton")
from spikedecoder.kernels import _launch

Make = Callable[..., Tensor]
SHAPES = [(1, 1), (1, 7), (1, 256), (2, 33), (3, 100), (8, 64), (16, 129), (32, 256), (16, 1000), (64, 2048)]
P = LIFParams()


def lif(batch: int, tokens: int, make: Make, c: int = 80) -> None:
    from spikedecoder.kernels import lif as k

    x, threshold = make(4, batch, tokens, c), make(c).float()
    for limit in (1.0, threshold):
        k.forward(x, limit, None, P)
        k.backward(x, None, x, limit, None, P)
    k.forward_packed(x, 1.0, None, P, want_v=False)


def norm(batch: int, tokens: int, make: Make, c: int = 80) -> None:
    from spikedecoder.kernels import norm as k

    x, weight = make(4, batch, tokens, c), make(c).float()
    y, mean, rstd = k.forward(x, weight, weight, 1e-5, torch.float32)
    k.backward(y, x, mean, rstd, weight)


def norm_lif(batch: int, tokens: int, make: Make, c: int = 80) -> None:
    """And norm_ilif, whose kernels these are."""
    from spikedecoder.kernels import norm_lif as k

    x, weight = make(4, batch, tokens, c), make(c).float()
    k.moments(x, True)
    for x, p in ((x, P), (x[0], ILIFParams(4))):  # noqa: B020
        _, mean, rstd = k.forward(x, weight, weight, None, None, 1e-5, 1.0, p)
        k.backward_layer(x, x, weight, weight, mean, rstd, 1.0, p)
        k.forward(x, weight, weight, weight, weight, 1e-5, 1.0, p)
        k.backward_reduce(x, x, weight, weight, weight, weight, 1.0, p)
        k.backward_apply(x, x, weight, weight, weight, weight, 1.0, p, weight, weight, weight)


def small(batch: int, tokens: int, make: Make, c: int = 80) -> None:
    from spikedecoder.kernels import binarize, ilif, pack_spikes

    x = make(batch, tokens, c)
    binarize.backward(binarize.forward(x, 2.0), x, 2.0)
    s, mask = ilif.forward(x, ILIFParams(4), True)
    assert mask is not None
    ilif.backward(s, mask, ILIFParams(4))
    pack_spikes.unpack(pack_spikes.pack(x), c, x.dtype)


def linear(batch: int, tokens: int, make: Make, c: int = 80) -> None:
    from spikedecoder.kernels import spike_linear as k

    y, words = k.forward(make(4, batch, tokens, c), make(2 * c, c), make(2 * c))
    k.weight_grad(words, c, y)
    k.weight_and_bias_grad(words, c, y)


def linear_norm_lif(batch: int, tokens: int, make: Make, c: int = 80) -> None:
    from spikedecoder.kernels import linear_norm_lif as k

    s, channel = make(4, batch, tokens, c), make(4 * c).float()
    for given in ((None, None), (channel, channel)):
        k.forward(s, make(4 * c, c), None, channel, channel, *given, 1e-5, 1.0, P)


def heads(batch: int, tokens: int, make: Make, c: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, of heads enough to fill a GPU, their decays and a state."""
    d = 16 if c % 16 == 0 else 4
    q = make(4, batch, tokens, c // d, d).transpose(2, 3)
    return q, make(c // d).float(), make(4, batch, c // d, d, d).float()


def attention(batch: int, tokens: int, make: Make, c: int = 80) -> None:
    from spikedecoder.kernels import spike_attention as k

    q, decay, state = heads(batch, tokens, make, c)
    for past in ((None, None), (decay, state)):
        k.forward(q, q, q, 0.125, *past, past[1] is not None)
        k.backward(q, q, q, q, 0.125, *past)


def attention_lif(batch: int, tokens: int, make: Make, c: int = 80) -> None:
    from spikedecoder.kernels import spike_attention_lif as k

    q, decay, _ = heads(batch, tokens, make, c)
    for past in (None, decay):
        k.forward(q, q, q, 0.125, past, 1.0, P)
        k.backward(q, q, q, q, 0.125, past, 1.0, P)


USES = [lif, norm, norm_lif, small, linear, linear_norm_lif, attention, attention_lif]


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
@pytest.mark.parametrize("channels", [80, 36])
@pytest.mark.parametrize("target", [80, 89, 90, 100, 120])
def test_no_shape_asks_for_another_kernel(use: Callable[..., None], target: int, channels: int) -> None:
    """Nor where channels are no multiple of 16, which elements are at some of the shapes."""
    keys = []
    for batch, tokens in SHAPES:
        with _launch.record(target) as launches:
            use(batch, tokens, meta, channels)
        keys.append({launch.key for launch in launches})
    assert keys[0] and all(found == keys[0] for found in keys)


@pytest.mark.parametrize(
    ("target", "family"), [(80, 8), (86, 8), (89, 8), (90, 9), (100, 10), (103, 10), (110, 10), (120, 8)]
)
def test_block_sizes_go_by_the_tensor_cores(target: int, family: int) -> None:
    with _launch.record(target):
        assert _launch.family(torch.device("meta")) == family


@pytest.mark.parametrize("use", [attention, attention_lif], ids=lambda use: use.__name__)
@pytest.mark.parametrize(("target", "most"), [(80, 2), (90, 3), (100, 1), (120, 2)])
def test_on_sm_100_loops_of_several_products_load_one_chunk(
    use: Callable[..., None], target: int, most: int
) -> None:
    """With more, Triton compiles them wrongly there; `bench/emulate.py` shows it."""
    with _launch.record(target) as launches:
        use(8, 300, meta)
    products = [launch for launch in launches if "attention" in launch.kernel.__name__]
    assert max(launch.options["num_stages"] for launch in products) == most


@pytest.mark.parametrize(("channels", "align"), [(80, 16), (1000, 8), (36, 4), (18, 2), (5, 1)])
@pytest.mark.parametrize("use", [lif, norm, norm_lif, small], ids=lambda use: use.__name__)
def test_channels_are_known_to_be_what_they_are_divisible_by(
    use: Callable[..., None], channels: int, align: int
) -> None:
    """Or the compiler would read and write element by element."""
    with _launch.record(90) as launches:
        use(2, 3, meta, channels)
    found = {launch.arguments["ALIGN"] for launch in launches if "ALIGN" in launch.arguments}
    assert found == {align}


@pytest.mark.parametrize("target", [80, 89, 90, 100, 120])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("p", [P, ILIFParams(4)], ids=["lif", "ilif"])
def test_what_norm_lif_asks_for_is_there(p: Any, dtype: torch.dtype, target: int) -> None:
    """Registers and shared memory of a multiprocessor, for any width and time."""
    from spikedecoder.kernels import norm_lif as k

    for T in (1, 2, 4, 5, 8, 9, 16, 17, 64):
        for channels in (3, 80, 96, 256, 384, 512, 1280, 2048, 2560, 3072, 4096, 8192):
            x = torch.empty((T, 64, channels), dtype=dtype, device="meta")
            for statistics in (k.CHANNEL, k.ROW if channels <= k.MAX_ROW else k.WIDE_ROW):
                for sums in (False, True):
                    with _launch.record(target):
                        way = k._backward_way(T, x, statistics, sums, p)
                        programs = way.programs(x.element_size(), x.device)
                        most = _launch.shared_memory(x.device)
                    threads, case = 32 * way.tile["num_warps"], (T, channels, statistics, sums, way)
                    assert 1 <= way.chunk <= T and way.stages >= 1, case
                    assert programs * threads * way.registers <= k.REGISTERS, case
                    assert threads <= 512 and programs * way.shared(x.element_size()) <= most, case
                    if statistics == k.ROW:
                        assert way.tile["SLICES"] * way.tile["BLOCK_C"] >= channels, case


@pytest.mark.parametrize("use", [attention, attention_lif], ids=lambda use: use.__name__)
def test_long_sequences_too_few_to_fill_a_gpu_add_one_variant(use: Callable[..., None]) -> None:
    keys = set()
    for batch, tokens in [*SHAPES, (1, 1100), (1, 8192), (2, 65536)]:
        with _launch.record(90) as launches:
            use(batch, tokens, meta)
        keys |= {launch.key for launch in launches}
    with _launch.record(90) as launches:
        use(8, 64, meta)
    short = {launch.key for launch in launches}
    with _launch.record(90) as launches:
        use(1, 8192, meta)
    assert keys == short | {launch.key for launch in launches}


def test_the_key_does_change_with_what_is_compiled_in() -> None:
    def keys(T: int, dtype: torch.dtype, channels: int = 80) -> set[object]:
        from spikedecoder.kernels import lif as k

        with _launch.record(90) as launches:
            k.forward(torch.empty(T, 3, channels, dtype=dtype, device="meta"), 1.0, None, P)
        return {launch.key for launch in launches}

    assert (
        len(
            keys(4, torch.float32)
            | keys(4, torch.bfloat16)
            | keys(5, torch.float32)
            | keys(4, torch.float32, 9)
        )
        == 4
    )


def compiled(kernels: set[object]) -> int:
    return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())  # type: ignore[attr-defined]


@pytest.mark.gpu
@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_nothing_is_compiled_after_the_first_shape(use: Callable[..., None]) -> None:
    def make(*shape: int) -> Tensor:
        return (torch.rand(shape, device="cuda") < 0.3).to(torch.bfloat16)

    with _launch.record(10 * _launch.family(torch.device("cuda"))) as launches:
        use(2, 33, meta)
    kernels = {launch.kernel for launch in launches}
    use(*SHAPES[-1], make)
    before = compiled(kernels)
    assert before > 0
    for batch, tokens in SHAPES:
        use(batch, tokens, make)
    assert compiled(kernels) == before


@pytest.mark.gpu
def test_lif_beyond_2_31_elements() -> None:
    from spikedecoder.kernels import lif as k

    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    x = torch.zeros(1, (1 << 31) + 1024, dtype=torch.bfloat16, device="cuda")
    x[0, -1000:] = 4
    spikes, _ = k.forward(x, 1.0, None, P, want_v=False)
    assert spikes[0, -1000:].all() and spikes.sum(dtype=torch.float64) == 1000


@pytest.mark.triton_interpreter
def test_the_interpreters_types_are_tritons_own() -> None:
    """They are remembered; what Triton works out anew is the same."""
    import triton.language as tl
    from triton.runtime import interpreter

    remembered, dtype_of = (tl.block_type.__init__, tl.tensor.__init__), interpreter._get_np_dtype
    for scalar in (tl.float32, tl.bfloat16, tl.int1, tl.int64, tl.pointer_type(tl.float16)):
        for shape in ([16], [4, 8], [tl.constexpr(2), tl.constexpr(4), tl.constexpr(8)]):
            for _ in range(2):
                found, own = tl.block_type(scalar, shape), object.__new__(tl.block_type)
                remembered[0].__wrapped__(own, scalar, shape)
                assert found == own and vars(found).keys() == vars(own).keys()
                assert (str(found), found.numel, list(found.shape)) == (str(own), own.numel, list(own.shape))
                assert dtype_of(found) == dtype_of.__wrapped__(own)
                for kind in (found, scalar):
                    value, same = tl.tensor("handle", kind), object.__new__(tl.tensor)
                    remembered[1].__wrapped__(same, "handle", kind)
                    assert vars(value).keys() == vars(same).keys()
                    for name in ("handle", "type", "dtype", "numel"):
                        assert getattr(value, name) == getattr(same, name)
                    assert [size.value for size in value.shape] == [size.value for size in same.shape]
