"""Acceptance of single requests: decaying counts by request and draft position, shrunk towards all requests together.

c[i, j] = (accepted[i, j] + m c[j]) / (reached[i, j] + m),   m = PRIOR_STEPS
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from adaptive_spec.domain.arrays import Floats, Ints, Lengths

PRIOR_STEPS = 10.0
"""Weight of the population's rate in a request's own, in steps (m above): about a fifth of what a request remembers."""
REQUEST_DECAY, POPULATION_DECAY = 0.98, 0.995
"""Weight of a step one step later: a request remembers about 1 / (1 - 0.98) = 50 steps, the population 200 steps."""
REQUESTS_REMEMBERED = 4096
"""Requests whose history an engine keeps; the least recently used is dropped."""


class AcceptanceHistory:
    """Decaying acceptance counts by request and draft position.

    max_k: positions. capacity: requests kept; beyond that the least recently used is dropped.
    """

    def __init__(self, max_k: int, capacity: int) -> None:
        self._position = np.arange(max_k)
        self._reached = np.zeros((capacity, max_k))
        self._accepted = np.zeros((capacity, max_k))
        self._all_reached = np.full(max_k, 1.0)
        self._all_accepted = np.full(max_k, 0.5)
        self._row: dict[int, int] = {}
        self._free = list(range(capacity - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._row)

    def observe(self, request_ids: Sequence[int], accept_len: Lengths, verified: int | Lengths) -> None:
        """Learn one step: request_ids [b], accept_len [b], verified: K, or verify_len [b] where drafts were cut by request.

        Positions behind the first rejected token have no label. The counts of a position that was cut off fade as those of a
        verified one do, towards the population's rate, so that a request that is cut short is tried again.
        """
        if len(accept_len) == 0 or not np.any(verified):
            return
        rows = self._rows(request_ids)
        accepted = self._position < accept_len[:, None]
        # int64: uint8 arithmetic on 255 would wrap.
        reached = self._position < np.minimum(accept_len.astype(np.int64) + 1, verified)[:, None]
        fading = reached if isinstance(verified, int) else reached | (self._position >= verified[:, None])
        decay = np.where(fading, REQUEST_DECAY, 1.0)
        self._reached[rows] = self._reached[rows] * decay + reached
        self._accepted[rows] = self._accepted[rows] * decay + accepted
        steps = reached.sum(axis=0)
        forget = np.where(steps > 0, POPULATION_DECAY, 1.0)
        self._all_reached = self._all_reached * forget + steps
        self._all_accepted = self._all_accepted * forget + accepted.sum(axis=0)

    @property
    def usual(self) -> Floats:
        """P(accept j | all before j accepted) of all requests together, [max_k]."""
        return np.asarray(self._all_accepted / self._all_reached)

    def conditional(self, request_ids: Sequence[int]) -> Floats:
        """P(accept j | all before j accepted) of each request, [b, max_k]; of an unknown request, the population's."""
        population = self.usual * PRIOR_STEPS
        rows = np.fromiter((self._row.get(i, -1) for i in request_ids), np.int64, len(request_ids))
        known = rows >= 0
        reached = np.where(known[:, None], self._reached[rows], 0.0)
        accepted = np.where(known[:, None], self._accepted[rows], 0.0)
        return np.asarray((accepted + population) / (reached + PRIOR_STEPS))

    def _rows(self, request_ids: Sequence[int]) -> Ints:
        rows = np.empty(len(request_ids), np.int64)
        for i, request in enumerate(request_ids):
            row = self._row.pop(request, None)
            if row is None:
                row = self._free.pop() if self._free else self._row.pop(next(iter(self._row)))
                self._reached[row] = self._accepted[row] = 0.0
            self._row[request] = rows[i] = row  # last in the order: most recently used
        return rows
