"""Why a batch size has its K: the numbers of the last decision, plan by plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adaptive_spec.config.settings import PolicySettings
from adaptive_spec.domain.arrays import Floats
from adaptive_spec.models.goodput import Forecast

Table = NDArray[np.uint8]


@dataclass(frozen=True)
class PlanReasons:
    """One K at one batch size, as the decision saw it.

    tokens: expected output of a step, all requests together. stage_s: expected seconds by stage: those of the plan-cost models,
    verify, and context. goodput: tokens/s; goodput_error: its relative standard error. switches_tokens_per_s: goodput that the
    changes of K it causes cost. gain: relative goodput over `before`, after those changes, None where the K before cannot run.
    hurdle: the gain it needs. verdict: what decided, in words.
    """

    k: int
    tokens: float
    stage_s: Mapping[str, float]
    step_s: float
    goodput: float
    goodput_error: float
    switches_tokens_per_s: float
    gain: float | None
    hurdle: float
    verdict: str


@dataclass(frozen=True)
class Explanation:
    """The decision at one batch size. before, wanted: K before it, and the K it came to; time_s: when.

    kv_per_request: KV tokens of a request that the context bucket stands for. switch_s: seconds that a change of K costs, 0 while
    unknown. plans: every allowed K, ascending.
    """

    batch_size: int
    time_s: float
    before: int
    wanted: int
    kv_per_request: float
    switch_s: float
    plans: tuple[PlanReasons, ...]


@dataclass(frozen=True)
class Considered:
    """What one proposal was made of. Arrays are not changed afterwards, so any thread may read it.

    goodput: within k_min..k_max. worth: the same less the changes of K. hurdle: see `hurdles`. banned: rolled back lately, or
    None. before, wanted: K tables [max_batch + 1, contexts]. All others [max_batch + 1, contexts, K + 1].
    """

    time_s: float
    rails: PolicySettings
    forecast: Forecast
    goodput: Floats
    worth: Floats
    hurdle: Floats
    banned: NDArray[np.bool_] | None
    before: Table
    wanted: Table

    @property
    def max_batch(self) -> int:
        return len(self.wanted) - 1

    def explain(self, batch_size: int, context: int) -> Explanation:
        """Explain the K of a batch size in 1..max_batch. context: context bucket, cut to those of the forecast."""
        forecast, b = self.forecast, batch_size
        c = min(context, self.goodput.shape[1] - 1)
        before, wanted = int(self.before[b, c]), int(self.wanted[b, c])
        plans = [self._plan(b, c, k, before, wanted) for k in range(self.goodput.shape[2]) if forecast.goodput[b, c, k] > 0.0]
        return Explanation(b, self.time_s, before, wanted, forecast.kv_per_request[c], forecast.switch_s, tuple(plans))

    def _plan(self, b: int, c: int, k: int, before: int, wanted: int) -> PlanReasons:
        forecast = self.forecast
        verify = int(forecast.verify_tokens[b, k])
        stages = {name: float(seconds[k, b]) for name, seconds in forecast.stage_s.items()}
        stages["verify"] = float(forecast.verify_s[verify])
        stages["context"] = forecast.context_s_per_token * forecast.kv_per_request[c] * b
        goodput, worth, now = (
            float(array[b, c, i]) for array, i in ((forecast.goodput, k), (self.worth, k), (self.worth, before))
        )
        tokens = b * float(forecast.tokens_per_request[b, c, k])
        gain = worth / now - 1.0 if now > 0.0 else None
        return PlanReasons(
            k, tokens, stages, tokens / goodput, goodput, float(forecast.uncertainty[b, c, k]),
            max(float(self.goodput[b, c, k]) - worth, 0.0), gain, float(self.hurdle[b, c, k]),
            self._verdict(b, c, k, before, wanted, gain),
        )  # fmt: skip

    def _verdict(self, b: int, c: int, k: int, before: int, wanted: int, gain: float | None) -> str:
        hurdle = float(self.hurdle[b, c, k])
        if self.goodput[b, c, k] <= 0.0:
            if self.rails.k_min <= k <= self.rails.k_max and self.rails.slo_tpot_ms is not None:
                return f"{1e3 * float(self.forecast.seconds_per_token()[b, c, k]):.3g} ms per token, above slo_tpot_ms"
            return f"outside k_min..k_max = {self.rails.k_min}..{self.rails.k_max}"
        if k == wanted:
            return "kept: no other K exceeds its hurdle" if k == before else "chosen: exceeds its hurdle by most"
        if self.banned is not None and self.banned[b, c, k]:
            return "rolled back lately"
        if gain is None:
            return "less goodput than the chosen K"
        if k == before:
            return "left: the chosen K gains more than its hurdle"
        if gain > hurdle:
            return "exceeds its hurdle, but by less than the chosen K"
        return "no gain" if gain <= 0.0 else f"gain below its hurdle of {hurdle:.1%}"
