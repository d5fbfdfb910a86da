"""Drop-in neurons against the libraries they stand in for; skipped where a library is absent."""

from __future__ import annotations

import copy
import importlib
import pickle

import pytest
import torch
from torch import nn

from spikedecoder.compat.accelerate import accelerate


def _library(name):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name} is not installed ({error})")


def _network(old, **options):
    """A small convolutional classifier of the kind the library's examples build, multi-step."""
    if old:
        neuron = _library("spikingjelly.clock_driven.neuron")
        layer = _library("spikingjelly.clock_driven.layer")
        lif = lambda: neuron.MultiStepLIFNode(**options)  # noqa: E731
        wrap = layer.SeqToANNContainer
    else:
        neuron = _library("spikingjelly.activation_based.neuron")
        layer = _library("spikingjelly.activation_based.layer")
        lif = lambda: neuron.LIFNode(step_mode="m", **options)  # noqa: E731
        wrap = layer.SeqToANNContainer
    torch.manual_seed(0)
    network = nn.Sequential(
        wrap(nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)),
        lif(),
        wrap(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6 * 4 * 4, 20)),
        lif(),
        wrap(nn.Linear(20, 10)),
        lif(),
    )
    with torch.no_grad():  # strong enough for every layer to fire
        for name, p in network.named_parameters():
            if name.startswith(("2.", "4.")):
                p.mul_(6)
    return network


def _reset(old, model):
    _library(f"spikingjelly.{'clock_driven' if old else 'activation_based'}.functional").reset_net(model)


OPTIONS = [
    {},
    {"detach_reset": True},
    {"v_reset": None, "detach_reset": True},
    {"tau": 4.0, "v_threshold": 0.5},
    {"v_reset": -0.25, "v_threshold": 0.5},
]


@pytest.mark.parametrize("old", [True, False], ids=["0.0.0.0.14", "2.0"])
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


@pytest.mark.parametrize("old", [True, False], ids=["0.0.0.0.14", "2.0"])
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
    module = _library("spikingjelly.activation_based.surrogate")
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
    neuron = _library("spikingjelly.activation_based.neuron")
    surrogate = _library("spikingjelly.activation_based.surrogate")
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
