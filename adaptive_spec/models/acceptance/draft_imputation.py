"""The drafts of late: what the requests of the next steps will look like.

A plan that drafts deeper than the present one must be judged on positions nobody has drafted lately. Each missing confidence is
taken from a deck of real pairs (confidence at position j - 1, confidence at j), dealt at the card whose first value is nearest
(hot-deck imputation; Andridge and Little, 2010): sure drafts go on sure, doubtful ones doubtful, as they really do. Averages
of accepted tokens would not do: with ragged verification only the likely continuations are ever verified.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Confidences = NDArray[np.float32]

ROWS = 512
STEPS, NEWEST_ROWS = 100, 64
"""Rows are the drafts of so many steps, or the newest so many where there were fewer."""
CARDS = 256
"""Pairs a position remembers."""
FULL_DECK, CARD_STEPS = 32, 400
"""Pairs from which on a deck is dealt from, and the age from which on only so many of the newest are kept in it."""


class RecentDrafts:
    """Confidences of the last requests' drafts, for positions 1..max_k."""

    def __init__(self, max_k: int) -> None:
        self.max_k = max_k
        self._rows: Confidences = np.full((ROWS, max_k), np.nan, dtype=np.float32)
        """Oldest first, NaN where nothing was drafted, nothing is known or no row is there yet."""
        self._step = np.full(ROWS, -np.inf)
        self._decks: Confidences = np.full((max_k, CARDS, 2), np.nan, dtype=np.float32)
        """Pairs by the second one's position, oldest first."""
        self._card_step = np.full((max_k, CARDS), -np.inf)

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
            pairs = rows[count > j][-CARDS:, j - 1 : j + 1]
            if len(pairs):
                self._decks[j] = np.concatenate((self._decks[j, len(pairs) :], pairs))
                self._card_step[j] = np.concatenate((self._card_step[j, len(pairs) :], np.full(len(pairs), float(step))))

    def forget_decks(self, step: int) -> None:
        """After other traffic was noticed: deal only what followed in the last `STEPS` steps."""
        self._decks[self._card_step <= step - STEPS] = np.nan

    def rows(self, step: int) -> Confidences:
        """The drafts of late [rows, max_k], newest first, missing positions dealt; NaN where no deck is full enough, and in
        rows of which nothing is known.
        """
        filled = self._step > -np.inf
        young = int((filled & (self._step > step - STEPS)).sum())
        rows = self._rows[filled][::-1][: max(young, NEWEST_ROWS)].copy()
        for j in range(1, self.max_k):
            missing = np.flatnonzero(np.isnan(rows[:, j]) & ~np.isnan(rows[:, j - 1]))
            kept = ~np.isnan(self._decks[j, :, 0])
            kept[:-FULL_DECK] &= self._card_step[j, :-FULL_DECK] > step - CARD_STEPS
            deck = self._decks[j, kept]
            if not len(missing) or len(deck) < FULL_DECK:
                continue
            deck = deck[np.argsort(deck[:, 0], kind="stable")]
            # Equal confidences are dealt apart, so that many alike requests do not all meet the same card.
            order = missing[np.argsort(rows[missing, j - 1], kind="stable")]
            spread = np.arange(len(order)) % 5 - 2
            card = np.clip(np.searchsorted(deck[:, 0], rows[order, j - 1]) + spread, 0, len(deck) - 1)
            rows[order, j] = deck[card, 1]
        return rows

    def state(self) -> dict[str, NDArray[np.float64]]:
        """Arrays to restore from."""
        return {"recent": self._rows.astype(np.float64), "decks": self._decks.astype(np.float64)}

    def restore(self, state: Mapping[str, NDArray[np.float64]]) -> None:
        """Take over `state()` as of step 0; raise ValueError (and change nothing) when it cannot be one."""
        found = {}
        for name, own in (("recent", self._rows), ("decks", self._decks)):
            array = np.asarray(state[name], dtype=np.float32)
            if array.shape != own.shape:
                raise ValueError(f"{name} has shape {array.shape}, wanted {own.shape}")
            if not (np.isnan(array) | ((array > 0) & (array <= 1))).all():
                raise ValueError(f"{name} holds values no confidence can have")
            found[name] = array
        self._rows, self._decks = found["recent"], found["decks"]
        self._step = np.where(np.isnan(self._rows[:, 0]), -np.inf, 0.0)
        self._card_step = np.where(np.isnan(self._decks[:, :, 0]), -np.inf, 0.0)
