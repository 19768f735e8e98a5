"""Verify latency by token count, as defined in a scenario.

latency(t) = ms of the smallest listed token count >= t; beyond the last point the line through the last two continues
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from adaptive_spec.domain.arrays import Floats
from adaptive_spec.errors import BadInput
from adaptive_spec.offline.samples import MAX_NUM_TOKENS, read_latency


class Curve(NamedTuple):
    """tokens: int64 [n >= 2], ascending, >= 1. ms: float64 [n], > 0."""

    tokens: NDArray[np.int64]
    ms: Floats

    def table(self, largest: int) -> Floats:
        """Milliseconds of every token count 0..largest; [0] is that of one token."""
        counts = np.maximum(np.arange(largest + 1), 1)
        at = np.searchsorted(self.tokens, counts)
        last, before = self.tokens[-1], self.tokens[-2]
        slope = (self.ms[-1] - self.ms[-2]) / (last - before)
        beyond = self.ms[-1] + slope * (counts - last)
        return np.where(at < len(self.tokens), self.ms[np.minimum(at, len(self.tokens) - 1)], beyond)


def read_curve(given: str | Sequence[Sequence[float]], folder: Path, field: str) -> Curve:
    """Make a curve of a CSV file's name (relative to `folder`) or of a list [[tokens, ms], ...].

    Raises BadInput: `field`, what is allowed, what was given.
    """
    if isinstance(given, str):
        try:
            samples = read_latency(folder / given)
        except BadInput as error:
            raise BadInput(f"{field}: {error}") from error
        tokens, ms = samples.num_tokens, samples.latency_s * 1e3
    else:
        for index, point in enumerate(given):
            count, latency = point
            if not (float(count).is_integer() and 1 <= count <= MAX_NUM_TOKENS):
                raise BadInput(f"{field}.{index}: tokens: must be a whole number in 1..{MAX_NUM_TOKENS}, got {count:g}")
            if not latency > 0.0:
                raise BadInput(f"{field}.{index}: ms: must be > 0, got {latency:g}")
        tokens = np.array([int(point[0]) for point in given], dtype=np.int64)
        ms = np.array([point[1] for point in given], dtype=np.float64)
    if len(tokens) < 2:
        raise BadInput(f"{field}: must have at least 2 points, got {len(tokens)}")
    unsorted = np.flatnonzero(np.diff(tokens) <= 0)
    if len(unsorted):
        at = int(unsorted[0])
        raise BadInput(f"{field}: token counts must ascend, got {int(tokens[at + 1])} after {int(tokens[at])}")
    return Curve(tokens, ms)
