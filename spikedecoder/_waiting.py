"""Torch's waiting threads: how long they spin before they sleep, and one thread only in forked processes.

The environment variable for the first is read when torch loads OpenMP. The second is needed because a forked
child has none of its parent's OpenMP threads, so that waiting for them never ends. The C++ kernels detect a
fork; so that torch's own operations do not hang either, `torch.get_num_threads` is 1 in a child, as in a
DataLoader's workers.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

LONG, SHORT = "10000", "1000"  # iterations of a loop, 10 to 50 nanoseconds each


def spins(load: Path = Path("/proc/loadavg")) -> str:
    """The value for GOMP_SPINCOUNT: long if only this process is running, short if others share the cores.

    Between the parallel parts of a training step Python takes a few hundred microseconds, and a thread that
    goes to sleep meanwhile is slow to wake. But a spinning thread occupies a core that others could use, and
    others then occupy its own: with GNU OpenMP's default of 300 000 iterations, training is several times
    slower beside other work. `load`: a file in the format of /proc/loadavg, "... running/all ...".
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
    """Let torch use one thread in every process that is forked from now on."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_one_thread)


def _one_thread() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "set_num_threads"):  # it may be only partly imported
        torch.set_num_threads(1)
