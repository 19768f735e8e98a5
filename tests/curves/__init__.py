"""Published latency curves as arrays; the source of each is in its file's header."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FOLDER = Path(__file__).parent


def load(name: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return (num_tokens [n], seconds [n])."""
    rows = np.loadtxt(FOLDER / f"{name}.csv", delimiter=",", comments="#", skiprows=_header_rows(name))
    return rows[:, 0].astype(np.int64), rows[:, 1] * 1e-3


def _header_rows(name: str) -> int:
    lines = (FOLDER / f"{name}.csv").read_text().splitlines()
    return next(i for i, line in enumerate(lines) if line.startswith("num_tokens")) + 1
