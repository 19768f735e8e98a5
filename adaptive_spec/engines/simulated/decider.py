"""The interface of every policy under test, and policies that learn nothing.

A decider sees what a server sees: batch size and KV tokens before a step, the confidences of what was drafted, and the
StepRecord afterwards. Only the oracle reads the server's state.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from adaptive_spec.domain.step_record import StepRecord


class Decider(Protocol):
    """One policy in one run.

    reads_scores: wants the confidences (drawing them costs time). reads_records: `observe` is called. version, flags: go
    into the next record. swaps: how often its decision changed. failures: calls inside it that raised and were caught.
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
        """Return K of the coming step, 0..max_k; one that is not allowed at this batch size is replaced by the server."""
        ...

    def verify_lengths(self, confidences: NDArray[np.float32]) -> NDArray[np.uint8] | None:
        """Request granularity: verify_len [b] for confidences [b, k], None for all of them."""
        ...

    def observe(self, record: StepRecord) -> None:
        """Learn one step."""
        ...


class PlainDecider:
    """Defaults: reads no scores and no records, verifies all drafted tokens."""

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
    """A fixed K, as servers are configured without adaptive K."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def draft_length(self, batch_size: int, kv_tokens: int) -> int:
        return self.k
