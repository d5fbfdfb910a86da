"""Drop-in neurons against the libraries they stand in for; skipped where a library is absent."""

from __future__ import annotations

import copy
import importlib
import pickle
import types

import pytest
import torch
from torch import nn

from spikedecoder.compat.accelerate import accelerate


def _library(name):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name} is not installed ({error})")


OLD = pytest.mark.parametrize("old", [True, False], ids=["0.0.0.0.14", "2.0"])


def _part(old, name):
    return _library(f"spikingjelly.{'clock_driven' if old else 'activation_based'}.{name}")


def _lif(old, **options):
    neuron = _part(old, "neuron")
    return neuron.MultiStepLIFNode(**options) if old else neuron.LIFNode(step_mode="m", **options)


def _network(old, **options):
    """A small convolutional classifier of the kind the library's examples build, multi-step."""
    wrap = _part(old, "layer").SeqToANNContainer
    torch.manual_seed(0)
    network = nn.Sequential(
        wrap(nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)),
        _lif(old, **options),
        wrap(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6 * 4 * 4, 20)),
        _lif(old, **options),
        wrap(nn.Linear(20, 10)),
        _lif(old, **options),
    )
    with torch.no_grad():  # strong enough for every layer to fire
        for name, p in network.named_parameters():
            if name.startswith(("2.", "4.")):
                p.mul_(6)
    return network


def _reset(old, model):
    _part(old, "functional").reset_net(model)


def _mnist_net(old):
    """The libraries' own network for MNIST, of the paper on learnable membrane time constants."""
    part = "clock_driven" if old else "activation_based"
    models = _library(f"spikingjelly.{part}.model.parametric_lif_net")
    neuron, surrogate = _part(old, "neuron"), _part(old, "surrogate").ATan()
    options = {"channels": 8, "surrogate_function": surrogate, "detach_reset": True}
    if old:
        network = models.MultiStepMNISTNet(multi_step_neuron=neuron.MultiStepLIFNode, **options)
        return network, lambda net, x: net(x[0], len(x))
    network = models.MNISTNet(spiking_neuron=neuron.LIFNode, **options)
    _part(old, "functional").set_step_mode(network, "m")
    return network, lambda net, x: net(x)


def _spikformer(old):
    """SpikingJelly 2.0's own Spikformer, small."""
    if old:
        pytest.skip("0.0.0.0.14 has none")
    model = _library("spikingjelly.activation_based.model.spikformer")
    size = {"img_size_h": 28, "img_size_w": 28, "patch_size": 4, "embed_dims": 32, "depths": 1}
    network = model.Spikformer(T=4, in_channels=1, num_classes=10, num_heads=4, **size)
    _part(old, "functional").set_step_mode(network, "m")
    return network, lambda net, x: net(x[0])


@OLD
@pytest.mark.parametrize("make", [_mnist_net, _spikformer])
def test_their_own_networks(old, make):
    torch.manual_seed(0)
    theirs, call = make(old)
    with torch.no_grad():  # strong enough for every layer to fire
        for p in theirs.parameters():
            p.mul_(4 if make is _mnist_net and p.dim() > 1 else 2)
    ours = copy.deepcopy(theirs)
    report = accelerate(ours)
    assert len(report) >= 4 and not any(r.reason for r in report), [str(r) for r in report]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = 4 * torch.randn(4, 2, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    outputs = []
    for network in (theirs, ours):
        torch.manual_seed(2)  # dropout
        outputs.append(call(network, x))
    assert torch.equal(*outputs) and outputs[0].any()
    upstream = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(3))
    for network, out in zip((theirs, ours), outputs, strict=True):
        out.backward(upstream)
        _reset(old, network)
    for (name, p), q in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        if p.grad is not None:
            largest = p.grad.abs().max().item()
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-5 * largest, msg=name)
    assert sum(p.grad is not None and bool(p.grad.any()) for p in ours.parameters()) > 5


OPTIONS = [
    {},
    {"detach_reset": True},
    {"v_reset": None, "detach_reset": True},
    {"tau": 4.0, "v_threshold": 0.5},
    {"v_reset": -0.25, "v_threshold": 0.5},
]


@OLD
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_same_outputs_gradients_and_keys(old, options):
    theirs = _network(old, **options)
    ours = copy.deepcopy(theirs)
    report = accelerate(ours)
    assert [r.reason for r in report] == [None] * 3, [str(r) for r in report]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.rand(6, 3, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 3
    for _ in range(2):  # the second pass goes on from the first one's memory
        a, b = theirs(x), ours(x)
        assert torch.equal(a, b) and a.any()
    _reset(old, theirs)
    _reset(old, ours)
    theirs(x).square().sum().backward()
    ours(x).square().sum().backward()
    for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-5)
    assert [r.reason for r in accelerate(ours)] == [None] * 3  # asking twice changes nothing


