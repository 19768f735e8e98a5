"""Acceptance of single requests: decaying counts by request and draft position, shrunk towards all requests together.

c[i, j] = (accepted[i, j] + m c[j]) / (reached[i, j] + m),   m = PRIOR_STEPS

Where the first token has a calibrated confidence p, the request's own record corrects it, because a draft model may be too sure
of itself on one request and not on another:

s[i] = p (accepted[i] + m c[1]) / (expected[i] + m c[1]),   of the steps of request i in which p was known; expected = sum of p
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from adaptive_spec.domain.arrays import Floats, Ints, Lengths

PRIOR_STEPS = 10.0
"""Weight of the population's rate in a request's own, in steps (m above): about a fifth of what a request remembers."""
REQUEST_DECAY, POPULATION_DECAY = 0.98, 0.995
"""Weight of a step one step later: a request remembers about 1 / (1 - 0.98) = 50 steps, the population 200 steps."""
LEAST_RATE = 1e-9
"""Least c[1] of a correction: without it the rate of a draft that is never right falls to 0 after some 150 000 steps, and s of a
request without a record is 0 / 0. So small that it changes no correction that has a record."""
BASELINE_STEPS = 500
"""More than twice what the population remembers, so that a new table comes first where one is wanted; see `usual_of`. A younger
history has no baseline: what it would be compared with is itself still being learnt.
"""
REQUESTS_REMEMBERED = 4096
"""Requests whose history an engine keeps; the least recently used is dropped."""


class AcceptanceHistory:
    """Decaying acceptance counts by request and draft position.

    max_k: positions. capacity: requests kept; beyond that the least recently used is dropped.
    """

    def __init__(self, max_k: int, capacity: int) -> None:
        self._position = np.arange(max_k)
        self._below = (self._position < np.arange(max_k + 1)[:, None]).astype(float)
        """[n, j], 1 for draft positions j below n."""
        self._fading = np.where(self._below > 0.0, REQUEST_DECAY, 1.0)
        self._counts = np.zeros((capacity + 1, 2, max_k))
        """Reached and accepted by request. The last row stays 0: that of every unknown request."""
        self._all = np.array([np.full(max_k, 1.0), np.full(max_k, 0.5)])
        self._steps = 0
        """Steps observed."""
        self._table, self._baseline = -1, self.usual
        """See `usual_of`, which replaces them at its first call."""
        self._expected, self._accepted = [0.0] * (capacity + 1), [0.0] * (capacity + 1)
        """Expected and accepted first tokens by row, of the steps that had a calibrated confidence."""
        self._predicted: tuple[Sequence[int], Sequence[float]] = (), ()
        """Requests of the step whose outcome is to come, and the calibrated confidences of their first tokens."""
        self._row: dict[int, int] = {}
        self._free = list(range(capacity - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._row)

    def observe(self, request_ids: Sequence[int], accept_len: Lengths, verified: int | Lengths) -> None:
        """Learn one step: request_ids [b], accept_len [b], verified: K, or verify_len [b] where drafts were cut by request.

        Positions behind the first rejected token have no label. The counts of a position that was cut off fade as those of a
        verified one do, towards the population's rate, so that a request that is cut short is tried again.
        """
        of_all = isinstance(verified, int)
        predicted, self._predicted = self._predicted, ((), ())
        if len(accept_len) == 0 or not (verified if of_all else np.any(verified)):
            return
        self._steps += 1
        # On the engine's hot path: every call of numpy costs more than its arithmetic here, so there are few.
        rows = self._rows(request_ids)
        if predicted[0]:
            self._score(request_ids, rows.tolist(), predicted, accept_len.tolist(), verified)
        ends = np.empty((len(rows), 2), np.intp)  # positions reached and accepted end before these
        ends[:, 1] = accept_len
        np.minimum(ends[:, 1] + 1, verified, out=ends[:, 0])
        np.minimum(ends, len(self._position), out=ends)
        counts = self._below[ends]
        fading = self._fading[ends[:, 0]]
        if not of_all:
            fading[self._position >= np.asarray(verified)[:, None]] = REQUEST_DECAY
        self._counts[rows] = self._counts[rows] * fading[:, None] + counts
        steps = counts[0] if len(counts) == 1 else np.add.reduce(counts, axis=0)
        self._all = self._all * np.where(steps[0] > 0.0, POPULATION_DECAY, 1.0) + steps

    @property
    def usual(self) -> Floats:
        """P(accept j | all before j accepted) of all requests together, [max_k]."""
        return np.asarray(self._all[1] / self._all[0])

    def usual_of(self, table: int) -> Floats:
        """P(draft position j is accepted) for the requests that a K table was made for, [max_k]; called once a step.

        table: number of the table. It is what was usual at the first call with this number, and moves to what is usual now within
        some BASELINE_STEPS calls: a table that stays for so long holds for the present traffic too.
        """
        usual = np.multiply.accumulate(self.usual)
        if table != self._table or self._steps < BASELINE_STEPS:
            self._table, self._baseline = table, usual
        else:
            self._baseline = self._baseline + (usual - self._baseline) / BASELINE_STEPS
        return self._baseline

    def conditional(self, request_ids: Sequence[int]) -> Floats:
        """P(accept j | all before j accepted) of each request, [b, max_k]; of an unknown request, the population's."""
        population = self.usual * PRIOR_STEPS
        known, unknown = self._row, len(self._counts) - 1
        counts = self._counts[[known.get(request, unknown) for request in request_ids]]
        return np.asarray((counts[:, 1] + population) / (counts[:, 0] + PRIOR_STEPS))

    def first_tokens(self, request_ids: Sequence[int], calibrated: Sequence[float]) -> list[float]:
        """P(accept) of each request's first draft token in the coming step, [b]: its confidence, corrected by its own record.

        calibrated: P(accept) by the confidence alone, [b], NaN where it is unknown; the result is NaN there too. The next
        `observe` compares it with what was accepted, so the outcome of a step must come before the next is decided: confidences
        are known in time only where steps do not overlap.
        """
        known, unknown, expected, accepted = self._row, len(self._expected) - 1, self._expected, self._accepted
        prior = PRIOR_STEPS * max(float(self._all[1, 0] / self._all[0, 0]), LEAST_RATE)
        found = []
        for request, chance in zip(request_ids, calibrated, strict=True):
            row = known.get(request, unknown)
            found.append(min(chance * (accepted[row] + prior) / (expected[row] + prior), 1.0))
        self._predicted = request_ids, calibrated
        return found

    def forget_prediction(self) -> None:
        """A new step is decided: the outcome of the last one, if it did not come, is not compared."""
        self._predicted = (), ()

    def _score(
        self, request_ids: Sequence[int], rows: list[int], predicted: tuple[Sequence[int], Sequence[float]],
        accept_len: list[int], verified: int | Lengths,
    ) -> None:  # fmt: skip
        """Count a step in the records of the requests that had a calibrated confidence and a verified token."""
        expected, accepted = self._expected, self._accepted
        ids, chances = predicted
        if list(ids) != list(request_ids):  # some have ended meanwhile
            by_request = dict(zip(ids, chances, strict=True))
            chances = [by_request.get(request, math.nan) for request in request_ids]
        lengths = [verified] * len(rows) if isinstance(verified, int) else verified.tolist()
        for row, chance, ran, right in zip(rows, chances, lengths, accept_len, strict=True):
            if ran > 0 and chance >= 0.0:
                expected[row] = expected[row] * REQUEST_DECAY + chance
                accepted[row] = accepted[row] * REQUEST_DECAY + (right > 0)

    def _rows(self, request_ids: Sequence[int]) -> Ints:
        rows = np.empty(len(request_ids), np.int64)
        for i, request in enumerate(request_ids):
            row = self._row.pop(request, None)
            if row is None:
                row = self._free.pop() if self._free else self._row.pop(next(iter(self._row)))
                self._counts[row] = self._expected[row] = self._accepted[row] = 0.0
            self._row[request] = rows[i] = row  # last in the order: most recently used
        return rows
