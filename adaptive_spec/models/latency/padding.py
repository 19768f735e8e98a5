"""Padding: how an engine rounds up what it verifies (graph buckets), as seen in its records."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from adaptive_spec.domain.allowed import LARGEST_K
from adaptive_spec.domain.engine_info import LARGEST_BATCH
from adaptive_spec.domain.policy import Granularity
from adaptive_spec.domain.step_record import StepRecord

LARGEST_BUCKET = 2 * LARGEST_BATCH
"""Requests. A larger bucket, which no engine has, is not learnt: times are predicted for every token count up to the largest."""
MOST_SIZES = 4096
"""Sizes remembered: beyond that the one seen longest ago goes."""


class Padding:
    """Learns the buckets: of batch sizes at batch granularity (padded = bucket (K + 1)), of token counts at request granularity.

    A size that was seen maps to what it was padded to. Another maps to the smallest known bucket that holds it, unless that is
    more padding than the engine was ever seen to add: then to itself, because an unknown smaller bucket may lie between.
    """

    def __init__(self, granularity: Granularity) -> None:
        self._per_request = granularity is Granularity.REQUEST
        self._largest = LARGEST_BUCKET * (LARGEST_K + 1) if self._per_request else LARGEST_BUCKET
        self.seen: dict[int, int] = {}
        self.pads = False

    def observe(self, record: StepRecord) -> None:
        if self._per_request:
            size, bucket = record.num_tokens, record.padded_tokens
        else:
            size, bucket = record.batch_size, record.padded_tokens // (record.k + 1)
        if max(size, bucket) <= self._largest:
            self.seen.pop(size, None)
            self.seen[size] = max(bucket, size)
            self.pads |= bucket > size
            if len(self.seen) > MOST_SIZES:
                del self.seen[next(iter(self.seen))]

    def padded_to(self, candidates: Iterable[int]) -> dict[int, int]:
        """Padded token count of every token count that was seen. candidates: the K the engine can run."""
        if self._per_request:
            return dict(self.seen)
        return {b * (k + 1): bucket * (k + 1) for b, bucket in self.seen.items() for k in candidates}

    def table(self, largest: int) -> NDArray[np.int64]:
        """Bucket of every size 0..largest."""
        sizes = np.arange(largest + 1)
        if not self.pads:
            return sizes
        seen, to = (np.fromiter(values, np.int64, len(self.seen)) for values in (self.seen.keys(), self.seen.values()))
        buckets = np.unique(to)
        holding = buckets[np.minimum(np.searchsorted(buckets, sizes), len(buckets) - 1)]
        most = int((to - seen).max())
        table = np.where((holding >= sizes) & (holding - sizes <= most), holding, sizes)
        inside = seen <= largest
        table[seen[inside]] = to[inside]
        return table

    def state(self) -> NDArray[np.float64]:
        return np.array(sorted(self.seen.items()), dtype=np.float64).reshape(-1, 2)

    def restore(self, state: NDArray[np.float64]) -> None:
        """Take over `state()`. Raises ValueError unless rows are (size, bucket) with bucket >= size >= 0, in bounds."""
        rows = np.asarray(state, dtype=np.float64)
        if (
            rows.ndim != 2
            or rows.shape[1] != 2
            or not np.isfinite(rows).all()
            or (rows[:, 1] < rows[:, 0]).any()
            or (rows < 0).any()
            or (rows > self._largest).any()
        ):
            raise ValueError(f"padding: must be rows of (size, bucket) with {self._largest} >= bucket >= size >= 0")
        self.seen = {int(size): int(bucket) for size, bucket in rows}
        self.pads = bool((rows[:, 1] > rows[:, 0]).any())
