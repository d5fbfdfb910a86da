"""Choice of backend, registration with torch.library, and errors at the boundary."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from spikedecoder import BackendError, ops, use_backend
from spikedecoder.ops import _dispatch
from spikedecoder.ops.norm import statistics
from spikedecoder.params import ILIFParams, LIFParams, NormParams
from spikedecoder.testing import CALLS, CASES, cases, leaves, make_inputs, run

X = torch.ones(4, 2, 8)
NONE = torch.ones(0)


def _fake_backend(monkeypatch, tmp_path, name, source):
    """A package with one operator module, known as backend `name`."""
    package = tmp_path / f"fake_{name}_{tmp_path.name}"  # modules stay loaded: a name of its own each
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "lif.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(_dispatch.BACKENDS, name, package.name)
    _dispatch._load.cache_clear()
    monkeypatch.setattr(_dispatch, "_PREFERENCE", {"cpu": (name, "reference")})


@pytest.fixture(autouse=True)
def fresh_cache():
    yield
    _dispatch._load.cache_clear()


ZEROS = """
import torch
def forward(x, threshold, v_init, p):
    return torch.zeros_like(x), torch.zeros_like(x[0])
"""


def test_auto_prefers_the_first_backend_that_can(monkeypatch, tmp_path):
    refuses = ZEROS + "def why_not(call):\n    return 'too small' if call.shape[0] < 4 else None\n"
    _fake_backend(monkeypatch, tmp_path, "fast", refuses)
    big = torch.full((4, 3), 5.0)
    with use_backend("auto"):
        assert not ops.lif(big).any()  # the fake answered
        assert ops.lif(big[:2]).all()  # the reference did
    assert _dispatch.explain("lif", _dispatch.Call(big.device, big.dtype, (2, 3)))[0] == ("fast", "too small")


def test_forced_backend_runs_or_says_why(monkeypatch, tmp_path):
    _fake_backend(monkeypatch, tmp_path, "fast", ZEROS + "def why_not(call):\n    return 'it is Tuesday'\n")
    with (
        use_backend("fast"),
        pytest.raises(BackendError, match=r"lif: backend 'fast' .* it is Tuesday(?!.*or one of.*fast)"),
    ):
        ops.lif(X)
    with (
        use_backend("fast"),
        pytest.raises(BackendError, match=r"binarize: backend 'fast' .* it has no binarize"),
    ):
        ops.binarize(X)


def test_missing_dependency_is_a_reason_and_a_fault_is_not_hidden(monkeypatch, tmp_path):
    _fake_backend(monkeypatch, tmp_path, "needy", "import a_module_that_is_not_there\n")
    assert ops.lif(X).shape == X.shape
    with (
        use_backend("needy"),
        pytest.raises(BackendError, match="a_module_that_is_not_there is not installed"),
    ):
        ops.lif(X)
    _fake_backend(monkeypatch, tmp_path, "broken", "1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        ops.lif(X)


def test_use_backend_as_function_and_context(monkeypatch):
    monkeypatch.setattr(_dispatch, "_forced", None)
    monkeypatch.delenv("SPIKEDECODER_BACKEND", raising=False)
    assert _dispatch.requested_backend() == "auto"
    use_backend("reference")
    assert _dispatch.requested_backend() == "reference"
    with use_backend("auto"):
        assert _dispatch.requested_backend() == "auto"
    assert _dispatch.requested_backend() == "reference"
    with pytest.raises(RuntimeError, match="inside"), use_backend("auto"):
        raise RuntimeError("inside")
    assert _dispatch.requested_backend() == "reference"


def test_use_backend_as_a_decorator_holds_while_the_function_runs():
    @use_backend("reference")
    def backend(first, *, second):
        assert (first, second) == (1, 2)
        return _dispatch.requested_backend()

    for _ in range(2):
        before = _dispatch.requested_backend()
        assert before != "reference" and backend(1, second=2) == "reference"
        assert _dispatch.requested_backend() == before
    assert backend.__name__ == "backend"


def test_use_backend_holds_in_other_threads():
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(_dispatch.requested_backend()))
        thread.start()
        thread.join()
    assert seen == ["reference"]


def test_backward_uses_the_backend_of_its_forward(monkeypatch, tmp_path):
    _fake_backend(
        monkeypatch, tmp_path, "fast", ZEROS + "def backward(g, gv, x, th, v, p):\n    raise AssertionError\n"
    )
    x = X.clone().requires_grad_()
    with use_backend("reference"):
        spikes = ops.lif(x)
    spikes.sum().backward()
    assert x.grad is not None


def test_unknown_backend():
    with pytest.raises(
        ValueError, match=r"use_backend: got 'gpu', takes auto or one of reference, triton, cpu, cuda"
    ):
        use_backend("gpu")


def test_constants_are_marked_as_the_compiler_marks_them() -> None:
    """... without importing it, which would take a second of every start."""
    marked = (mark(lambda: None) for mark in (_dispatch.constant, torch.compiler.assume_constant_result))
    assert len({tuple(vars(function).items()) for function in marked}) == 1


@pytest.mark.parametrize(
    ("value", "expect"),
    [("reference", "ok"), ("nonsense", "SPIKEDECODER_BACKEND: got 'nonsense'"), ("", "ok")],
)
def test_environment_variable(value, expect):
    code = "import torch, spikedecoder as s; s.ops.lif(torch.ones(2, 3)); print('ok')"
    env = {"SPIKEDECODER_BACKEND": value, "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert expect in done.stdout + done.stderr


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.operator in ("lif", "ilif", "binarize", "spike_attention", "pack_spikes")],
    ids=str,
)
def test_opcheck(case):
    if case.name in ("T16", "S130-d20", "wide"):
        pytest.skip("covered by its smaller siblings")
    inputs = make_inputs(case)
    if case.operator == "lif":
        x = inputs["x"]
        threshold = inputs["v_threshold"] if isinstance(inputs.get("v_threshold"), torch.Tensor) else None
        args = (x, threshold, inputs.get("v_init"), 2.0, 1.0, 0.0, True, "sigmoid", 4.0, True, "reference")
        op = torch.ops.spikedecoder.lif.default
    elif case.operator == "ilif":
        args = (inputs["x"], inputs["levels"], inputs.get("v_threshold", 1.0), True, "reference")
        op = torch.ops.spikedecoder.ilif.default
    elif case.operator == "binarize":
        op, args = torch.ops.spikedecoder.binarize.default, (inputs["x"], 2.0, "reference")
    elif case.operator == "pack_spikes":
        op, args = torch.ops.spikedecoder.pack_spikes.default, (inputs["spikes"], "reference")
    else:
        op = torch.ops.spikedecoder.spike_attention.default
        rest = (inputs.get("return_state", False), "reference", inputs.get("levels", 1))
        tensors = (inputs.get("decay"), inputs.get("state"), *NO_WORDS)
        args = (inputs["q"], inputs["k"], inputs["v"], 0.125, *tensors, *rest)
    torch.library.opcheck(op, args)


NEURON = LIFParams().flat()
NO_WORDS = (None, None, None)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("return_state", [False, True])
def test_opcheck_of_packed_lif(backend, return_state):
    x, threshold, v_init = torch.randn(3, 2, 70) + 1, torch.full((70,), 0.5), torch.randn(2, 70)
    for args in ((x, None, None), (x.bfloat16(), threshold, v_init)):
        torch.library.opcheck(
            torch.ops.spikedecoder.lif_packed.default, (*args, *NEURON, backend, return_state)
        )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("shape", [(4, 1), (5, 3, 63), (1, 2, 3, 64), (2, 130), (3, 0, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_lif_is_lif_then_pack(shape, dtype, backend):
    generator = torch.Generator().manual_seed(0)
    x, v_init = (torch.randn(s, generator=generator).to(dtype) + 0.5 for s in (shape, shape[1:]))
    options = {"v_threshold": torch.full(shape[-1:], 0.75), "v_init": v_init, "return_state": True}
    with use_backend(backend):
        spikes, v = ops.lif(x, **options)
        words, last = ops.lif(x, **options, packed=True)
        torch._dynamo.reset()
        compiled = torch.compile(ops.lif, fullgraph=True, backend="aot_eager")
        assert torch.equal(words, ops.pack_spikes(spikes)) and torch.equal(last, v)
        assert torch.equal(compiled(x, **options, packed=True)[0], words)
        assert torch.equal(ops.unpack_spikes(words, shape[-1], dtype), spikes)


def test_packed_lif_refuses_where_a_gradient_would_be_lost():
    x, threshold = X.clone().requires_grad_(), torch.tensor(0.5, requires_grad=True)
    for options, name in (({"x": x}, "x"), ({"x": X, "v_threshold": threshold}, "v_threshold")):
        with pytest.raises(ValueError, match=rf"packed: .* {name} requires one"):
            ops.lif(**options, packed=True)
        with torch.no_grad():
            assert not ops.lif(**options, packed=True).requires_grad


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("operator", "name"),
    [
        *(("norm_lif", name) for name in ("layer-train", "batch-train", "batch-eval", "threshold")),
        *(("norm_ilif", name) for name in ("layer-train", "batch-train", "batch-eval", "wide")),
    ],
)
def test_opcheck_of_norms_with_neurons(operator, name, backend):
    inputs = make_inputs(next(c for c in cases(operator) if c.name == name))
    x, n = inputs["x"], inputs["n"]
    found = statistics(x, n)
    mean, rstd = (None, None) if found is None else (found.mean, found.rstd)
    threshold, neuron = [inputs.get("threshold")], NEURON
    if operator == "norm_ilif":
        threshold, neuron = [], inputs["p"].flat()
    rest = (*threshold, None, None, None, n.eps, n.training, None, *neuron, backend)
    overload = getattr(torch.ops.spikedecoder, operator).default
    torch.library.opcheck(overload, (x, n.weight, n.bias, mean, rstd, *rest))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_opcheck_of_spike_linear_and_attention_lif(backend):
    i = make_inputs(cases("spike_linear")[1])
    torch.library.opcheck(
        torch.ops.spikedecoder.spike_linear.default, (i["s"], i["weight"], i["bias"], backend)
    )
    q, k, v = (torch.rand(2, 1, 2, 5, 8).round().requires_grad_() for _ in range(3))
    bits = [ops.pack_spikes(x.detach().transpose(2, 3).flatten(-2)) for x in (q, k, v)]
    for words, shape in ((NO_WORDS, ()), (bits, ()), (bits, (2, 8))):
        threshold = torch.full(shape, 0.7, requires_grad=True)
        arguments = (q, k, v, 0.125, None, threshold, *words, *NEURON, backend)
        torch.library.opcheck(torch.ops.spikedecoder.spike_attention_lif.default, arguments)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("shape", [(3, 80, 20), (2, 5, 64, 7), (300, 130, 48), (0, 3, 2)], ids=str)
def test_spike_linear_of_words_is_that_of_their_spikes(shape, backend):
    *rows, channels, outputs = shape
    generator = torch.Generator().manual_seed(0)
    s = (torch.rand(*rows, channels, generator=generator) < 0.3).float()
    weight, bias = torch.randn(outputs, channels, generator=generator), torch.ones(outputs)
    upstream = torch.randn(*rows, outputs, generator=generator)

    def run(spikes, call):
        leaves = [weight.clone().requires_grad_(), bias.clone().requires_grad_()]
        y = call(spikes, *leaves)
        y.backward(upstream)
        return y.detach(), *(leaf.grad for leaf in leaves)

    with use_backend(backend):
        words = ops.pack_spikes(s)
        expected, found = run(s, ops.spike_linear), run(words, ops.spike_linear)
        torch._dynamo.reset()
        compiled = run(words, torch.compile(ops.spike_linear, fullgraph=True, backend="aot_eager"))
        for a, b, c in zip(expected, found, compiled, strict=True):
            assert torch.equal(a, b) and torch.equal(a, c)
        with torch.no_grad():
            assert torch.equal(ops.spike_linear(words, weight, bias), expected[0])
    leaves = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    torch.library.opcheck(
        torch.ops.spikedecoder.spike_linear_from_words.default, (words, channels, *leaves, backend)
    )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    "shape", [(5, 2, 0, 3), (40, 0, 16), (5, 7, 0), (0, 0, 3), (7, 3), (130, 16), (0, 3)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_spike_linear_of_no_channels_and_of_one_row(dtype, shape, with_bias, packed, backend):
    *rows, channels, outputs = shape
    generator = torch.Generator().manual_seed(0)
    s = (torch.rand(*rows, channels, generator=generator) < 0.5).to(dtype)
    weight = torch.randint(-8, 9, (outputs, channels), generator=generator).to(dtype)
    bias = torch.randint(-8, 9, (outputs,), generator=generator).to(dtype) if with_bias else None
    upstream = torch.randint(-8, 9, (*rows, outputs), generator=generator).to(dtype)

    def run(call, spikes):
        leaves = [None if x is None else x.clone().requires_grad_() for x in (spikes, weight, bias)]
        leaves = [x for x in leaves if x is not None]
        arguments = [pack(leaves[0]), *leaves[1:]]
        y = call(*arguments)
        return y.detach(), *torch.autograd.grad(y, leaves[1:] if packed else leaves, upstream)

    def pack(spikes):
        return ops.pack_spikes(spikes.detach()) if packed else spikes

    wanted = run(lambda spikes, *rest: torch.nn.functional.linear(s if packed else spikes, *rest), s)
    with use_backend(backend):
        found = run(ops.spike_linear, s)
        with torch.no_grad():
            alone = ops.spike_linear(pack(s), weight, bias)
    for got, expected in zip((*found, alone), (*wanted, wanted[0]), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_neurons_of_an_empty_timestep_take_any_threshold(backend):
    x = torch.ones(4, 0, 3, 8, requires_grad=True)
    layer = NormParams("layer", torch.ones(8), torch.zeros(8))
    for shape in ((), (8,), (3, 1), (0, 3, 8)):
        threshold = torch.ones(shape, requires_grad=True)
        with use_backend(backend):
            for spikes in (
                ops.lif(x, v_threshold=threshold),
                ops.norm_lif(x, layer, LIFParams(), threshold=threshold),
            ):
                (grad,) = torch.autograd.grad(spikes.sum(), threshold)
                assert spikes.shape == x.shape and grad.shape == shape and not grad.any()
    q = torch.ones(4, 0, 3, 5, 8, requires_grad=True)
    threshold = torch.ones(3, 1, 8, requires_grad=True)
    with use_backend(backend):
        spikes = ops.spike_attention_lif(q, q, q, LIFParams(), threshold=threshold)
    (grad,) = torch.autograd.grad(spikes.sum(), threshold)
    assert spikes.shape == q.shape and not grad.any()


def test_spike_linear_refuses_words_of_more_channels():
    """A bit's number is that of a row of the weight: one that there is not is never read."""
    weight = torch.ones(3, 70)
    with pytest.raises(ValueError, match=r"s: got int64 of shape \(5, 1\), .* \[\.\.\., 2\] for 70"):
        ops.spike_linear(torch.zeros(5, 1, dtype=torch.int64), weight)
    words = torch.zeros(5, 2, dtype=torch.int64)
    words[3, 1] = 1 << 6
    with use_backend("cpu"), pytest.raises(ValueError, match="words: bits are set beyond the last channel"):
        ops.spike_linear(words, weight)
    with use_backend("reference"):
        assert not ops.spike_linear(words, weight).any()


