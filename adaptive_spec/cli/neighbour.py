"""A program that takes a core in bursts, as other programs on a machine do: a neighbour of the engine in `demo --neighbours`.

python -m adaptive_spec.cli.neighbour SEED      until it is ended

It computes for a uniform time of `BURST_S`, then sleeps for one of the same range, and so on: half a core in the mean. Bursts of
this length are the hard ones. A slowness of a few steps averages out, one of minutes can be learnt; in between, what was measured
of one plan in a burst and of another outside says nothing about the two plans.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Iterator

BURST_S = (0.2, 3.0)
"""Shortest and longest burst, and pause."""


def bursts(seed: int) -> Iterator[tuple[float, float]]:
    """Seconds of each burst and of the pause after it."""
    rng = random.Random(seed)
    while True:
        yield rng.uniform(*BURST_S), rng.uniform(*BURST_S)


def compute_until(end_s: float) -> None:
    """Keep one core busy until `time.monotonic()` reaches end_s."""
    x = 1.0
    while time.monotonic() < end_s:
        for _ in range(1000):
            x = math.sqrt(x + 1.0)


def main() -> None:
    for burst_s, pause_s in bursts(int(sys.argv[1])):
        compute_until(time.monotonic() + burst_s)
        time.sleep(pause_s)


if __name__ == "__main__":
    main()
