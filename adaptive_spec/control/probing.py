"""Probing: which plans are worth measuring, and what may be spent on it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from adaptive_spec.domain.allowed import LARGEST_K
from adaptive_spec.domain.arrays import Floats
from adaptive_spec.domain.policy import Granularity, Trial
from adaptive_spec.models.goodput import Forecast

MIN_ERROR = 0.02
"""Relative standard error below which a plan is known well enough: it is not probed."""
OPTIMISM = 3.0
"""Standard errors added to a plan's goodput when it is chosen for a probe (an upper confidence bound)."""


class ProbeCandidate(NamedTuple):
    """A plan worth measuring.

    upper_gain: upper confidence bound of its goodput over the present plan's, > 1. loss: expected relative loss of a step, 0..1.
    """

    upper_gain: float
    loss: float
    trial: Trial


@dataclass
class ProbeBudget:
    """Time that may be lost to measuring plans that are not the best: a share of decode time.

    share: 0..1. At most the budget of `MEMORY_STEPS` steps is kept, so that a long quiet time does not pay for many probes later.
    A drift grants an advance on it, which is paid back out of the same share before anything is saved: however often drifts come,
    the share holds.
    """

    share: float
    credit_s: float = 0.0
    step_s: float = 0.0
    debt_s: float = 0.0
    spent_s: defaultdict[tuple[int, int, bool], float] = field(default_factory=lambda: defaultdict(float))
    """Budget spent on each plan lately, by (octave of the batch size, K, whether a token count was given)."""

    MEMORY_STEPS = 1000
    FORGET = 0.98
    """Decay of `spent_s` from one choice to the next."""
    MIN_LOSS = 0.02
    """Least relative loss a trial step is charged: expected losses are no more precise."""
    MAX_PLANS = 3
    """Plans probed between two decisions."""

    def earn(self, step_s: float, may_probe: bool = True) -> None:
        """Count one step's seconds. may_probe: False adds nothing, so that time in shadow or pinned mode is not saved up."""
        self.step_s += 0.02 * (step_s - self.step_s) if self.step_s > 0.0 else step_s
        if not may_probe:
            return
        earned_s = self.share * step_s
        paid_s = min(earned_s, self.debt_s)
        self.debt_s -= paid_s
        self._add(earned_s - paid_s)

    def grant(self, steps: int) -> None:
        """After a drift: advance so many steps' time less what is still owed, and forget what was spent on each plan."""
        self.spent_s.clear()
        if self.share > 0.0:
            advance_s = max(min(steps * self.step_s - self.debt_s, self._cap_s - self.credit_s), 0.0)
            self.credit_s += advance_s
            self.debt_s += advance_s

    def _add(self, seconds: float) -> None:
        self.credit_s = min(self.credit_s + seconds, self._cap_s)

    @property
    def _cap_s(self) -> float:
        return self.share * self.MEMORY_STEPS * self.step_s

    def spend(self, lost_s: float) -> None:
        """Count the seconds a trial step lost against the best plan; negative when it gave more than predicted for that plan."""
        self._add(-lost_s)

    def choose(self, candidates: Sequence[ProbeCandidate], switch_s: float = 0.0) -> tuple[Trial, ...]:
        """Trials to run now, ranked by possible gain per second that they cost and have cost lately.

        switch_s: seconds that a change of K costs; a trial changes K twice.
        If the top-ranked probe is too expensive now, accumulate budget instead of running cheaper ones.
        """
        cost_of = [(candidate, self._cost_s(candidate) + 2.0 * switch_s) for candidate in candidates]
        for plan in self.spent_s:
            self.spent_s[plan] *= self.FORGET
        ranked = sorted(cost_of, key=lambda p: (p[0].upper_gain - 1.0) / (p[1] + self.spent_s[_plan(p[0])]), reverse=True)
        left_s, trials = self.credit_s, []
        for candidate, cost_s in ranked[: self.MAX_PLANS]:
            if cost_s > self._cap_s:
                continue
            if cost_s > left_s:
                break
            left_s -= cost_s
            self.spent_s[_plan(candidate)] += cost_s
            trials.append(candidate.trial)
        return tuple(trials)

    def affords(self, loss: float, steps: int, switch_s: float) -> bool:
        """Whether so many steps with a relative loss of goodput, and the two changes of K around them, can be paid now."""
        return self.credit_s >= max(loss, self.MIN_LOSS) * steps * self.step_s + 2.0 * switch_s and self.share > 0.0

    def _cost_s(self, candidate: ProbeCandidate) -> float:
        return max(candidate.loss, self.MIN_LOSS) * candidate.trial.steps * max(self.step_s, 1e-9)


