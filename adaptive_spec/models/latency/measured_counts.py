"""What is measured of verify latency, by token count: a read-only view for the sweep, which chooses what to measure next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple


class MeasuredCount(NamedTuple):
    """mean_s: mean seconds at speed factor 0, > 0. samples: since the mean last restarted, >= 0."""

    mean_s: float
    samples: int


@dataclass(frozen=True)
class MeasuredCounts:
    """by_padded: what is measured, by padded token count. padded_to: padded count of those counts that were seen padded.

    noise: relative standard deviation of one sample.
    """

    by_padded: Mapping[int, MeasuredCount]
    padded_to: Mapping[int, int]
    noise: float

    def get(self, tokens: int) -> MeasuredCount | None:
        """What is measured of `tokens`, padded as the engine pads it; None: nothing."""
        return self.by_padded.get(self.padded_to.get(tokens, tokens))
