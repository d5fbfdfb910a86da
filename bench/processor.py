"""The name of this machine's processor, as written into results."""

from __future__ import annotations

import platform
from pathlib import Path


def processor() -> str:
    """The processor's name, family and model: in virtual machines the name is often only the maker's."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    first: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        first.setdefault(key.strip(), value.strip())
    name = first.get("model name") or platform.processor() or platform.machine()
    if "cpu family" not in first:
        return name
    return f"{name} (family {first['cpu family']}, model {first.get('model', '?')})"
