"""Running requests and spells of slowness over time: the same for every policy, each from a random stream of its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from adaptive_spec.engines.simulated.scenario import Noise, TimelineEntry

TICK_S = 0.1


class LoadPath:
    """Running requests over time. Every entry of the timeline starts at (lo + hi) // 2 and from there, every 0.1 s, goes
    -1, 0 or +1 with probabilities 0.3, 0.4, 0.3, kept within the range.
    """

    def __init__(self, timeline: Sequence[TimelineEntry], duration_s: float, rng: np.random.Generator) -> None:
        self._starts = [entry.at_s for entry in timeline]
        ends = [*self._starts[1:], max(duration_s, self._starts[-1])]
        self._counts = [self._walk(entry.running, end_s - entry.at_s, rng) for entry, end_s in zip(timeline, ends, strict=True)]
        self._entry = 0

    @staticmethod
    def _walk(running: tuple[int, int], seconds: float, rng: np.random.Generator) -> list[int]:
        lo, hi = running
        count = (lo + hi) // 2
        if lo == hi:
            return [count]
        counts = [count]
        for move in rng.choice((-1, 0, 1), size=int(seconds / TICK_S) + 1, p=(0.3, 0.4, 0.3)).tolist():
            count = min(max(count + move, lo), hi)
            counts.append(count)
        return counts

    def at(self, time_s: float) -> int:
        """Requests running at `time_s`; times may not go back."""
        while self._entry + 1 < len(self._starts) and time_s >= self._starts[self._entry + 1]:
            self._entry += 1
        counts = self._counts[self._entry]
        if len(counts) == 1:
            return counts[0]
        return counts[min(int((time_s - self._starts[self._entry]) / TICK_S + 1e-9), len(counts) - 1)]


class SlowSpells:
    """Spells in which every step takes `Noise.spell_factor` times as long; see `Noise`."""

    def __init__(self, noise: Noise, rng: np.random.Generator) -> None:
        self._noise, self._rng = noise, rng
        self._slow = True
        self._until_s = 0.0

    def factor(self, time_s: float) -> float:
        """Factor of a step that begins at `time_s`; times may not go back."""
        noise = self._noise
        if noise.spell_gap_s <= 0.0:
            return 1.0
        while time_s >= self._until_s:
            self._slow = not self._slow
            length_s = self._rng.uniform(0.5, 1.5) * noise.spell_s if self._slow else self._rng.exponential(noise.spell_gap_s)
            self._until_s += max(float(length_s), 1e-3)
        return noise.spell_factor if self._slow else 1.0