def test_outputs_do_not_alias_and_inputs_stay():
    for case in cases():
        inputs = make_inputs(case)
        before = {n: t.detach().clone() for n, t in inputs.items() if isinstance(t, torch.Tensor)}
        run(case, inputs)
        for name, value in before.items():
            assert torch.equal(inputs[name], value), f"{case}: {name} was changed"


ONE_OF_EACH = [next(c for c in CASES if c.operator == name) for name in CALLS if name != "pack_spikes"]


class _Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", cases(), ids=str)
def test_what_passes_the_dispatcher_by_is_what_it_gives(case):
    with use_backend("cpu"):
        alone = run(case, make_inputs(case))
        with _Watch():
            watched = run(case, make_inputs(case))
    assert alone.keys() == watched.keys()
    for name, value in alone.items():
        assert torch.equal(value, watched[name]), name


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_a_tensor_that_holds_its_negative_is_its_values(case):
    """As the imaginary part of a conjugated tensor does: its memory is not what it says."""

    def negative(x):
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        return torch._neg_view(-x.detach()).requires_grad_(x.requires_grad)

    with use_backend("cpu"):
        expected = run(case, make_inputs(case))
        found = run(case, {name: negative(x) for name, x in make_inputs(case).items()})
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_a_result_can_be_changed_in_place(case, backend):
    """Autograd forbids it for a view that was made inside of its function."""

    def gradients(change):
        inputs = make_inputs(case)
        out = CALLS[case.operator](**inputs)
        loss = out.square().sum()
        if change:
            out += 1
            loss = (out - 1).square().sum()
        return torch.autograd.grad(loss, list(leaves(inputs).values()))

    with use_backend(backend):
        for changed, expected in zip(gradients(True), gradients(False), strict=True):
            torch.testing.assert_close(changed, expected)


