"""Threads of torch's that wait: how long they spin before they sleep, and that none is waited for in a fork.

OpenMP reads the first when torch loads it. The second: a forked child has none of its parent's OpenMP
threads, and whoever waits for them waits for ever. The C++ kernels notice; so that torch's own work between
them does not hang either, `torch.get_num_threads` is 1 in a child, as it is in a DataLoader's workers.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

LONG, SHORT = "10000", "1000"  # turns of a loop, of 10 to 50 nanoseconds


def spins(load: Path = Path("/proc/loadavg")) -> str:
    """What GOMP_SPINCOUNT should be: long where only this process runs, short where work shares the cores.

    Between the parallel parts of a training step Python takes some hundred microseconds, and a thread that
    sleeps then is slow to wake. But one that spins holds a core which others could use, and then waits for
    it: GNU OpenMP's own 300 000 turns make training several times slower beside other work. `load`: a file
    that says how many run, "... running/all ...".
    """
    try:
        for _ in range(5):
            running = int(load.read_text().split()[3].split("/")[0])
            if running <= 1:
                return LONG
            time.sleep(0.001)
    except (OSError, ValueError, IndexError):
        pass  # not Linux
    return SHORT


def one_thread_in_forks() -> None:
    """From now on, in whatever this process forks."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_one_thread)


def _one_thread() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "set_num_threads"):  # and is not just being imported
        torch.set_num_threads(1)
