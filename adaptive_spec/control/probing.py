"""Probing: which plans are worth measuring, and what may be spent on it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from adaptive_spec.domain.arrays import Floats
from adaptive_spec.domain.policy import Granularity, Trial
from adaptive_spec.models.goodput import Forecast

BELIEVED = 0.06
"""Relative uncertainty above which a plan is measured before it is believed."""
OPTIMISM = 3.0
"""Standard errors by which a plan may be better than believed when it is chosen for a probe."""


class ProbeCandidate(NamedTuple):
    """A plan worth measuring. hope: its goodput over the present plan's if it is as good as it may be, > 1. loss: expected
    relative loss of a step, 0..1."""

    hope: float
    loss: float
    trial: Trial


@dataclass
class ProbeBudget:
    """Time that may be lost to measuring plans that are not the best: a share of decode time, and a grant after drift.

    share: 0..1. Unspent budget is kept for `MEMORY_STEPS`, no longer: a quiet week must not pay for a wild hour.
    """

    share: float
    credit_s: float = 0.0
    step_s: float = 0.0
    spent_s: defaultdict[tuple[int, int, bool], float] = field(default_factory=lambda: defaultdict(float))
    """Lost on each plan lately, by (octave of the batch, K, tokens given)."""

    MEMORY_STEPS = 1000
    FORGET = 0.98
    """What is remembered of the time spent on a plan, from one choice to the next."""
    LEAST_LOSS = 0.02
    """A step of a trial costs this much of itself at least: expected losses are not that sure."""
    AT_ONCE = 3
    """Plans probed between two decisions."""

    def earn(self, step_s: float) -> None:
        """Count one step's seconds."""
        self.step_s += 0.02 * (step_s - self.step_s) if self.step_s > 0.0 else step_s
        self._add(self.share * step_s)

    def grant(self, steps: int) -> None:
        """Allow some more after a drift: so many steps' worth, if probing is allowed at all. What was learnt before is old."""
        self.spent_s.clear()
        if self.share > 0.0:
            self._add(steps * self.step_s)

    def _add(self, seconds: float) -> None:
        self.credit_s = min(self.credit_s + seconds, self._most_s)

    @property
    def _most_s(self) -> float:
        return self.share * self.MEMORY_STEPS * self.step_s

    def spend(self, lost_s: float) -> None:
        """Count what a trial step's tokens fell short of the best plan's, in seconds; less than 0 for a lucky one."""
        self._add(-lost_s)

    def choose(self, promises: Sequence[ProbeCandidate]) -> tuple[Trial, ...]:
        """Trials to run now: most hope first for what they cost and have cost lately.

        A dear plan is saved for, lest cheap ones that stay doubtful however often they are tried keep it waiting for ever.
        """
        for plan in self.spent_s:
            self.spent_s[plan] *= self.FORGET
        ranked = sorted(promises, key=lambda p: (p.hope - 1.0) / (self._cost_s(p) + self.spent_s[_plan(p)]), reverse=True)
        left_s, trials = self.credit_s, []
        for promise in ranked[: self.AT_ONCE]:
            cost_s = self._cost_s(promise)
            if cost_s > self._most_s:
                continue
            if cost_s > left_s:
                break
            left_s -= cost_s
            self.spent_s[_plan(promise)] += cost_s
            trials.append(promise.trial)
        return tuple(trials)

    def _cost_s(self, promise: ProbeCandidate) -> float:
        return max(promise.loss, self.LEAST_LOSS) * promise.trial.steps * max(self.step_s, 1e-9)


def _plan(promise: ProbeCandidate) -> tuple[int, int, bool]:
    trial = promise.trial
    return trial.batch_size.bit_length(), trial.k, trial.num_tokens > 0


def probe_plans(
    forecast: Forecast, goodput: Floats, batch_size: int, context: int, k_now: int, granularity: Granularity, min_gain: float
) -> list[ProbeCandidate]:
    """Plans worth measuring at one batch size.

    A plan is promising when, taken `OPTIMISM` standard errors better than believed, it beats the present one by `min_gain`: what
    is spent on looking is bounded by the budget, so hope may be generous.
    """
    row = forecast.row(batch_size)
    now = goodput[row, context, k_now]
    if now <= 0.0:
        return []
    found: list[ProbeCandidate] = []
    doubt = forecast.uncertainty[row, context]
    runnable = np.flatnonzero(goodput[row, context] > 0.0).tolist()
    next_k = next((k for k in runnable if k > k_now), k_now)
    for k in runnable:
        value = goodput[row, context, k] / now
        if k_now == 0 and k > next_k and value <= 1.0:
            continue  # speculation is off: the smallest K tells, most cheaply, whether the draft has recovered
        if k != k_now and doubt[k] > BELIEVED / 3 and value * (1.0 + OPTIMISM * doubt[k]) > 1.0 + min_gain:
            found.append(ProbeCandidate(value * (1.0 + OPTIMISM * doubt[k]), max(0.0, 1.0 - value), Trial(batch_size, k, 0, 3)))
    if granularity is Granularity.REQUEST:
        found += _probe_tokens(forecast, row, batch_size, now, min_gain)
    return found


def _probe_tokens(forecast: Forecast, row: int, batch_size: int, now: float, min_gain: float) -> list[ProbeCandidate]:
    """The token count whose latency is so uncertain that verifying just it might be best (a "dead spot"), if there is one."""
    out = forecast.expected_tokens.get(batch_size)
    if out is None:
        return []
    max_k = len(forecast.fixed_s) - 1
    slots = np.arange(min(len(out), len(forecast.verify_s) - batch_size))
    # One position deeper than an even spread needs, so that the slots can go to the requests that deserve them.
    k = np.minimum(-(-slots // batch_size) + 1, max_k)
    seconds = forecast.fixed_s[k, row] + forecast.verify_s[batch_size + slots]
    error = forecast.verify_error_s[batch_size + slots]
    hopeful = out[slots] / np.maximum(seconds - OPTIMISM * error, 0.25 * seconds)
    hopeful[error < BELIEVED / 3 * seconds] = 0.0
    i = int(hopeful.argmax())
    if hopeful[i] <= now * (1.0 + min_gain):
        return []
    loss = max(0.0, 1.0 - float(out[i] / seconds[i]) / now)
    return [ProbeCandidate(float(hopeful[i] / now), loss, Trial(batch_size, int(k[i]), batch_size + i, 3))]
