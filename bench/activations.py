"""Count the bytes that a training step keeps for its backward pass; any machine gives the same figures.

    python bench/activations.py                                        # the README character model
    TRITON_INTERPRET=1 python bench/activations.py --dtype bfloat16 --backend triton

What counts are the distinct storages that autograd saves in one forward pass, without parameters and buffers:
the memory in use when the backward pass begins, apart from weights and optimiser. The tensors are fake, with
shapes and dtypes but no values, so any size is counted at once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from spikedecoder import SpikeDecoder, SpikeDecoderConfig, use_backend


def saved_bytes(model: SpikeDecoder, tokens: Tensor, dtype: torch.dtype = torch.float32) -> int:
    """Bytes kept by `model.loss`, with matrix products in `dtype` by autocast."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers(), tokens)}
    storages: dict[int, int] = {}
    held: list[Any] = []  # keeps storages alive: the address of a freed one could come twice

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage.nbytes()
            held.append(storage)
        return x

    half = dtype != torch.float32
    autocast = torch.autocast(tokens.device.type, dtype) if half else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), autocast:
        model.loss(tokens, tokens.roll(-1, 1))
    return sum(storages.values())


ROWS = (("eager reference", "reference", False), ("bits", "auto", False), ("bits, recomputed", "auto", True))


def measure(
    config: SpikeDecoderConfig,
    batch: int,
    length: int,
    dtype: torch.dtype = torch.float32,
    chosen: str = "auto",
) -> dict[str, int]:
    """Bytes of each row: the reference backend, the chosen one, and that one with Linears recomputed."""
    found = {}
    with FakeTensorMode():
        model = SpikeDecoder(config)
        model._check = lambda *_: None  # type: ignore[method-assign]  # reads tokens, which have no values
        tokens = torch.empty(batch, length, dtype=torch.int64)
        for row, backend, recompute in ROWS:
            model.recompute_activations(recompute)
            with use_backend(chosen if backend == "auto" else backend):
                found[row] = saved_bytes(model, tokens, dtype)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="original-char", choices=SpikeDecoderConfig.presets())
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--backend", default="auto", help="of the rows below the first")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    config = SpikeDecoderConfig.preset(options.preset)
    found = measure(config, options.batch, options.length, getattr(torch, options.dtype), options.backend)
    print(f"{options.preset}, B = {options.batch}, S = {options.length}, {options.dtype}\n")
    print("| kept for backward | MiB | bytes a token | share |\n|---|---|---|---|")
    for row, size in found.items():
        share = f"1/{found['eager reference'] / size:.1f}" if row != "eager reference" else "1"
        print(f"| {row} | {size / 2**20:.1f} | {size / options.batch / options.length:.0f} | {share} |")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
