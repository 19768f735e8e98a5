"""Who decides K: the port every policy under test stands behind, and the plain ones.

A decider sees what a server sees: batch size and KV tokens before a step, the confidences of what was drafted, and the
StepRecord afterwards. Only the oracle looks into the server itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from adaptive_spec.domain.plan_search import best_slots
from adaptive_spec.domain.step_record import StepRecord
from adaptive_spec.engines.simulated.plans import best_ragged, expected_tokens

if TYPE_CHECKING:
    from adaptive_spec.engines.simulated.server import SimulatedServer

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


class Oracle(PlainDecider):
    """Knows curve, classes, every quality u and, at request granularity, every q; takes the plan of most expected tokens per
    expected second at each step. No policy can beat it but by luck, at request granularity none at all on average.
    """

    reads_scores = True

    def __init__(self, server: SimulatedServer) -> None:
        super().__init__()
        self._server = server
        self.reads_scores = server.ragged
        self._k = -1
        self._slots = 0

    def draft_length(self, batch_size: int, kv_tokens: int) -> int:
        server = self._server
        if server.ragged:
            k, self._slots, _ = best_ragged(server.q, server.costs, kv_tokens)
        else:
            expected = expected_tokens(server.requests.survival[:batch_size])
            k = int((expected / server.costs.batch_step_ms(batch_size, kv_tokens)).argmax())
        self.swaps += self._k not in (-1, k)
        self._k = k
        return k

    def verify_lengths(self, confidences: NDArray[np.float32]) -> NDArray[np.uint8] | None:
        return best_slots(np.asarray(np.cumprod(self._server.q[:, : self._k], axis=1)), self._slots)