def _plan(candidate: ProbeCandidate) -> tuple[int, int, bool]:
    trial = candidate.trial
    return trial.batch_size.bit_length(), trial.k, trial.num_tokens > 0


def probe_plans(
    forecast: Forecast, goodput: Floats, batch_size: int, context: int, k_now: int, granularity: Granularity, min_gain: float,
    verified: tuple[int, int] = (0, LARGEST_K),
) -> list[ProbeCandidate]:  # fmt: skip
    """Plans worth measuring at one batch size. verified: see `verified_rails`.

    A plan is worth measuring when its goodput plus `OPTIMISM` standard errors exceeds the present plan's by `min_gain`. The bound
    is generous, because the budget limits what is spent.
    """
    row = forecast.row(batch_size)
    now = goodput[row, context, k_now]
    if now <= 0.0:
        return []
    found: list[ProbeCandidate] = []
    error = forecast.uncertainty[row, context]
    runnable = np.flatnonzero(goodput[row, context] > 0.0).tolist()
    next_k = next((k for k in runnable if k > k_now), k_now)
    for k in runnable:
        value = goodput[row, context, k] / now
        if k_now == 0 and k > next_k and value <= 1.0:
            continue  # speculation is off: the smallest K shows most cheaply whether the draft has recovered
        if k != k_now and error[k] > MIN_ERROR and value * (1.0 + OPTIMISM * error[k]) > 1.0 + min_gain:
            # What the plan would verify, where that differs by request: all that is drafted could be far dearer.
            tokens = int(forecast.verify_tokens[row, k]) if granularity is Granularity.REQUEST and k else 0
            trial = Trial(batch_size, k, tokens, 3)
            found.append(ProbeCandidate(value * (1.0 + OPTIMISM * error[k]), max(0.0, 1.0 - value), trial))
    if granularity is Granularity.REQUEST:
        found += _probe_tokens(forecast, goodput, row, batch_size, now, min_gain, verified)
    return found


def _probe_tokens(
    forecast: Forecast, goodput: Floats, row: int, batch_size: int, now: float, min_gain: float, verified: tuple[int, int]
) -> list[ProbeCandidate]:
    """The token count whose latency is so uncertain that verifying exactly it might be best; [] when there is none."""
    out = forecast.expected_tokens.get(batch_size)
    if out is None:
        return []
    runnable = np.flatnonzero(goodput[row].max(axis=0) > 0.0)
    least, most = batch_size * verified[0], batch_size * min(int(runnable[-1]), verified[1])
    slots = np.arange(least, min(len(out), len(forecast.verify_s) - batch_size, most + 1))
    if not len(slots):
        return []
    # One position deeper than an even spread needs, so that slots can go to the requests most likely to accept.
    k = runnable[np.minimum(np.searchsorted(runnable, -(-slots // batch_size) + 1), len(runnable) - 1)]
    seconds = forecast.fixed_s[k, row] + forecast.verify_s[batch_size + slots]
    error = forecast.verify_error_s[batch_size + slots]
    upper_goodput = out[slots] / np.maximum(seconds - OPTIMISM * error, 0.25 * seconds)
    upper_goodput[error < MIN_ERROR * seconds] = 0.0
    i = int(upper_goodput.argmax())
    if upper_goodput[i] <= now * (1.0 + min_gain):
        return []
    loss = max(0.0, 1.0 - float(out[slots[i]] / seconds[i]) / now)
    return [ProbeCandidate(float(upper_goodput[i] / now), loss, Trial(batch_size, int(k[i]), batch_size + int(slots[i]), 3))]
