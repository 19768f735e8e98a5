"""The policy no other can beat: it knows the simulated server from inside."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from adaptive_spec.domain.plan_search import best_slots
from adaptive_spec.engines.simulated.decider import PlainDecider
from adaptive_spec.engines.simulated.plans import best_ragged, expected_tokens
from adaptive_spec.engines.simulated.server import SimulatedServer


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
