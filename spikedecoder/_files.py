"""Writing files completely or not at all."""

from __future__ import annotations

import errno
import math
import os
import secrets
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

_STREAMS = (Path("/dev"), Path("/dev/fd"), Path("/proc/self/fd"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write `path` completely or not at all. A device or pipe is written to, as a rename would replace it."""
    write_files({path: data})


def write_files(files: Mapping[Path, bytes], remove: Collection[Path] = ()) -> None:
    """`write_bytes` for files that belong together: none gets its final name before all are on disk.

    remove: files that do not belong to them; deleted, if they are there, before the new ones get their names.
    """
    staged: dict[Path, Path] = {}
    path = Path()
    try:
        for path, data in files.items():
            if _is_stream(path):
                with open(path, "wb") as stream:
                    stream.write(data)
                continue
            handle, staged[path] = temporary_beside(path)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for path in remove:
            path.unlink(missing_ok=True)
        for path in list(staged):
            os.replace(staged[path], path)
            del staged[path]
    except BaseException as error:
        for temporary in staged.values():
            temporary.unlink(missing_ok=True)
        raise_with_path(error, path)
        raise


def check_writable(path: Path) -> None:
    """Raise the OSError that `write_bytes` would, before long work. Creates nothing, not even a folder."""
    if not _is_stream(path):
        handle, temporary = temporary_beside(path, make_folder=False)
        os.close(handle)
        temporary.unlink()


def _is_stream(path: Path) -> bool:
    """Whether `path` is a device or a pipe; OSError if it cannot be written, such as a folder."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a folder, takes a file", str(path))
    if path.is_file() and path.parent in _STREAMS:
        reason = "cannot write (a stream that leads to a file; give that file a name of its own)"
        raise OSError(errno.EINVAL, reason, str(path))
    return path.exists() and not path.is_file()


def temporary_beside(path: Path, make_folder: bool = True) -> tuple[int, Path]:
    """A new file beside `path`, with the mode of any new file: (open descriptor, its path).

    If the folder is missing, it is created or, without `make_folder`, the nearest existing one above it is
    used.
    """
    try:
        folder = path.parent
        if make_folder:
            folder.mkdir(parents=True, exist_ok=True)
        else:
            folder = next(above for above in path.absolute().parents if above.exists())
        temporary = folder / f".{path.name}.{secrets.token_hex(4)}"
        # not mkstemp, which makes files private
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        return os.open(temporary, flags, 0o666), temporary
    except OSError as error:
        raise OSError(error.errno, f"cannot write ({error.strerror})", str(path)) from None


def temporary_folder(parent: Path, prefix: str) -> Path:
    """A new folder in `parent`, with the mode of any new folder."""
    folder = parent / f"{prefix}{secrets.token_hex(4)}"
    folder.mkdir()
    return folder


def raise_with_path(error: BaseException, path: Path) -> None:
    """Raise an OSError without a path, such as that of a full disk, again with `path`."""
    if isinstance(error, OSError) and error.errno and error.filename is None:
        raise OSError(error.errno, f"cannot write ({error.strerror})", str(path)) from None


def finite(value: Any) -> Any:
    """`value` with None in place of floats that are NaN or infinite, which JSON cannot express."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
