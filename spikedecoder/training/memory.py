"""Running out of memory raises an error, where Linux would kill the process without a message."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PHRASES = ("not enough memory", "can't allocate memory", "out of memory", "std::bad_alloc")
_SHARE = 0.95  # of the available memory; the rest is for page tables and the kernel


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out.

    It is a MemoryError from Python, NumPy or the extension, a RuntimeError from torch, on any device.
    """
    words = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(phrase in words for phrase in _PHRASES)
    )


def available() -> int | None:
    """Bytes this process may still allocate: what the machine or its container has left; None if unknown."""
    try:
        free: float = 1024 * _fields(Path("/proc/meminfo"))["MemAvailable"]
        groups = Path("/proc/self/cgroup").read_text().splitlines()
    except (OSError, KeyError, ValueError):
        return None
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            root, names = Path("/sys/fs/cgroup"), ("memory.max", "memory.current", "inactive_file")
        elif controllers == "memory":
            root = Path("/sys/fs/cgroup/memory")
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        here = root / path.lstrip("/")
        for folder in (here, *here.parents[: len(here.parts) - len(root.parts)]):
            free = min(free, _left(folder, *names))
    return max(int(free), 0)


def _left(folder: Path, limit: str, usage: str, cache: str) -> float:
    """Bytes left below a control group's limit; file caches that can be dropped count as free."""
    try:
        used = int((folder / usage).read_text()) - _fields(folder / "memory.stat").get(cache, 0)
        return int((folder / limit).read_text()) - used
    except (OSError, ValueError):  # the group is not visible, or has no limit ("max")
        return float("inf")


def _fields(path: Path) -> dict[str, int]:
    """The numbers by name, of lines such as "MemAvailable: 12 kB"."""
    rows = (line.replace(":", " ").split() for line in path.read_text().splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


@contextmanager
def no_more_than_available() -> Iterator[None]:
    """Let allocations beyond the memory that is free now fail, as they do on other systems.

    Linux would grant them and later kill the process. Sets a limit of the process (RLIMIT_DATA) and restores
    it at the end; does nothing on other systems.
    """
    free = available()
    if free is None:
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = 1024 * _fields(Path("/proc/self/status"))["VmData"] + int(_SHARE * free)
    for other in (soft, hard):
        if other != resource.RLIM_INFINITY:
            limit = min(limit, other)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
