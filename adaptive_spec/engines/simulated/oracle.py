"""The upper bound of all policies: it reads the state of the simulated server."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from adaptive_spec.domain.plan_search import best_slots
from adaptive_spec.engines.simulated.decider import PlainDecider
from adaptive_spec.engines.simulated.plans import best_ragged, expected_tokens
from adaptive_spec.engines.simulated.server import SimulatedServer

SWITCH_STEPS = 8
"""Steps over which a change of K is charged: about the time until a request leaves a batch of some tens."""


class Oracle(PlainDecider):
    """Knows curve, classes, every quality u and, at request granularity, every q; takes the plan of most expected tokens per
    expected second at each step. No policy can exceed it in expectation. Where a change of K costs, it is charged over the next
    `SWITCH_STEPS` steps at batch granularity and not at all at request granularity: then the oracle is a good policy, no bound.
    """

    reads_scores = True

    def __init__(self, server: SimulatedServer) -> None:
        super().__init__()
        self._server = server
        self._allowed = server.scenario.allowed_mask()
        self._switch_ms = server.scenario.file.latency.k_switch_ms / SWITCH_STEPS
        self.reads_scores = server.ragged
        self._k = -1
        self._slots = 0

    def draft_length(self, batch_size: int, kv_tokens: int) -> int:
        server = self._server
        if server.ragged:
            k, self._slots, _ = best_ragged(server.q, server.costs, kv_tokens, server.scenario.allowed_k(batch_size))
        else:
            expected = expected_tokens(server.requests.survival[:batch_size])
            step_ms = server.costs.batch_step_ms(batch_size, kv_tokens)
            if self._switch_ms and server.last_k is not None:
                step_ms += self._switch_ms * server.costs.scale * (np.arange(len(step_ms)) != server.last_k)
            k = int(np.where(self._allowed[batch_size], expected / step_ms, 0.0).argmax())
        self.swaps += self._k not in (-1, k)
        self._k = k
        return k

    def verify_lengths(self, confidences: NDArray[np.float32]) -> NDArray[np.uint8] | None:
        return best_slots(np.asarray(np.cumprod(self._server.q[:, : self._k], axis=1)), self._slots)
