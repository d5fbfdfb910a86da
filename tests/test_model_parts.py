"""Modules that someone watches, changes or puts in another's place: each is called by itself."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest
import torch
from torch.nn.utils import prune

from spikedecoder import SpikeDecoder, SpikeDecoderConfig, nn
from spikedecoder.nn.norm import Norm, measure_norms


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("default", {}),
        ("default-lif", {}),
        ("default-lif", {"norm": "layer"}),
        ("default-lif", {"attention_norm": True}),
    ],
)
def test_hooks_on_every_module_see_what_passes_it(preset, changes, recompute):
    """Operators that hold several modules together give way to the modules: the same numbers."""
    torch.manual_seed(0)
    small = {"blocks": 1, "heads": 2, "token_dim": 15, "max_len": 16, **changes}
    model = SpikeDecoder(SpikeDecoderConfig.preset(preset, **small)).double()
    model.recompute_activations(recompute and preset == "default-lif")
    tokens = torch.randint(0, 30, (2, 8))
    running = {name: buffer.clone() for name, buffer in model.named_buffers()}
    wanted = {name for name, _ in model.named_modules()} - {"blocks"}
    results, forward, backward = [], [], set()
    for hooked in (False, True):
        for name, module in model.named_modules() if hooked else ():
            module.register_forward_hook(functools.partial(lambda n, *_: forward.append(n), name))
            module.register_full_backward_hook(functools.partial(lambda n, *_: backward.add(n), name))
        model.train()
        model.load_state_dict(running, strict=False)
        model.zero_grad()
        loss = model.loss(tokens, tokens.roll(-1, 1))
        assert sorted(forward) == sorted(wanted if hooked else ())
        loss.backward()
        assert backward == (wanted if hooked else set())
        forward.clear()
        with torch.no_grad():
            logits = model.eval()(tokens)
        assert sorted(forward) == sorted(wanted if hooked else ())
        results.append([loss.detach(), logits, *(p.grad.clone() for p in model.parameters())])
    for alone, watched in zip(*results, strict=True):
        torch.testing.assert_close(watched, alone, rtol=1e-9, atol=1e-9)


class Steps(torch.nn.Module):
    """Neurons of another make: no parameters, none of our attributes."""

    def forward(self, x):
        return (x > 0.3).to(x.dtype) + x - x.detach()


@pytest.mark.parametrize("preset", ["default", "default-lif"])
@pytest.mark.parametrize("attention_norm", [False, True])
@pytest.mark.parametrize(
    "place", ["mlp.fc1.lif", "attention.q.lif", "attention.attention_lif.lif", "mlp.input_lif"]
)
def test_neurons_of_another_make(preset, attention_norm, place):
    """They are called, trained through and generated with, and are not lost by being saved."""
    torch.manual_seed(0)
    small = {"blocks": 1, "heads": 2, "token_dim": 15, "max_len": 16, "vocab_size": 30}
    config = SpikeDecoderConfig.preset(preset, **small, attention_norm=attention_norm)
    model = SpikeDecoder(config)
    model.set_submodule(f"blocks.0.{place}", Steps())
    tokens = torch.randint(0, 30, (2, 8))
    model.loss(tokens, tokens.roll(-1, 1)).backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    logits, state = model.prefill(tokens[:, :5])
    for i in range(5, 8):
        logits, state = model.step(tokens[:, i], state)
    torch.testing.assert_close(logits, model(tokens)[:, -1])
    greedy = tokens
    for _ in range(6):
        greedy = torch.cat([greedy, model(greedy)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(model.generate(tokens, 6, temperature=0), greedy)


@pytest.mark.parametrize("how", ["hook", "pre-hook", "subclass", "instance"])
def test_generation_calls_a_forward_that_somebody_changed(how):
    torch.manual_seed(0)

    class Masked(SpikeDecoder):
        def __init__(self, config, sign=-1):
            super().__init__(config)
            self.sign = sign

        def forward(self, tokens):
            return self.sign * super().forward(tokens)

    small = {"blocks": 1, "heads": 2, "token_dim": 15, "max_len": 16, "vocab_size": 30}
    config = SpikeDecoderConfig.preset("default", **small)
    model = (Masked if how == "subclass" else SpikeDecoder)(config).eval()
    if how == "hook":
        model.register_forward_hook(lambda _module, _inputs, logits: -logits)
    elif how == "pre-hook":
        model.register_forward_pre_hook(lambda _module, inputs: (29 - inputs[0],))
    elif how == "instance":
        model.forward = lambda tokens: -SpikeDecoder.forward(model, tokens)
    tokens = torch.randint(0, 30, (2, 4))
    greedy = tokens
    for _ in range(6):
        greedy = torch.cat([greedy, model(greedy)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(model.generate(tokens, 6, temperature=0), greedy)


@pytest.mark.parametrize("norm", ["layer", "batch", "power"])
@pytest.mark.parametrize("watched", ["attention.q.lif", "attention.q.norm"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_hook_changes_no_dtype_under_autocast(norm, watched, device):
    """Some norms are in float32 there, by themselves; q's spikes must still be of k's dtype."""
    torch.manual_seed(0)
    small = {"blocks": 1, "heads": 2, "token_dim": 15, "max_len": 16}
    model = SpikeDecoder(SpikeDecoderConfig.preset("default-lif", norm=norm, **small)).to(device)
    tokens, seen = torch.randint(0, 28, (2, 8), device=device), []
    model.get_submodule(f"blocks.0.{watched}").register_forward_hook(lambda *found: seen.append(found[-1]))
    with torch.autocast(device, torch.bfloat16):
        model.loss(tokens, tokens.roll(-1, 1)).backward()
    assert len(seen) == 1


class _Adapter(torch.nn.Module):
    """In a Linear's place, with its attributes, as adapters of low rank are."""

    def __init__(self, base):
        super().__init__()
        self.base, self.weight, self.bias = base, base.weight, base.bias
        self.change = torch.nn.Parameter(torch.randn_like(base.weight))

    def forward(self, x):
        return self.base(x) + torch.nn.functional.linear(x, self.change)


