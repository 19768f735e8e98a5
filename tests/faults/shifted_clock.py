"""The command line with a wall clock that a file shifts: `python -m tests.faults.shifted_clock sidecar ...`.

SHIFT_VARIABLE names the file; it holds the seconds to add, and may change. Only this process's own readings are shifted: the
times of files are the kernel's.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

SHIFT_VARIABLE = "ADAPTIVE_SPEC_TEST_CLOCK_SHIFT"
_true_time, _true_time_ns = time.time, time.time_ns


def shift_s() -> float:
    try:
        return float(Path(os.environ[SHIFT_VARIABLE]).read_text())
    except (OSError, ValueError):  # in the middle of being written
        return 0.0


def main() -> None:
    time.time = lambda: _true_time() + shift_s()
    time.time_ns = lambda: _true_time_ns() + round(1e9 * shift_s())
    from adaptive_spec.cli.main import main as command

    command()


if __name__ == "__main__":
    main()
