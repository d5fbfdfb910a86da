"""Identify the extension's sources. Imports nothing of the package: setup.py runs this file too."""

from __future__ import annotations

import hashlib
from pathlib import Path

CSRC = Path(__file__).resolve().parents[2] / "csrc"  # in a checkout; an installed package has none


def fingerprint(folder: Path = CSRC) -> str | None:
    """A hash of the names and contents of the sources in `folder`; None if there are none."""
    files = sorted(f for f in folder.glob("*.*") if f.suffix in (".cpp", ".h", ".cu", ".cuh", ".txt"))
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        digest.update(f"{file.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]