@pytest.mark.parametrize("preset", ["default", "default-lif"])
@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_a_module_in_anothers_place_is_called(preset, norm):
    torch.manual_seed(0)
    small = {"blocks": 1, "heads": 2, "token_dim": 15, "max_len": 16, "attention_scale": 1.0}
    model = SpikeDecoder(SpikeDecoderConfig.preset(preset, norm=norm, **small)).eval()
    for name, p in model.named_parameters():
        if name.endswith("norm.bias"):  # every layer fires
            p.data += 0.9
    tokens = torch.randint(0, 28, (2, 8))
    for layer in (model.blocks[0].mlp.fc1, model.blocks[0].mlp.fc2, model.head):
        before = model(tokens)
        layer.linear = _Adapter(layer.linear)
        want = model(tokens)
        assert not torch.equal(want, before)
        with torch.no_grad():
            torch.testing.assert_close(model(tokens), want)
        torch.testing.assert_close(model.prefill(tokens)[0], want)
        read = model.generate(tokens, 1, temperature=0)[:, -1]
        assert torch.equal(read, want[:, -1].argmax(-1))
        model.recompute_activations(preset == "default-lif")
        torch.testing.assert_close(model(tokens), want)
        model.recompute_activations(False)


def _replaced(model, place):
    """`model` with another of torch's modules in a place."""
    block = model.blocks[0]
    if place == "dropout":
        block.mlp.dropout = torch.nn.Hardtanh(-0.01, 0.01)
    elif place == "norm":
        block.mlp.fc1.norm = torch.nn.LayerNorm(block.mlp.fc1.linear.out_features)
    elif place == "projection's norm":
        block.attention.proj.norm = torch.nn.LayerNorm(block.attention.proj.linear.out_features)
    else:
        parent = model.head if place == "head" else block.mlp.fc1
        parent.linear = torch.nn.Sequential(parent.linear, torch.nn.Dropout(0.1))
    return model.eval()


@pytest.mark.parametrize("preset", ["default", "default-lif"])
@pytest.mark.parametrize("place", ["dropout", "norm", "projection's norm", "linear", "head"])
def test_a_module_of_torch_in_anothers_place_is_called(preset, place):
    torch.manual_seed(1)
    small = {"blocks": 1, "heads": 2, "token_dim": 15, "max_len": 16, "vocab_size": 20}
    model = _replaced(SpikeDecoder(SpikeDecoderConfig.preset(preset, **small)), place)
    text = tokens = torch.randint(0, 20, (2, 4))
    want = model(tokens)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), want)
        torch.testing.assert_close(model.prefill(tokens)[0], want)
        for _ in range(8):
            text = torch.cat([text, model(text)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(model.generate(tokens, 8, temperature=0), text)
    model.train().loss(tokens, tokens).backward()


def test_a_forward_put_on_an_instance_is_called_and_traces():
    torch.manual_seed(0)
    small = {"blocks": 1, "heads": 2, "token_dim": 15, "max_len": 16, "norm": "layer"}
    model = SpikeDecoder(SpikeDecoderConfig.preset("default-lif", **small)).eval()
    tokens = torch.randint(0, 28, (2, 8))
    linear = model.blocks[0].mlp.fc2.linear
    before = model(tokens)
    linear.forward = functools.partial(
        lambda module, x: 2 - 3 * torch.nn.functional.linear(x, module.weight), linear
    )
    want = model(tokens)
    assert not torch.equal(want, before)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), want)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens), want)


