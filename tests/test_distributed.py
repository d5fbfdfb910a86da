"""Two processes on the CPU (gloo) against one on the joined batch: norms that share statistics, DDP, FSDP.

The processes are started once, for all of pytest-xdist's workers, and do everything; the tests look at what
they brought back.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from filelock import FileLock
from torch import Tensor

from spikedecoder import SpikeDecoder, SpikeDecoderConfig, ops, sync, use_backend
from spikedecoder.nn.norm import Norm, sync_norms
from spikedecoder.params import ILIFParams, LIFParams, NormParams

pytestmark = pytest.mark.triton_interpreter
KINDS = ("batch", "power")
OPERATORS = ("norm", "norm_lif", "norm_ilif")
BACKENDS = ("reference", "cpu", "triton")
CHANNELS = 20
SPLITS = {"unequal": (5, 2), "empty": (3, 0)}  # sequences of each process
MODELS = {"layer": {}, "batch": {"norm": "batch"}, "power": {"norm": "power", "learn_threshold": True}}
WRAPPED = [*((name, "reference") for name in MODELS), ("batch", "triton")]
SHARDED = ("reference", "triton")


def batch(split: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x [T, B, S, C], gradient), two passes of them along a new first dimension."""
    g = torch.Generator().manual_seed(0)
    shape = (2, 3, sum(split), 4, CHANNELS)
    return (torch.randn(shape, generator=g) * 2 + 1).to(dtype), torch.randn(shape, generator=g).to(dtype)


def piece(x: Tensor, split: tuple[int, ...], rank: int | None) -> Tensor:
    """The sequences of a process; all of them for None."""
    if rank is None:
        return x
    start = sum(split[:rank])
    return x[:, start : start + split[rank]]


def run_norm(
    kind: str,
    operator: str,
    backend: str,
    split: tuple[int, ...],
    rank: int | None,
    compiled: bool = False,
) -> dict[str, Tensor]:
    """Two passes forward and backward, in float32; in float64 for the reference."""
    dtype = torch.float64 if backend == "reference" else torch.float32
    xs, grads = batch(split, dtype)
    norm = Norm(kind, CHANNELS).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 1.5, CHANNELS))
        norm.bias.copy_(torch.linspace(-0.5, 1.0, CHANNELS))
    norm.group = None if rank is None else sync.WORLD

    def forward(x: Tensor, n: NormParams) -> Tensor:
        if operator == "norm":
            return ops.norm(x, n)
        if operator == "norm_lif":
            return ops.norm_lif(x, n, LIFParams())
        return ops.norm_ilif(x, n, ILIFParams(4))

    call = torch.compile(forward, fullgraph=True, backend="aot_eager") if compiled else forward
    found: dict[str, Tensor] = {}
    with use_backend(backend):
        for i in range(2):
            x = piece(xs[i], split, rank).clone().requires_grad_()
            out = call(x, norm.params())
            out.backward(piece(grads[i], split, rank))
            assert x.grad is not None
            found |= {f"out{i}": out.detach(), f"grad{i}": x.grad}
    assert norm.weight.grad is not None and norm.bias.grad is not None
    found |= {"weight": norm.weight.grad, "bias": norm.bias.grad}
    return found | {name: buffer.clone() for name, buffer in norm.named_buffers()}


def model_of(changes: dict[str, Any], backend: str = "reference") -> SpikeDecoder:
    """With a threshold that no current meets: no sum's order moves a spike. The reference in float64."""
    torch.manual_seed(0)
    small = {"blocks": 2, "heads": 2, "token_dim": 12, "position_dim": 4, "mlp_ratio": 2, "timesteps": 2}
    off = {"max_len": 8, "v_threshold": 0.97, "attention_scale": 1.0, "norm": "layer"}
    config = SpikeDecoderConfig.preset("default-lif", **{**small, **off, **changes})
    return SpikeDecoder(config).to(torch.float64 if backend == "reference" else torch.float32)


def tokens() -> Tensor:
    return torch.randint(0, 28, (4, 8), generator=torch.Generator().manual_seed(1))


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if grad is not None:
            found[name.removeprefix("module.model.")] = getattr(grad, "full_tensor", lambda g=grad: g)()
    return found


