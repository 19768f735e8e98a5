"""Recent drafts, with missing positions imputed: what the requests of the next steps will look like.

A plan that drafts deeper than the present one is judged on positions that were not drafted lately. Each missing confidence is
imputed from donors (hot-deck imputation; Andridge and Little, 2010): observed pairs (confidence at position j - 1, confidence
at j), of which one with the nearest first value is taken, so that the correlation along a draft is kept. Averages of accepted
tokens would be biased: at request granularity only the likely continuations are verified.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Confidences = NDArray[np.float32]

ROWS = 512
STEPS, NEWEST_ROWS = 100, 64
"""Rows are the drafts of so many steps, or the newest so many where there were fewer."""
DONORS = 256
"""Pairs a position keeps."""
MIN_DONORS, DONOR_STEPS = 32, 400
"""Pairs that imputation needs, and the age in steps beyond which only so many of the newest pairs are used."""


class RecentDrafts:
    """Confidences of the last requests' drafts, for positions 1..max_k."""

    def __init__(self, max_k: int) -> None:
        self.max_k = max_k
        self._rows: Confidences = np.full((ROWS, max_k), np.nan, dtype=np.float32)
        """Oldest first; NaN where nothing was drafted, the confidence is unknown, or there is no row yet."""
        self._step = np.full(ROWS, -np.inf)
        self._donors: Confidences = np.full((max_k, DONORS, 2), np.nan, dtype=np.float32)
        """Pairs by position of the second value, [max_k, DONORS, 2], oldest first."""
        self._donor_step = np.full((max_k, DONORS), -np.inf)

    def remember(self, confidences: Confidences, drafted: NDArray[np.int64], step: int) -> None:
        """Take the drafts of a step or of several: confidences [rows, k], drafted [rows] leading ones of each that are known.

        A row of which none is known counts as a draft all the same, and displaces an older one.
        """
        rows, count = confidences[-ROWS:], drafted[-ROWS:]
        n, k = rows.shape
        kept = np.full((n, self.max_k), np.nan, dtype=np.float32)
        kept[:, :k] = np.where(np.arange(k) < count[:, None], rows, np.nan)
        self._rows = np.concatenate((self._rows[n:], kept))
        self._step = np.concatenate((self._step[n:], np.full(n, float(step))))
        for j in range(1, min(k, self.max_k)):
            pairs = rows[count > j][-DONORS:, j - 1 : j + 1]
            if len(pairs):
                self._donors[j] = np.concatenate((self._donors[j, len(pairs) :], pairs))
                self._donor_step[j] = np.concatenate((self._donor_step[j, len(pairs) :], np.full(len(pairs), float(step))))

    def drop_old_donors(self, step: int) -> None:
        """After a change of traffic: keep the pairs of the last `STEPS` steps only."""
        self._donors[self._donor_step <= step - STEPS] = np.nan

    def rows(self, step: int) -> Confidences:
        """Recent drafts [rows, max_k], newest first, missing positions imputed; NaN where there are too few donors or
        nothing is known of the row.
        """
        filled = self._step > -np.inf
        recent = int((filled & (self._step > step - STEPS)).sum())
        rows = self._rows[filled][::-1][: max(recent, NEWEST_ROWS)].copy()
        for j in range(1, self.max_k):
            missing = np.flatnonzero(np.isnan(rows[:, j]) & ~np.isnan(rows[:, j - 1]))
            kept = ~np.isnan(self._donors[j, :, 0])
            kept[:-MIN_DONORS] &= self._donor_step[j, :-MIN_DONORS] > step - DONOR_STEPS
            donors = self._donors[j, kept]
            if not len(missing) or len(donors) < MIN_DONORS:
                continue
            donors = donors[np.argsort(donors[:, 0], kind="stable")]
            # Spread equal confidences over neighbouring donors, so that similar requests do not all get the same one.
            order = missing[np.argsort(rows[missing, j - 1], kind="stable")]
            spread = np.arange(len(order)) % 5 - 2
            nearest = np.clip(np.searchsorted(donors[:, 0], rows[order, j - 1]) + spread, 0, len(donors) - 1)
            rows[order, j] = donors[nearest, 1]
        return rows

    def state(self) -> dict[str, NDArray[np.float64]]:
        """Arrays to restore from."""
        return {"recent": self._rows.astype(np.float64), "decks": self._donors.astype(np.float64)}

    def restore(self, state: Mapping[str, NDArray[np.float64]]) -> None:
        """Take over `state()` as of step 0. Raises ValueError, and changes nothing, when it cannot be one."""
        found = {}
        for name, own in (("recent", self._rows), ("decks", self._donors)):
            array = np.asarray(state[name])
            if array.shape != own.shape:
                raise ValueError(f"{name} has shape {array.shape}, must be {own.shape}")
            if not (np.isnan(array) | ((array > 0) & (array <= 1))).all():
                raise ValueError(f"{name} must hold confidences in (0, 1], or NaN")
            found[name] = array.astype(np.float32)
        self._rows, self._donors = found["recent"], found["decks"]
        self._step = np.where(np.isnan(self._rows[:, :1]).all(axis=1), -np.inf, 0.0)
        self._donor_step = np.where(np.isnan(self._donors[:, :, 0]), -np.inf, 0.0)
