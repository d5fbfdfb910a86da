"""Joules as readable text."""

from __future__ import annotations

_PREFIXES = ((1.0, "J"), (1e-3, "mJ"), (1e-6, "µJ"), (1e-9, "nJ"), (1e-12, "pJ"))


def si(joules: float) -> str:
    """Three significant digits and a unit: 1.23e-7 is "123 nJ"."""
    if joules == 0:
        return "0 J"
    digits = float(f"{joules:.3g}")
    factor, unit = next(((f, u) for f, u in _PREFIXES if digits >= f), _PREFIXES[-1])
    value = float(f"{digits / factor:.3g}")  # rounded again: 1e-7 / 1e-9 is a little less than 100
    decimals = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{decimals}f} {unit}"