class Loss(torch.nn.Module):
    def __init__(self, model: SpikeDecoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.loss(tokens, tokens.roll(-1, 1))


def run_ddp(name: str, backend: str, rank: int) -> dict[str, Tensor]:
    model = model_of(MODELS[name], backend)
    sync_norms(model)
    wrapped = torch.nn.parallel.DistributedDataParallel(Loss(model))
    with use_backend(backend):
        wrapped(tokens()[2 * rank : 2 * rank + 2]).backward()
    return gradients(wrapped) | {n: b.clone() for n, b in model.named_buffers()}


def run_fsdp(backend: str, rank: int) -> dict[str, Tensor]:
    """One step of SGD too: sharded parameters move as whole ones do."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    model = model_of({}, backend)
    mesh = init_device_mesh("cpu", (2,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "loss")
    mine = tokens()[2 * rank : 2 * rank + 2]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with use_backend(backend):
        model.loss(mine, mine.roll(-1, 1)).backward()
    found = gradients(model)
    optimizer.step()
    with pytest.raises(ValueError, match="model: holds only its part of the weights"):
        model.save_pretrained("never-made")
    return found | {f"after.{n}": p.full_tensor().detach() for n, p in model.named_parameters()}  # type: ignore[operator]


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found: dict[Any, dict[str, Tensor]] = {}
    for kind in KINDS:
        for operator in OPERATORS:
            for backend in BACKENDS[: 1 if operator == "norm" else None]:
                for split, sequences in SPLITS.items():
                    found[kind, operator, backend, split] = run_norm(kind, operator, backend, sequences, rank)
    half = dist.new_group([0])
    if rank == 0:
        norm = Norm("batch", CHANNELS)
        assert sync_norms(torch.nn.Sequential(norm, Norm("layer", 4)), half) == 1
        alone, again = Norm("batch", CHANNELS), batch((4,), torch.float32)[0][0]
        torch.testing.assert_close(norm(again), alone(again))
        torch.testing.assert_close(norm.running_var, alone.running_var)
    for name, backend in WRAPPED:
        found["ddp", name, backend] = run_ddp(name, backend, rank)
    for backend in SHARDED:
        found["fsdp", backend] = run_fsdp(backend, rank)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(workers_folder: Path) -> list[dict[Any, dict[str, Tensor]]]:
    """What each process found."""
    folder = workers_folder / "two-processes"
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)  # another worker's that failed
            folder.mkdir()
            mp.start_processes(work, (str(folder),), nprocs=2, start_method="spawn")
            (folder / "done").touch()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def check_norm(results: list[dict[str, Tensor]], want: dict[str, Tensor], split: tuple[int, ...]) -> None:
    close = (
        {"rtol": 1e-9, "atol": 1e-9} if want["out0"].dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    )
    for rank, got in enumerate(results):
        for name in ("out0", "grad0", "out1", "grad1"):
            torch.testing.assert_close(got[name], piece(want[name], split, rank), **close)
    for name in ("weight", "bias"):  # each process's own: together the joined batch's
        torch.testing.assert_close(sum(found[name] for found in results), want[name], **close)
    for name in want.keys() - {"out0", "grad0", "out1", "grad1", "weight", "bias"}:
        for got in results:
            torch.testing.assert_close(got[name], want[name], **close)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("operator", OPERATORS[1:])
def test_norm_lif_over_two_processes_is_that_of_the_joined_batch(
    operator: str, kind: str, backend: str, split: str, both: list[dict[Any, dict[str, Tensor]]]
) -> None:
    want = run_norm(kind, operator, backend, SPLITS[split], None)
    check_norm([found[kind, operator, backend, split] for found in both], want, SPLITS[split])


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", KINDS)
def test_norm_over_two_processes_is_that_of_the_joined_batch(
    kind: str, split: str, both: list[dict[Any, dict[str, Tensor]]]
) -> None:
    want = run_norm(kind, "norm", "reference", SPLITS[split], None)
    check_norm([found[kind, "norm", "reference", split] for found in both], want, SPLITS[split])


def test_synced_batch_norm_is_what_syncbatchnorm_promises(both: list[dict[Any, dict[str, Tensor]]]) -> None:
    """torch.nn.SyncBatchNorm runs on GPUs only; it stands for BatchNorm of the joined batch, as here."""
    split = SPLITS["unequal"]
    xs, grads = batch(split, torch.float64)
    theirs = torch.nn.BatchNorm1d(CHANNELS).double()
    with torch.no_grad():
        theirs.weight.copy_(torch.linspace(0.5, 1.5, CHANNELS))
        theirs.bias.copy_(torch.linspace(-0.5, 1.0, CHANNELS))
    for i in range(2):
        x = xs[i].clone().requires_grad_()
        out = theirs(x.reshape(-1, CHANNELS)).view_as(x)
        out.backward(grads[i])
        for rank, found in enumerate(both):
            got = found["batch", "norm", "reference", "unequal"]
            torch.testing.assert_close(got[f"out{i}"], piece(out.detach(), split, rank))
            torch.testing.assert_close(got[f"grad{i}"], piece(x.grad, split, rank))
    for found in both:
        got = found["batch", "norm", "reference", "unequal"]
        for name, buffer in theirs.named_buffers():
            torch.testing.assert_close(got[name], buffer)


def close_to(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for key, value in want.items():
        limits = {"rtol": 1e-3, "atol": 1e-5} if value.dtype == torch.float32 else {}
        torch.testing.assert_close(got[key], value, **limits, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize(("name", "backend"), WRAPPED)
def test_ddp_is_one_process_on_the_joined_batch(
    name: str, backend: str, both: list[dict[Any, dict[str, Tensor]]]
) -> None:
    model = model_of(MODELS[name], backend)
    with use_backend(backend):
        model.loss(tokens(), tokens().roll(-1, 1)).backward()
    want = gradients(model) | {n: b.clone() for n, b in model.named_buffers()}
    # a moving mean of gradients, each of a loss over half the tokens: twice as large
    want = {key: 2 * value if key.endswith("ema_gz") else value for key, value in want.items()}
    for found in both:
        close_to(found["ddp", name, backend], want)


@pytest.mark.parametrize("backend", SHARDED)
def test_fsdp_is_one_process_on_the_joined_batch(
    backend: str, both: list[dict[Any, dict[str, Tensor]]]
) -> None:
    model = model_of({}, backend)
    with use_backend(backend):
        model.loss(tokens(), tokens().roll(-1, 1)).backward()
    want = gradients(model)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    want |= {f"after.{n}": p.detach() for n, p in model.named_parameters()}
    for found in both:
        close_to(found["fsdp", backend], want)


def test_without_processes_it_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match=r"group: got 'world', but torch.distributed is not initialised"):
        sync_norms(Norm("batch", 3))
    with pytest.raises(TypeError, match=r"group: got str, takes a torch\.distributed"):
        sync_norms(Norm("batch", 3), "all")
    norm = Norm("batch", 3)
    norm.group = "nowhere"
    with pytest.raises(ValueError, match="group: got 'nowhere'"):
        norm(torch.ones(4, 3))
    norm.eval()(torch.ones(4, 3))  # evaluation asks nobody


def test_collectives_of_one_process(tmp_path: Path) -> None:
    assert "RANK" not in os.environ
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/alone", rank=0, world_size=1)
    try:
        x = torch.randn(7, 3)
        torch.library.opcheck(torch.ops.spikedecoder.sum_over_processes.default, (x, sync.WORLD))
        torch.library.opcheck(torch.ops.spikedecoder.gather_from_processes.default, (x, sync.WORLD))
        synced, alone = Norm("batch", 3), Norm("batch", 3)
        assert sync_norms(synced) == 1
        torch.testing.assert_close(synced(x), alone(x))
        torch.testing.assert_close(synced.running_var, alone.running_var)
        for operator in OPERATORS:
            want = run_norm("batch", operator, "reference", (3,), None)
            check_norm([run_norm("batch", operator, "reference", (3,), 0, compiled=True)], want, (3,))
        with pytest.raises(ValueError, match="group: got 'nowhere', takes world"):
            sync.group_of("nowhere")
    finally:
        dist.destroy_process_group()
