"""Who decides K: the port every policy under test stands behind, and the plain ones.

A decider sees what a server sees: batch size and KV tokens before a step, the confidences of what was drafted, and the
StepRecord afterwards. Only the oracle looks into the server itself.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from adaptive_spec.domain.step_record import StepRecord

LAUNCH_K = 3
"""Draft length servers are launched with, cut to max_k."""


class Decider(Protocol):
    """One policy in one run.

    reads_scores: wants the confidences (drawing them costs time). reads_records: `observe` is called. version, flags: go
    into the next record. swaps: how often it changed its mind. failures: calls inside it that raised and were caught.
    """

    reads_scores: bool
    reads_records: bool
    version: int
    flags: int
    failures: int

    @property
    def swaps(self) -> int: ...

    @property
    def probe_share(self) -> float | None:
        """Share of decode time lost to trials, None where that is not known."""
        ...

    def expect(self, request_ids: NDArray[np.uint32]) -> None:
        """Take the ids [b] of the coming step's requests; batch granularity only."""
        ...

    def draft_length(self, batch_size: int, kv_tokens: int) -> int:
        """Return K of the coming step, 0..max_k."""
        ...

    def verify_lengths(self, confidences: NDArray[np.float32]) -> NDArray[np.uint8] | None:
        """Request granularity: verify_len [b] for confidences [b, k], None for all of them."""
        ...

    def observe(self, record: StepRecord) -> None:
        """Learn one step."""
        ...


class PlainDecider:
    """What most deciders share: no scores, no records, no swaps, everything drafted is verified."""

    reads_scores = False
    reads_records = False
    version = 0
    flags = 0
    failures = 0
    probe_share: float | None = None

    def __init__(self) -> None:
        self.swaps = 0

    def expect(self, request_ids: NDArray[np.uint32]) -> None:
        return None

    def verify_lengths(self, confidences: NDArray[np.float32]) -> NDArray[np.uint8] | None:
        return None

    def observe(self, record: StepRecord) -> None:
        raise NotImplementedError("this decider reads no records")


class Static(PlainDecider):
    """One K, whatever happens: what people configure today."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def draft_length(self, batch_size: int, kv_tokens: int) -> int:
        return self.k
