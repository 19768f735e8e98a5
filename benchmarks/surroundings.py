"""What benchmarks of real processes share: a folder in memory, the client of a sidecar that starts, memory of a process."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adaptive_spec.client.sidecar import ControlClient
from adaptive_spec.errors import BadInput

START_S = 60.0
"""For a sidecar to answer."""


@contextmanager
def folder_in_memory() -> Iterator[Path]:
    """A new folder, in memory where that can be had, as a runtime folder is. It is removed afterwards."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as folder:
        yield Path(folder)


def started_client(runtime_dir: Path) -> ControlClient:
    """Wait for the sidecar of a folder. Raises BadInput when none answers within `START_S`."""
    deadline_s = time.monotonic() + START_S
    while True:
        try:
            return ControlClient.find(runtime_dir, None, None)
        except BadInput:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.1)


def resident_mb(pid: int) -> float:
    """Resident memory, 10^6 bytes. Raises OSError and IndexError for a process that has ended."""
    return int(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0]) * 1024 / 1e6
