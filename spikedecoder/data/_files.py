"""Writing files whole or not at all, and the folder of cached files."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from spikedecoder._files import raise_with_path, temporary_beside

BLOCK_BYTES = 1 << 20


@contextmanager
def atomic_writer(path: str | Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside ``path``; rename it to ``path`` when the block ends without an error.

    If the process dies half-way or the disk is full, whatever was at ``path`` stays untouched.
    """
    path = Path(path)
    descriptor, temporary = temporary_beside(path)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        raise_with_path(error, path)
        raise


def sha256_of_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes as 64 hexadecimal digits, read block by block."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def default_cache_dir() -> Path:
    """The folder for downloaded texts and encoded tokens.

    ``SPIKEDECODER_CACHE`` if it is set, otherwise the operating system's own cache folder.
    """
    chosen = os.environ.get("SPIKEDECODER_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    import pooch

    return Path(pooch.os_cache("spikedecoder"))


def make_cache_dir(folder: Path) -> None:
    """Make ``folder`` in the cache if it is not there; OSError with advice if it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        reason = f"cannot write to the cache ({error.strerror}); set SPIKEDECODER_CACHE to another folder"
        raise OSError(error.errno, reason, str(folder)) from None
