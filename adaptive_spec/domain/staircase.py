"""The verify latency staircase: segments and tile boundaries."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """One piece of the staircase: seconds = intercept_s + slope_s_per_token * num_tokens for first..last tokens."""

    first: int
    last: int
    intercept_s: float
    slope_s_per_token: float


@dataclass(frozen=True)
class Boundary:
    """A tile boundary.

    tokens: last token count of the cheaper tile. jump_ratio: latency of one token more over that of `tokens`, >= 1 + threshold.
    """

    tokens: int
    jump_ratio: float