def test_pruned_weights_are_those_of_each_step():
    """torch.nn.utils.prune masks a weight in a hook before its module."""
    small = {"blocks": 1, "heads": 2, "token_dim": 15, "max_len": 16, "norm": "layer"}
    tokens = torch.randint(0, 30, (2, 8), generator=torch.Generator().manual_seed(0))
    losses = {}
    for recompute in (False, True):
        torch.manual_seed(0)
        model = SpikeDecoder(SpikeDecoderConfig.preset("default-lif", **small))
        for layer in (model.blocks[0].mlp.fc1.linear, model.blocks[0].mlp.fc2.linear):
            prune.l1_unstructured(layer, "weight", 0.5)
        model.recompute_activations(recompute)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        losses[recompute] = []
        for _ in range(3):
            loss = model.loss(tokens, tokens.roll(-1, 1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[recompute].append(loss.item())
    assert losses[True] == pytest.approx(losses[False], rel=1e-5) and len(set(losses[True])) == 3


def test_averaged_weights_get_statistics_of_their_own():
    """The mean over the batches, by each norm's own input, as torch's update_bn gives it."""
    torch.manual_seed(0)
    small = {"blocks": 2, "heads": 2, "token_dim": 15, "max_len": 16, "vocab_size": 30}
    config = SpikeDecoderConfig.preset("default", **small, mlp_dropout=0.5)
    average = torch.optim.swa_utils.AveragedModel(SpikeDecoder(config).eval())
    model = average.module
    batches = [torch.randint(0, 30, (4, 16)) for _ in range(3)]
    seen: dict[str, list[torch.Tensor]] = {}
    norms = {name: m for name, m in model.named_modules() if isinstance(m, Norm)}
    hooks = [
        norm.register_forward_pre_hook(
            lambda _, inputs, name=name: seen.setdefault(name, []).append(inputs[0].flatten(0, -2))
        )
        for name, norm in norms.items()
    ]
    assert measure_norms(average, iter(batches)) == len(norms) == 12
    for hook in hooks:
        hook.remove()
    for name, norm in norms.items():
        assert len(seen[name]) == 3 and not norm.training and norm.momentum == 0.1
        means = torch.stack([x.mean(0) for x in seen[name]])
        variances = torch.stack([x.var(0) for x in seen[name]])
        torch.testing.assert_close(norm.running_mean, means.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norm.running_var, variances.mean(0), rtol=1e-5, atol=1e-6)
    watched = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert measure_norms(average, batches) == 12  # now in operators that hold several modules together
    for name, buffer in model.named_buffers():
        if "running" in name:
            torch.testing.assert_close(buffer, watched[name], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="batches: got none, takes at least one"):
        measure_norms(average, [])


def test_no_part_of_a_model_chooses_a_backend():
    """Neither by importing one, nor by its name, nor by what chooses one: `spikedecoder.ops` does."""
    from spikedecoder.ops import _dispatch

    sources = [ast.parse(path.read_text()) for path in Path(nn.__path__[0]).glob("*.py")]
    nodes = [node for source in sources for node in ast.walk(source)]
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            imported |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    assert "spikedecoder.ops" in imported
    packages = (*_dispatch.BACKENDS.values(), "spikedecoder.ext", _dispatch.__name__, "triton")
    assert not [name for name in imported if name.startswith(packages)]
    names = {node.value for node in nodes if isinstance(node, ast.Constant)}
    names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    names |= {name.rpartition(".")[2] for name in imported}
    assert not names & {*_dispatch.BACKENDS, "use_backend", "requested_backend", "select", "resolve"}


def test_imports_point_downwards():
    """Those at the head of a module, but for the two that docs/design.md names."""
    layers = (
        "cli app serve sweep",
        "compat",
        "training generation energy viz activity diagnosis spike_stats",
        "model nn checkpoint config kinds",
        "ops",
        "reference kernels ext",
        "params presets surrogate sync fields data",
    )
    height = {name: -i for i, names in enumerate(layers) for name in names.split()}
    package = Path(nn.__path__[0]).parent
    paths = {path.relative_to(package): path for path in package.rglob("*.py")}
    kernels = package.parent / "kernels"
    paths |= {"kernels" / path.relative_to(kernels): path for path in kernels.rglob("*.py")}
    upwards = set()
    for name, path in paths.items():
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("spikedecoder"):
                continue
            inside = node.module.split(".")[1:]
            for target in [inside] if inside else [[alias.name] for alias in node.names]:
                if height.get(target[0], -99) > height.get(name.with_suffix("").parts[0], 99):
                    upwards.add((name.with_suffix("").as_posix(), ".".join(target)))
    decode = {("ext/cpu/decode", f"nn.{part}") for part in ("embedding", "neuron", "norm", "state")}
    assert decode <= upwards
    rest = upwards - decode
    assert {target for _, target in rest} == {"ops._dispatch"}
    assert {name.split("/")[0] for name, _ in rest} == {"ext", "kernels"}