@pytest.mark.parametrize("constant", [True, False], ids=["constant", "learned"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_a_gradient_that_is_differentiated_again_says_that_it_cannot_be(case, backend, constant):
    """Also where the gradient that comes in is a constant: the slope of a spike depends on the input."""
    if case.operator in ("norm", "token_shift") or (case.operator, backend) == ("spike_linear", "reference"):
        pytest.skip("torch's own, which can be")
    if constant and (case.operator == "ilif" or (backend == "cpu" and "attention" in case.operator)):
        pytest.skip("keeps bits or a mask, which nothing is differentiated by")
    inputs = make_inputs(case)
    with use_backend(backend):
        out = CALLS[case.operator](**inputs)
        wanted = list(leaves(inputs).values())
        upstream = torch.ones_like(out, requires_grad=not constant)
        once = torch.autograd.grad(out, wanted, upstream, retain_graph=True)
        again = torch.autograd.grad(out, wanted, upstream, create_graph=True)
        for found, expected in zip(again, once, strict=True):
            assert torch.equal(found, expected)
        with pytest.raises(RuntimeError, match=r"cannot be differentiated again|no autograd formula"):
            torch.autograd.grad(sum(g.square().sum() for g in again), wanted if constant else upstream)


Q = torch.ones(2, 1, 2, 4, 8)
ONES = torch.ones(8)
EYE = torch.eye(8)
NAN, INF = float("nan"), float("inf")
LAYER = NormParams("layer", torch.ones(8), torch.zeros(8))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.lif([1.0]), TypeError, "x: got list, takes a torch.Tensor"),
        (lambda: ops.lif(torch.ones(4, 2).long()), TypeError, "x: got dtype torch.int64"),
        (lambda: ops.lif(torch.ones(())), ValueError, r"x: got shape \(\)"),
        (lambda: ops.lif(torch.ones(0, 3)), ValueError, "x: got T = 0 timesteps"),
        (lambda: ops.lif(X, tau=0.5), ValueError, "tau: got 0.5"),
        (lambda: ops.lif(X, tau=True), TypeError, r"tau: got True \(bool\), takes a finite number >= 1"),
        (lambda: ops.lif(X, tau=float("nan")), ValueError, "tau: got nan"),
        (lambda: ops.lif(X, alpha=0), ValueError, "alpha: got 0"),
        *(
            (lambda n=name, v=value: ops.lif(X, **{n: v}), error, f"^{name}: got .*, takes ")
            for name in ("tau", "v_threshold", "v_reset", "alpha")
            for value, error in (
                *((v, ValueError) for v in (NAN, INF, -INF, 10**400)),
                *((v, TypeError) for v in ("2", [2.0])),
            )
        ),
        (lambda: ops.lif(X, tau=torch.tensor(2.0)), TypeError, r"tau: got tensor.*takes a finite number"),
        (lambda: ops.lif(X, v_threshold=None), TypeError, "v_threshold: got None"),
        (lambda: ops.lif(X, decay_input=0.5), TypeError, r"decay_input: got 0.5 \(float\), takes True or"),
        (lambda: ops.lif(X, detach_reset="no"), TypeError, "detach_reset: got 'no'"),
        (lambda: ops.lif(X, v_threshold=torch.tensor(1j)), TypeError, "v_threshold: got dtype torch.complex"),
        (lambda: ops.lif(X, v_init=0.0), TypeError, "v_init: got float, takes a torch.Tensor"),
        (lambda: ops.lif(X.to_sparse()), TypeError, "x: got layout torch.sparse_coo"),
        (lambda: ops.ilif(X, levels=2.0), TypeError, "levels: got 2.0, takes an integer"),
        (lambda: ops.ilif(X, levels=2, v_threshold="1"), TypeError, "v_threshold: got '1'"),
        (lambda: ops.ilif(X, levels=2, v_threshold=0), ValueError, "v_threshold: got 0, takes a finite"),
        (lambda: ops.lif(X, surrogate="no"), ValueError, "surrogate: got 'no'"),
        (lambda: ops.lif(X, v_init=torch.ones(3)), ValueError, r"v_init: got shape \(3,\)"),
        (lambda: ops.lif(X, v_threshold=torch.ones(3)), ValueError, r"v_threshold: got shape \(3,\)"),
        (lambda: ops.lif(X, v_threshold=torch.ones(4, 2, 8)), ValueError, "v_threshold: got shape"),
        (lambda: ops.lif(X, v_init=torch.ones(2, 8, device="meta")), ValueError, "different devices"),
        (lambda: ops.lif(torch.ones(4), packed=True), ValueError, r"x: got shape \(4,\), takes at least 2"),
        (lambda: ops.binarize(X, alpha=-1), ValueError, "alpha: got -1"),
        (lambda: ops.binarize(X, alpha="2"), TypeError, "alpha: got '2'"),
        (lambda: ops.lif_params(X, ILIFParams(4)), TypeError, "p: got ILIFParams, takes LIFParams"),
        (lambda: ops.ilif_params(X, LIFParams()), TypeError, "p: got LIFParams, takes ILIFParams"),
        (lambda: ops.pack_spikes(X.to_sparse()), TypeError, "spikes: got layout torch.sparse_coo"),
        (
            lambda: ops.norm_lif(
                X[..., :0], NormParams("batch", NONE, NONE, running=(NONE, NONE)), LIFParams()
            ),
            ValueError,
            r"x: got no channels \(shape \(4, 2, 0\)\), takes at least 1 for batch",
        ),
        (
            lambda: ops.pack_spikes(torch.ones(())),
            TypeError,
            r"spikes: got torch.float32 of shape \(\), takes a tensor",
        ),
        (lambda: ops.unpack_spikes([3], 3), TypeError, "words: got list, takes an int64 tensor"),
        (lambda: ops.unpack_spikes(torch.ones(2, 1), 3), TypeError, "words: got torch.float32 of shape"),
        (
            lambda: ops.unpack_spikes(torch.ones(2, 1).long(), 3.5),
            TypeError,
            "channels: got 3.5, takes an in",
        ),
        (lambda: ops.unpack_spikes(torch.ones(2, 0).long(), -3), ValueError, "channels: got -3 for 0 words"),
        *(
            (
                lambda x=x, r=running: ops.norm(X.to(x), NormParams("batch", ONES, ONES, running=(r, r))),
                TypeError,
                f"running_mean: got dtype {running.dtype}, takes {takes} for x of",
            )
            for x, running, takes in (
                (torch.float64, ONES, "torch.float64"),
                (torch.float32, ONES.double(), "torch.float32"),
                (torch.float16, ONES.bfloat16(), "torch.float16 or torch.float32"),
            )
        ),
        (lambda: ops.spike_counts([1.0], 1), TypeError, "s: got list, takes a torch.Tensor"),
        (
            lambda: ops.unrolled_linear(X, EYE, ONES[:1], levels=3),
            ValueError,
            r"bias: got shape \(1,\), takes",
        ),
        (lambda: ops.unrolled_linear(X, EYE, [0.0] * 8, levels=3), TypeError, "bias: got list"),
        *(
            (lambda k=given: ops.unrolled_attention(Q, Q, Q, **k, levels=3), error, message)
            for given, error, message in (
                ({"dropout": -0.1}, ValueError, "dropout: got -0.1, takes a probability"),
                ({"dropout": 0.1}, ValueError, "dropout: got 0.1, takes 0"),
                ({"dropout": "1"}, TypeError, "dropout: got '1'"),
                ({"scale": NAN}, ValueError, "scale: got nan"),
                ({"scale": "1"}, TypeError, "scale: got '1'"),
                ({"state": [0.0]}, TypeError, "state: got list"),
                ({"state": torch.zeros(1).long()}, TypeError, "state: got dtype torch.int64"),
                ({"state": torch.zeros(1)}, ValueError, r"state: got shape \(1,\), takes \[T, B, H, d, d\]"),
            )
        ),
        (lambda: ops.unpack_spikes(torch.ones(2, 1).long(), 65), ValueError, "channels: got 65 for 1 words"),
        (lambda: ops.spike_attention(Q[0], Q[0], Q[0]), ValueError, r"q: got shape .* takes 5 dimensions"),
        (lambda: ops.spike_attention(Q, Q[..., :4], Q), ValueError, "k: got shape"),
        (lambda: ops.spike_attention(Q, Q, Q.double()), TypeError, "v: got dtype torch.float64"),
        (lambda: ops.spike_attention(Q, Q, Q, decay=torch.ones(3)), ValueError, "decay: got shape"),
        *(
            (lambda o=operator, v=value: o(decay=torch.tensor([0.5, v])), ValueError, "decay: got .* 1]")
            for operator in (
                lambda **k: ops.spike_attention(Q, Q, Q, **k),
                lambda **k: ops.spike_attention_lif(Q, Q, Q, LIFParams(), **k),
            )
            for value in (-0.5, 0.0, 1.5, NAN, INF)
        ),
        (lambda: ops.spike_attention(Q, Q, Q, decay=torch.ones(2).int()), TypeError, "decay: got dtype"),
        (lambda: ops.spike_attention(Q, Q, Q, scale=NAN), ValueError, "scale: got nan"),
        (lambda: ops.spike_attention(Q, Q, Q, scale="1"), TypeError, "scale: got '1'"),
        (lambda: ops.spike_attention(Q, Q, Q, levels=1.5), TypeError, "levels: got 1.5"),
        (lambda: ops.spike_attention(Q, Q, Q, state=1), TypeError, "state: got int"),
        (lambda: ops.spike_attention_lif(Q, Q, Q, 1.0), TypeError, "p: got float, takes LIFParams"),
        (lambda: ops.spike_attention(Q, Q, Q, state=torch.ones(3)), ValueError, "state: got shape"),
        *(
            (
                lambda s=shape: ops.spike_attention_lif(Q, Q, Q, LIFParams(), threshold=torch.ones(s)),
                ValueError,
                r"v_threshold: got shape .* broadcasts to \(2, 1, 8\)",
            )
            for shape in ((3,), (2, 8), (2, 4, 8), (1, 2, 1, 8))
        ),
        (lambda: ops.spike_linear(X, torch.ones(3, 9)), ValueError, "s: got 8 channels"),
        (lambda: ops.spike_linear(None, torch.ones(3, 8)), TypeError, "s: got NoneType, takes a torch"),
        (lambda: ops.spike_linear(X, None), TypeError, "weight: got NoneType, takes a torch"),
        (lambda: ops.spike_linear(X.int(), torch.ones(3, 8)), TypeError, "s: got dtype torch.int32"),
        (lambda: ops.spike_linear(X.long(), torch.ones(3, 8)), ValueError, "takes floats, or words"),
        (lambda: ops.spike_linear(X, torch.ones(3, 8), torch.ones(2)), ValueError, r"bias: got shape \(2,\)"),
        (lambda: ops.spike_linear(X, torch.ones(3, 8, device="meta")), ValueError, "different devices"),
        (lambda: ops.spike_attention(Q[:0], Q[:0], Q[:0]), ValueError, "q: got T = 0 timesteps"),
        (lambda: ops.spike_attention(Q, Q, Q.to("meta")), ValueError, "different devices"),
        (lambda: ops.norm_lif(X[:0], LAYER, LIFParams()), ValueError, "x: got T = 0 timesteps"),
        (lambda: ops.norm_lif(X.long(), LAYER, LIFParams()), TypeError, "x: got dtype torch.int64"),
        (lambda: ops.norm_lif(X[..., :3], LAYER, LIFParams()), ValueError, "x: got 3 channels"),
        (lambda: ops.norm_lif(X.to("meta"), LAYER, LIFParams()), ValueError, "different devices"),
        (
            lambda: ops.norm_ilif(ONES, LAYER, ILIFParams(4)),
            ValueError,
            r"x: got shape \(8,\), takes at least 2",
        ),
        (lambda: ops.norm_ilif(X.long(), LAYER, ILIFParams(4)), TypeError, "x: got dtype torch.int64"),
        (lambda: ops.norm_ilif(X, LAYER, LIFParams()), TypeError, "p: got LIFParams, takes ILIFParams"),
        (lambda: ops.norm_lif(X, LAYER, None), TypeError, "p: got NoneType, takes LIFParams"),
        (lambda: ops.norm_lif(X, None, LIFParams()), TypeError, "n: got NoneType, takes NormParams"),
        *(
            (lambda t=threshold: ops.norm_lif(X, LAYER, LIFParams(), threshold=t), TypeError, message)
            for threshold, message in (
                (0.5, "v_threshold: got float, takes a torch.Tensor"),
                (torch.tensor(1), "v_threshold: got dtype torch.int64"),
            )
        ),
        (lambda: ops.linear_norm(X, EYE, None, None), TypeError, "n: got NoneType, takes NormParams"),
        (
            lambda: ops.linear_norm_lif(X, EYE, None, None, LIFParams()),
            TypeError,
            "n: got NoneType, takes NormParams",
        ),
        (
            lambda: ops.linear_norm_lif(X, EYE, None, LAYER, LIFParams(), threshold=0.5),
            TypeError,
            "v_threshold: got float",
        ),
        (lambda: NormParams("layer", ONES, ONES, eps=-1.0), ValueError, "eps: got -1.0"),
        (lambda: NormParams("batch", ONES, ONES, momentum=1.5), ValueError, "momentum: got 1.5, takes a"),
        (lambda: NormParams("power", ONES, ONES, warmup=-1), ValueError, "warmup: got -1, takes an integer"),
        (lambda: NormParams("power", ONES, ONES, warmup=1.5), TypeError, r"warmup: got 1.5 \(float\), takes"),
        (lambda: NormParams("power", ONES, ONES, warmup=True), TypeError, "warmup: got True"),
        *(
            (lambda o=operator, n=norm: o(n), error, message)
            for norm, error, message in (
                (
                    NormParams("layer", ONES, torch.zeros(7)),
                    ValueError,
                    r"bias: got shape \(7,\), takes that of",
                ),
                (NormParams("layer", ONES, ONES.to("meta")), ValueError, "different devices"),
                (NormParams("layer", None, ONES), TypeError, "weight: got NoneType, takes a torch.Tensor"),
                (NormParams("layer", ONES.long(), ONES), TypeError, "weight: got dtype torch.int64"),
                (
                    NormParams("batch", ONES, ONES),
                    ValueError,
                    r"running: got 0 .* \(running_mean, running_var",
                ),
                (
                    NormParams("batch", ONES, ONES, running=(ONES, ONES.to("meta")), training=False),
                    ValueError,
                    "running_var on meta",
                ),
                (
                    NormParams("batch", ONES, ONES, running=(None, ONES)),
                    TypeError,
                    "running_mean: got NoneType",
                ),
                (
                    NormParams("batch", ONES, ONES, running=(ONES, ONES.int())),
                    TypeError,
                    "running_var: got dtype torch.int32",
                ),
                (NormParams("power", ONES, ONES, running=(ONES, ONES, 0)), TypeError, "iters: got int"),
                (NormParams("batch", ONES, ONES, running=None), TypeError, "running: got NoneType, takes a"),
                (
                    NormParams("power", ONES, ONES, running=(torch.ones(9), ONES, torch.tensor(0))),
                    ValueError,
                    r"running_phi: got shape \(9,\)",
                ),
            )
            for operator in (
                lambda n: ops.norm_lif(X, n, LIFParams()),
                lambda n: ops.norm_ilif(X, n, ILIFParams(4)),
                lambda n: ops.norm(X, n),
            )
        ),
        (lambda: ops.spike_linear(X, torch.ones(3, 8), torch.ones(3).long()), TypeError, "bias: got dtype"),
        (lambda: ops.spike_attention(Q, Q, Q, decay=[0.5, 0.5]), TypeError, "decay: got list"),
        (lambda: ops.spike_attention(Q, Q, Q, dropout=-0.1), ValueError, "dropout: got -0.1"),
        (
            lambda: ops.spike_attention_lif(Q, Q, Q, LIFParams(), dropout=float("nan")),
            ValueError,
            "dropout: got nan",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
