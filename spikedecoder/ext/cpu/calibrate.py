"""Measure the constants of the spike matmul's cost model on this machine.

    python -m spikedecoder.ext.cpu.calibrate costs.json
    SPIKEDECODER_SPIKE_LINEAR_COST=costs.json python train.py

Times each way for a set of shapes and spike rates, fits the constants (least squares of relative
errors), and prints for each point how much slower the model's choice is than the best one.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spikedecoder._files import check_writable, write_bytes
from spikedecoder.ext.cpu import _cost, missing, native

SHAPES = (
    (64, 512, 512),
    (2048, 80, 80),
    (8192, 80, 1280),
    (8192, 1280, 80),
    (2048, 512, 1024),
    (1024, 1024, 512),
    (64, 2048, 2048),
)
RATES = (0.02, 0.08, 0.2, 0.5)
NAMES = tuple(field.name for field in fields(_cost.Costs))


@dataclass(frozen=True)
class Point:
    """One measurement, in nanoseconds summed over all threads."""

    method: str
    m: int
    k: int
    n: int
    count: int
    weight_grad: bool
    nanoseconds: float

    @property
    def case(self) -> tuple[Any, ...]:
        """What all ways are timed for."""
        return (self.m, self.k, self.n, self.count, self.weight_grad)

    def known(self) -> float:
        """The nanoseconds that do not depend on the constants."""
        return self._of(dict.fromkeys(NAMES, 0.0))

    def units(self) -> list[float]:
        """How many times each constant is paid here."""
        zero = dict.fromkeys(NAMES, 0.0)
        return [self._of({**zero, name: 1.0}) - self.known() for name in NAMES]

    def _of(self, constants: dict[str, float]) -> float:
        return _cost.Costs(**constants).of(self.method, *self.case)


def _seconds(call: Callable[[], Any], budget: float) -> float:
    call()
    best, end = float("inf"), time.perf_counter() + budget
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def measure(budget: float = 0.05) -> list[Point]:
    """Measure all points, spending `budget` seconds on each."""
    from spikedecoder.ext.cpu import spike_linear

    points = []
    generator = torch.Generator().manual_seed(0)
    for m, k, n in SHAPES:
        weight = torch.randn(k, n, generator=generator).t()
        grad = torch.randn(m, n, generator=generator)
        for rate in RATES:
            s = (torch.rand(m, k, generator=generator) < rate).float()
            count = int(s.sum())
            words = spike_linear.forward(s, weight, None)[1]
            for method in _cost._methods(native.variant()):
                way = _cost.only(method, weight.dtype)
                # timed from words, because packing takes the same time for all methods
                forward = functools.partial(spike_linear.multiply, words, count, weight, None, way)
                backward = functools.partial(spike_linear.weight_grad, words, k, grad, method)
                for call in (forward, backward):
                    spent = _seconds(call, budget) * 1e9 * torch.get_num_threads()
                    points.append(Point(method, m, k, n, count, call is backward, spent))
    return points


def fit(points: list[Point]) -> _cost.Costs:
    """Constants >= 0 that minimise the squared relative errors, by coordinate descent."""
    units = np.array([p.units() for p in points])
    nanoseconds = np.array([p.nanoseconds for p in points])
    relative, left = units / nanoseconds[:, None], 1 - np.array([p.known() for p in points]) / nanoseconds
    x = np.zeros(len(NAMES))
    for _ in range(2000):
        for j in range(len(NAMES)):
            column = relative[:, j]
            weight = column @ column
            if weight > 0:
                x[j] = max(0.0, column @ (left - relative @ x + column * x[j]) / weight)
    return _cost.Costs(**{name: float(f"{value:.3g}") for name, value in zip(NAMES, x, strict=True)})


def regrets(
    points: list[Point], table: _cost.Costs, variant: str
) -> dict[tuple[Any, ...], tuple[str, str, float]]:
    """By case: (method that the model chooses, fastest method, ratio of their times).

    The choice is that for a weight stored by columns, or for its gradient, in float32.
    """
    cases: dict[tuple[Any, ...], dict[str, float]] = {}
    for p in points:
        cases.setdefault(p.case, {})[p.method] = p.nanoseconds
    result = {}
    for case, times in cases.items():
        *shape, count, weight_grad = case
        way = _cost.fastest(table, variant, tuple(shape), weight_grad, False, torch.float32)
        chosen = way.method(count)
        best = min(times, key=times.__getitem__)
        result[case] = (chosen, best, times[chosen] / times[best])
    return result


def main(arguments: list[str]) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m spikedecoder.ext.cpu.calibrate",
        description="Measure the constants of the spike matmul's cost model on this machine (minutes).",
    )
    parser.add_argument(
        "costs",
        type=Path,
        nargs="?",
        metavar="costs.json",
        help="file to write, for SPIKEDECODER_SPIKE_LINEAR_COST; left out, the constants are only printed",
    )
    costs: Path | None = parser.parse_args(arguments).costs
    if costs is not None:
        try:
            check_writable(costs)
        except OSError as error:
            parser.error(str(error))
    if missing() is not None:
        print(missing(), file=sys.stderr)
        return 2
    variant = native.variant()
    points = measure()
    tables = {}
    for weight_grad, kind in enumerate(_cost.KINDS):
        of_kind = [p for p in points if p.weight_grad == weight_grad]
        table = fit(of_kind)
        for (m, k, n, count, _), (chosen, best, ratio) in regrets(of_kind, table, variant).items():
            rate = count / m / k
            print(f"{kind} {m} x {k} x {n} rate {rate:.2f}: {chosen}, best {best}, {ratio:.2f}x its time")
        print(f"{variant}, {kind}: {table}")
        tables[kind] = asdict(table)
    if costs is not None:
        write_bytes(costs, (json.dumps({variant: tables}, indent=2) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