@OLD
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_an_accelerated_model_is_copied_and_saved_whole(old, copied):
    model = _network(old, tau=3.0)
    accelerate(model)
    x = torch.rand(6, 3, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 3
    with torch.no_grad():
        model(x)  # there is a memory to keep
    other = copied(model)
    assert type(other[1]) is type(model[1]) and other[1] is not model[1]
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("surrogate", ["Sigmoid", "ATan", "PiecewiseQuadratic", "Rect"])
def test_surrogates_of_spikingjelly_2(surrogate):
    module = _part(False, "surrogate")
    if not hasattr(module, surrogate):
        pytest.skip(f"this SpikingJelly has no surrogate {surrogate}")
    theirs = _network(False, surrogate_function=getattr(module, surrogate)(alpha=1.5), detach_reset=True)
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    x = torch.rand(4, 2, 1, 8, 8, generator=torch.Generator().manual_seed(2)) * 3
    assert torch.equal(theirs(x), ours(x))
    _reset(False, theirs)
    _reset(False, ours)
    theirs(x).square().sum().backward()
    ours(x).square().sum().backward()
    for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-5)


def test_what_is_left_alone_says_why():
    neuron, surrogate = _part(False, "neuron"), _part(False, "surrogate")
    model = nn.Sequential(
        neuron.LIFNode(step_mode="s"),
        neuron.LIFNode(step_mode="m", store_v_seq=True),
        neuron.LIFNode(step_mode="m", surrogate_function=surrogate.Erf()),
        neuron.IFNode(step_mode="m"),
    )
    reasons = [r.reason for r in accelerate(model)]
    assert "single-step mode" in reasons[0] and "store_v_seq" in reasons[1]
    assert "surrogate Erf" in reasons[2] and "IFNode is not a multi-step LIF" in reasons[3]
    assert type(model[0]) is neuron.LIFNode


def test_snntorch_leaky_is_left_alone_and_says_why():
    snn = _library("snntorch")
    model = nn.Sequential(nn.Linear(3, 4), snn.Leaky(beta=0.9, init_hidden=True))
    (entry,) = accelerate(model)
    assert "strictly above the threshold" in entry.reason and "one timestep after" in entry.reason
    assert type(model[1]) is snn.Leaky


