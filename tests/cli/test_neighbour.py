from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

from adaptive_spec.cli.neighbour import BURST_S, bursts, compute_until
from tests.support.processes import PATIENCE_S, wait_for


def test_bursts_and_pauses_are_within_their_range_and_those_of_the_seed() -> None:
    some = list(itertools.islice(bursts(3), 200))
    assert all(BURST_S[0] <= seconds <= BURST_S[1] for pair in some for seconds in pair)
    assert some == list(itertools.islice(bursts(3), 200))
    assert some != list(itertools.islice(bursts(4), 200))


def test_it_computes_until_the_time_is_over() -> None:
    begun_s = time.process_time()
    compute_until(time.monotonic() + 0.2)
    assert time.process_time() > begun_s


def test_the_program_takes_a_core_until_it_is_ended() -> None:
    process = subprocess.Popen([sys.executable, "-m", "adaptive_spec.cli.neighbour", "1"])
    try:
        stat = Path(f"/proc/{process.pid}/stat")
        ticks = 0.3 * os.sysconf("SC_CLK_TCK")
        wait_for(lambda: int(stat.read_text().rpartition(")")[2].split()[11]) > ticks, "0.3 s of processor time")
        assert process.poll() is None
    finally:
        process.terminate()
        process.wait(PATIENCE_S)
