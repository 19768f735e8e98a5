"""The story of a swap: what the models learnt since the swap before, in words beside the controller's own.

"K 5→3 at batch 48: drift, +3.1% expected; boundary at 256 tokens moved to 192"
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from adaptive_spec.control.counters import Event
from adaptive_spec.control.snapshot import Snapshot

RECENT_S = 5.0
"""Time the acceptance of the moment is taken over."""
SETTLED_S = 10.0
"""A swap sooner than this after another is explained like it: both answer the same change."""
MIN_VERIFIED = 100
"""First draft tokens that must have been verified before their acceptance is spoken of."""
MIN_CHANGE = 0.05
MOST_WORDS = 2


class _World(NamedTuple):
    """What a swap rests on: tile boundaries, tokens the batch can reach, acceptance of the first draft token lately."""

    boundaries: frozenset[int]
    reach: range
    acceptance: float | None


class Story:
    """Feed it every snapshot; `tell` returns its events, swaps with their reason. Time is the snapshots' own."""

    def __init__(self) -> None:
        self._because: dict[Event, str] = {}
        self._tallies: deque[tuple[float, int, int]] = deque()
        self._worlds: deque[tuple[float, _World]] = deque(maxlen=16)

    def tell(self, snapshot: Snapshot) -> tuple[Event, ...]:
        """Return the snapshot's events; a swap seen for the first time gets what changed since the one before."""
        self._count(snapshot)
        told_s = self._worlds[-1][0] if self._worlds else float("-inf")
        swaps = [e for e in snapshot.events if e.kind == "swap" and e.time_s > told_s]
        if swaps:
            newest, world = swaps[-1], self._world(snapshot)
            settled = [before for at_s, before in self._worlds if at_s <= newest.time_s - SETTLED_S]
            before = settled[-1] if settled else self._worlds[0][1] if self._worlds else world
            if words := _changes(before, world):
                self._because[newest] = words
            self._worlds.append((newest.time_s, world))
        self._because = {event: words for event, words in self._because.items() if event in snapshot.events}
        return tuple(
            replace(event, text=f"{event.text}; {self._because[event]}") if event in self._because else event
            for event in snapshot.events
        )

    def _count(self, s: Snapshot) -> None:
        if s.verified_tokens:
            self._tallies.append((s.time_s, s.verified_tokens[0], s.accepted_tokens[0]))
        while len(self._tallies) > 2 and s.time_s - self._tallies[1][0] >= RECENT_S:
            self._tallies.popleft()

    def _world(self, s: Snapshot) -> _World:
        reach = range(max(s.batch_size, 1), max(s.batch_size, 1) * (len(s.draft_tokens) + 1) + 1)
        acceptance = None
        if self._tallies:
            (_, verified_0, accepted_0), (_, verified_1, accepted_1) = self._tallies[0], self._tallies[-1]
            if verified_1 - verified_0 >= MIN_VERIFIED:
                acceptance = (accepted_1 - accepted_0) / (verified_1 - verified_0)
        return _World(frozenset(b.tokens for b in s.boundaries), reach, acceptance)


def _changes(before: _World, now: _World) -> str:
    moves = _moves(sorted(before.boundaries - now.boundaries), sorted(now.boundaries - before.boundaries))
    words = [said for tokens, said in moves if tokens & set(now.reach)][:MOST_WORDS]
    if before.acceptance is not None and now.acceptance is not None and abs(now.acceptance - before.acceptance) >= MIN_CHANGE:
        words.append(f"first draft token accepted {before.acceptance:.0%} → {now.acceptance:.0%}")
    return ", ".join(words)


def _moves(gone: list[int], come: list[int]) -> Iterable[tuple[set[int], str]]:
    """Pair what has gone with the nearest that has come, within a factor of two; yields the token counts and the words."""
    for old in list(gone):
        near = min(come, key=lambda new: abs(new - old), default=0)
        if near and old / 2 <= near <= 2 * old:
            come.remove(near)
            gone.remove(old)
            yield {old, near}, f"boundary at {old} tokens moved to {near}"
    yield from (({old}, f"boundary at {old} tokens is gone") for old in gone)
    yield from (({new}, f"new boundary at {new} tokens") for new in come)
