"""SpikingJelly's multi-step LIF, forward and backward, by one of its implementations; prints JSON.

After each T it prints a line with all results so far, so that a process ended early leaves what it has.

    python bench/peer_spikingjelly.py --implementation triton --T 4 --T 8

Version 2 reads the implementation for CUDA (torch, cuda or triton) from an environment variable on import, so
each needs a process of its own; earlier versions take a `backend` (torch, cupy or triton). What cannot run
says why.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
from typing import Any

import torch
from torch import Tensor

IMPLEMENTATIONS = ("torch", "cuda", "cupy", "triton")


def node_of(implementation: str) -> Any:
    """A LIFNode with the neuron of these benchmarks. Raises ValueError with the reason if there is none."""
    os.environ["SJ_LIF_CUDA_IMPLEMENTATION"] = implementation
    try:
        from spikingjelly.activation_based import neuron, surrogate
    except ImportError as error:
        raise ValueError(f"{error.name or 'spikingjelly'} is not installed") from error
    neuron_options: dict[str, Any] = {"tau": 2.0, "detach_reset": True, "step_mode": "m"}
    neuron_options["surrogate_function"] = surrogate.Sigmoid(4.0)
    by_argument = "backend" in inspect.signature(neuron.LIFNode.__init__).parameters
    offered = ("torch", "cupy", "triton") if by_argument else ("torch", "cuda", "triton")
    if implementation not in offered:
        raise ValueError(f"this version's LIF has {', '.join(offered)}")
    if implementation != "torch" and not torch.cuda.is_available():
        raise ValueError("needs a CUDA device")
    if by_argument:
        try:
            return neuron.LIFNode(**neuron_options, backend=implementation)
        except (ValueError, NotImplementedError, ImportError) as error:
            raise ValueError(str(error)) from error
    return neuron.LIFNode(**neuron_options)


def measure(implementation: str, T: int, elements: int, dry: bool) -> dict[str, Any]:
    from bench_gpu_ops import median_ms
    from gpu_groups import CUDA, DEVICE, currents
    from spikingjelly.activation_based import functional

    node = node_of(implementation).to(DEVICE)
    torch.manual_seed(0)
    x = currents(T, elements // T // 512, 512)
    grad = torch.randn_like(x)
    state = torch.zeros(x.shape[1:], device=DEVICE)

    def spikes(leaf: Tensor) -> Tensor:
        # version 2's kernels take potentials only in float32, but its module makes them in x's dtype
        if hasattr(functional, "lif_multi_step"):
            sigmoid = node.surrogate_function
            return functional.lif_multi_step(leaf, state, 2.0, True, 1.0, 0.0, sigmoid, True, False)[0]
        functional.reset_net(node)
        return node(leaf)

    def call() -> Tensor:
        leaf = x.detach().requires_grad_()
        spikes(leaf).backward(grad)
        assert leaf.grad is not None
        return leaf.grad

    call()
    found: dict[str, Any] = {}
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        found["peak_mib"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    return {"ms": round(median_ms(call, dry), 4), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--implementation", required=True, choices=IMPLEMENTATIONS)
    parser.add_argument("--T", type=int, action="append", required=True)
    parser.add_argument("--elements", type=int, default=1 << 26)
    parser.add_argument("--dry-run", action="store_true", help="one run, not a median of many")
    options = parser.parse_args()
    found: dict[int, Any] = {}
    for T in options.T:
        try:
            node_of(options.implementation)
        except ValueError as error:
            found[T] = {"skipped": str(error)}
        else:
            try:
                found[T] = measure(options.implementation, T, options.elements, options.dry_run)
            except Exception as error:
                found[T] = {"failed": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
