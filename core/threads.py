"""How torch's threads wait for each other. Has to be said before torch is imported, so it imports nothing heavy."""

from __future__ import annotations

import os

SPINS = "1000"  # a few dozen microseconds


def spin_briefly() -> None:
    """Let OpenMP threads spin for microseconds, not milliseconds, before they sleep; the user's own setting wins.

    By default libgomp spins for several milliseconds at the end of every parallel region. When another process wants
    one of the cores, each of the hundreds of regions of a step then waits for the scheduler: measured on two cores with
    a second job, 144 s instead of 5 s for the same answers.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
