"""Why K changed: adds to each swap event what the models learnt since the swap before it.

"K 5→3 at batch 48: drift, +3.1% expected; boundary at 256 tokens moved to 192". The part before the semicolon is the
controller's, the part after it is added here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from adaptive_spec.control.counters import Event
from adaptive_spec.control.snapshot import Snapshot

RECENT_S = 5.0
"""Acceptance "now" is the mean of this many seconds."""
SETTLED_S = 10.0
"""A swap is compared with the models at least this long before it, so that two swaps in a row that answer the same change
get the same reason."""
MIN_VERIFIED = 100
"""First draft tokens that must have been verified before their acceptance is mentioned: its standard error is then below 0.05."""
MIN_CHANGE = 0.05
"""Smallest change of acceptance that is mentioned."""
MAX_BOUNDARIES = 2
"""Most boundary changes mentioned for one swap."""


class _ModelState(NamedTuple):
    """What is compared between two swaps.

    boundaries: tile boundaries in tokens. reach: token counts the current batch size can verify. acceptance: recent acceptance
    of the first draft token, 0..1, None with too few of them.
    """

    boundaries: frozenset[int]
    reach: range
    acceptance: float | None


class SwapReasons:
    """Pass every snapshot to `explain`; it returns the events with reasons added to the swaps. Time is the snapshots' own."""

    def __init__(self) -> None:
        self._reasons: dict[Event, str] = {}
        self._counts: deque[tuple[float, int, int]] = deque()
        """(time_s, verified, accepted) of the first draft token, over the last RECENT_S."""
        self._states: deque[tuple[float, _ModelState]] = deque(maxlen=16)
        """The models at each swap seen so far, by its time."""

    def explain(self, snapshot: Snapshot) -> tuple[Event, ...]:
        """Return the snapshot's events; a swap seen for the first time gets what changed since the one before."""
        self._count(snapshot)
        last_swap_s = self._states[-1][0] if self._states else float("-inf")
        swaps = [e for e in snapshot.events if e.kind == "swap" and e.time_s > last_swap_s]
        if swaps:
            newest, now = swaps[-1], self._state(snapshot)
            settled = [state for at_s, state in self._states if at_s <= newest.time_s - SETTLED_S]
            before = settled[-1] if settled else self._states[0][1] if self._states else now
            if reason := _changes(before, now):
                self._reasons[newest] = reason
            self._states.append((newest.time_s, now))
        self._reasons = {event: reason for event, reason in self._reasons.items() if event in snapshot.events}
        return tuple(
            replace(event, text=f"{event.text}; {self._reasons[event]}") if event in self._reasons else event
            for event in snapshot.events
        )

    def _count(self, s: Snapshot) -> None:
        if s.verified_tokens:
            self._counts.append((s.time_s, s.verified_tokens[0], s.accepted_tokens[0]))
        while len(self._counts) > 2 and s.time_s - self._counts[1][0] >= RECENT_S:
            self._counts.popleft()

    def _state(self, s: Snapshot) -> _ModelState:
        reach = range(max(s.batch_size, 1), max(s.batch_size, 1) * (len(s.draft_tokens) + 1) + 1)
        acceptance = None
        if self._counts:
            (_, verified_0, accepted_0), (_, verified_1, accepted_1) = self._counts[0], self._counts[-1]
            if verified_1 - verified_0 >= MIN_VERIFIED:
                acceptance = (accepted_1 - accepted_0) / (verified_1 - verified_0)
        return _ModelState(frozenset(b.tokens for b in s.boundaries), reach, acceptance)


def _changes(before: _ModelState, now: _ModelState) -> str:
    moves = _boundary_changes(sorted(before.boundaries - now.boundaries), sorted(now.boundaries - before.boundaries))
    changes = [text for tokens, text in moves if tokens & set(now.reach)][:MAX_BOUNDARIES]
    if before.acceptance is not None and now.acceptance is not None and abs(now.acceptance - before.acceptance) >= MIN_CHANGE:
        changes.append(f"first draft token accepted {before.acceptance:.0%} → {now.acceptance:.0%}")
    return ", ".join(changes)


def _boundary_changes(removed: list[int], added: list[int]) -> Iterable[tuple[set[int], str]]:
    """Pair each removed boundary with the nearest added one within a factor of two; yields token counts and description."""
    for old in list(removed):
        nearest = min(added, key=lambda new: abs(new - old), default=0)
        if nearest and old / 2 <= nearest <= 2 * old:
            added.remove(nearest)
            removed.remove(old)
            yield {old, nearest}, f"boundary at {old} tokens moved to {nearest}"
    yield from (({old}, f"boundary at {old} tokens is gone") for old in removed)
    yield from (({new}, f"new boundary at {new} tokens") for new in added)
