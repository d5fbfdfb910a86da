"""How long threads that wait for work spin before they sleep. OpenMP reads it when torch loads it."""

from __future__ import annotations

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