def test_a_model_without_neurons_is_an_error():
    with pytest.raises(ValueError, match="holds no neuron of SpikingJelly's or snnTorch's"):
        accelerate(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model: got str"):
        accelerate("model")


def _pair(old, change=lambda neuron: None, **options):
    """(theirs, ours), changed alike after ours was replaced."""
    theirs = nn.Sequential(_lif(old, **options))
    ours = copy.deepcopy(theirs)
    assert [r.reason for r in accelerate(ours)] == [None]
    change(theirs[0])
    change(ours[0])
    return theirs, ours


def _current(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2 + 0.5


CHANGES = {  # attribute, and its value
    "store_v_seq": ("store_v_seq", lambda old: True),
    "surrogate": ("surrogate_function", lambda old: _part(old, "surrogate").Erf()),
    "spiking": ("surrogate_function", lambda old: _part(old, "surrogate").Sigmoid(spiking=False)),
    "v broadcasts": ("v", lambda old: torch.full((1, 5), 0.4)),
    "v scalar": ("v", lambda old: torch.tensor(0.4)),
    "v double": ("v", lambda old: torch.full((4, 5), 0.4, dtype=torch.float64)),
}


@OLD
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_afterwards_is_followed(old, change):
    name, value = CHANGES[change]
    theirs, ours = _pair(old, lambda n: setattr(n, name, value(old)))
    x = _current(6, 4, 5)
    a, b = theirs(x), ours(x)
    assert a.dtype == b.dtype and torch.equal(a, b)
    torch.testing.assert_close(ours[0].v, theirs[0].v)
    if change == "store_v_seq":
        torch.testing.assert_close(ours[0].v_seq, theirs[0].v_seq)
    (entry,) = accelerate(ours)
    assert (entry.reason is None) == change.startswith("v ")


@OLD
def test_what_is_put_in_a_neurons_own_place_is_called(old):
    def charge(self, x):
        self.v = self.v + 0.3 * x

    def own_charge(neuron):
        neuron.neuronal_charge = types.MethodType(charge, neuron)

    theirs, ours = _pair(old, own_charge)
    x = _current(6, 4, 5)
    assert torch.equal(theirs(x), ours(x))
    assert accelerate(ours)[0].reason == "neuronal_charge is this neuron's own, not its class's"

    calls = []

    def hook(neuron):
        neuron.surrogate_function.register_forward_hook(lambda *_: calls.append(neuron))

    theirs, ours = _pair(old, hook, surrogate_function=_part(old, "surrogate").Sigmoid())
    assert torch.equal(theirs(x), ours(x)) and calls.count(theirs[0]) == calls.count(ours[0])
    assert "hooks" in accelerate(ours)[0].reason


def test_a_smaller_last_batch_starts_a_new_memory_as_in_spikingjelly_2():
    theirs, ours = _pair(False)
    with torch.no_grad():
        for batch in (4, 3):
            x = _current(6, batch, 5)
            try:
                a = theirs(x)
            except RuntimeError:
                pytest.skip("this SpikingJelly takes one size of batch between resets")
            assert torch.equal(ours(x), a)


@OLD
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_potentials_in_float32(old, dtype):
    theirs, ours = _pair(old)
    x = _current(16, 64, 64).to(dtype)
    with torch.no_grad():
        spikes = ours(x)
        assert spikes.dtype == ours[0].v.dtype == dtype
        assert (spikes != theirs(x)).float().mean() < 2e-3
        theirs[0].reset()
        assert torch.equal(spikes.float(), theirs(x.float()))
        torch.testing.assert_close(ours[0].v, theirs[0].v.to(dtype))


@OLD
def test_evaluation_has_the_gradients_that_theirs_has(old):
    theirs, ours = _pair(old, lambda n: n.eval())
    for model in (theirs, ours):
        model.x = _current(6, 4, 5).requires_grad_()
        model.y = model(model.x)
    assert theirs.y.requires_grad == ours.y.requires_grad
    grads = [torch.autograd.grad(m[0].v.sum() + m.y.sum(), m.x)[0] for m in (theirs, ours)]
    torch.testing.assert_close(*grads)


@OLD
def test_a_memory_from_inference_mode_is_trained_on(old):
    _, ours = _pair(old)
    with torch.inference_mode():
        ours(_current(6, 4, 5))
    x = _current(6, 4, 5, seed=1).requires_grad_()
    ours(x).sum().backward()
    assert x.grad.any()


def test_no_potentials_of_an_older_pass_are_kept():
    neuron = nn.Sequential(_lif(True))
    with torch.no_grad():
        neuron(_current(6, 4, 5))
        accelerate(neuron)
        neuron(_current(6, 4, 5, seed=1))
    assert neuron[0].v_seq is None


@OLD
def test_surrogates_of_other_origin_are_left_alone(old):
    class Sigmoid(_part(old, "surrogate").Sigmoid):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(_lif(old, surrogate_function=Sigmoid()), _lif(old, surrogate_function=nn.Sigmoid()))
    reasons = [r.reason for r in accelerate(model)]
    assert reasons == ["surrogate Sigmoid is not SpikingJelly's"] * 2


@OLD
@pytest.mark.parametrize("name", ["tau", "v_reset"])
def test_a_tensor_where_a_number_is_taken_is_left_alone(old, name):
    model = nn.Sequential(_lif(old))
    setattr(model[0], name, nn.Parameter(torch.tensor(2.0)))
    (entry,) = accelerate(model)
    assert entry.reason.startswith(f"{name} is a tensor")


def test_a_threshold_that_theirs_does_not_train_is_left_alone():
    model = nn.Sequential(_lif(False))
    model[0].v_threshold = nn.Parameter(torch.tensor(0.7))
    (entry,) = accelerate(model)
    assert "v_threshold is a tensor" in entry.reason


@OLD
def test_a_users_own_class_is_named(old):
    class Mine(type(_lif(old))):
        pass

    mine = Mine() if old else Mine(step_mode="m")
    report = accelerate(nn.Sequential(_lif(old), mine))
    assert report[0].reason is None and "Mine is a class derived from a multi-step LIF" in report[1].reason
    assert type(mine) is Mine


def test_other_neurons_of_snntorch_are_named():
    snn = _library("snntorch")

    class Mine(snn.Leaky):
        pass

    model = nn.Sequential(snn.Synaptic(alpha=0.9, beta=0.8), Mine(beta=0.5))
    reasons = [r.reason for r in accelerate(model)]
    assert reasons[0].startswith("Synaptic is not") and "strictly above" in reasons[1]
