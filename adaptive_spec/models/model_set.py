"""All models of one engine: they learn from each step and compare it with the forecast.

`ModelSet` decides nothing and counts nothing. What it finds comes back as values (`Findings`, `StepComparison`), which the
controller counts and acts on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from adaptive_spec.config.settings import ControllerSettings
from adaptive_spec.domain.allowed import verified_rails
from adaptive_spec.domain.arrays import Floats
from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.domain.policy import Granularity, Trial
from adaptive_spec.domain.step_record import UNKNOWN_CONFIDENCE, StepFlag, StepRecord
from adaptive_spec.models.acceptance.online import AcceptanceModel, StepScore
from adaptive_spec.models.drift import DriftDetector, TrafficDetector
from adaptive_spec.models.goodput import MIN_TALLY, Forecast, ForecastInputs, forecast
from adaptive_spec.models.latency.measured_counts import MeasuredCounts
from adaptive_spec.models.latency.overhead import OverheadModel
from adaptive_spec.models.latency.padding import Padding
from adaptive_spec.models.latency.plan_cost import PlanCostModel
from adaptive_spec.models.latency.robust_mean import CLIP_SIGMAS
from adaptive_spec.models.latency.speed_factor import SpeedFactor
from adaptive_spec.models.latency.staircase import LatencyFit, LatencyModel
from adaptive_spec.models.latency.switch_cost import SwitchCost
from adaptive_spec.models.token_times import TokenTimes

LEARN_AT_TOKENS = 8192
"""Queued draft tokens at which the acceptance model learns without waiting for the refit."""
DRIFT_DISCOUNT = 0.25
"""Weight of the calibration's past after a drift."""
TALLY_DECAY = 0.998
"""Weight of a step in the tallies of batch sizes one step later: they remember about 500 steps."""
WITH_GAPS = ("recent", "decks")
"""Arrays of a profile in which NaN stands for a position that was not drafted or not verified."""
MATERIAL_BIAS = 0.05
"""Mean relative error of predicted latency below which an alarm of the drift detector is ignored."""

REFITTED = ("acceptance", "latency", "policy")
"""Parts of a refit that a stopwatch is opened around."""

Stopwatch = Callable[[str], AbstractContextManager[object]]
"""Returns a context that times the part it is given the name of. The clock is the caller's."""


class DriftNotice(NamedTuple):
    """A drift. signal: "latency" or "calibration". text: what happened, for the event."""

    signal: str
    text: str


@dataclass(frozen=True)
class Findings:
    """What the models found while they learnt. drifts: changes noticed. scores: acceptance of each step learnt, in order."""

    drifts: tuple[DriftNotice, ...] = ()
    scores: tuple[StepScore, ...] = ()

    def __add__(self, other: Findings) -> Findings:
        return Findings(self.drifts + other.drifts, self.scores + other.scores)


@dataclass(frozen=True)
class StepComparison:
    """An ordinary step (no trial, not disturbed) as the latest forecast predicted it.

    goodput, launch_goodput: tokens/s of the step's own K and of the launch K, 0 where that K is no candidate. predicted_s:
    seconds of the step; None where its token count is beyond the forecast.
    """

    goodput: float
    launch_goodput: float
    predicted_s: float | None


@dataclass(frozen=True)
class Traffic:
    """Traffic lately. batch_size, context bucket: of the last step (0 before the first). batches: tally [max_batch + 1].

    crossings: tally [max_batch + 1] of consecutive steps of which one has at most b requests and the other more.
    """

    batch_size: int
    context: int
    batches: Floats
    crossings: Floats


class ModelSet:
    """Models and drift detectors of one engine.

    forecast: goodput of every plan as of the last `fit`, None before the first. steps: decode steps observed since the models
    began or were restored. batch_size, context: of the last step. batches: forgetting tally of batch sizes [max_batch + 1].
    crossings: see `Traffic`. switch_cost: what a change of K costs.
    """

    def __init__(self, settings: ControllerSettings, info: EngineInfo) -> None:
        self.info = info
        memory = settings.latency.memory_samples
        self.speed_factor = SpeedFactor()
        """Of verify latency, and the base of those of the draft stages."""
        self.verify = LatencyModel(memory, settings.latency.jump_threshold, self.speed_factor)
        self.stages = {
            name: PlanCostModel(memory, info.max_batch, SpeedFactor(self.speed_factor)) for name in ("draft", "draft_extend")
        }
        self.overhead = OverheadModel(info.max_k, info.max_batch)
        # An engine without speculation has no position to learn; the model has one all the same, and no label for it.
        self.acceptance = AcceptanceModel(max(info.max_k, 1), settings.acceptance.memory_steps)
        self.padding = Padding(info.granularity)
        target_ms = settings.policy.slo_tpot_ms
        self.token_times = None if target_ms is None else TokenTimes(info.max_k, target_ms * 1e-3)
        """Of single requests; None without a target for them."""
        self.steps = 0
        self.forecast: Forecast | None = None
        self.batch_size = 0
        self.context = 0
        self.kv_per_request = 512.0
        self.batches = np.zeros(info.max_batch + 1)
        self.crossings = np.zeros(info.max_batch + 1)
        self.switch_cost = SwitchCost(info.granularity, self.speed_factor)
        self._allowed = info.allowed_mask()
        self._verified = verified_rails(info.candidates, settings.policy.k_min, settings.policy.k_max)
        self._latency_drift = DriftDetector()
        self._calibration_drift = DriftDetector()
        self._traffic_drift = TrafficDetector()
        self._unscored_traffic_drift = TrafficDetector()
        """The same by acceptance, for requests whose confidences are unknown."""
        self._latency_bias = 0.0
        self._forecast_speed_factor = 0.0

    def observe(self, record: StepRecord) -> Findings:
        """Learn one step."""
        self.steps += 1
        self.padding.observe(record)
        self.crossings *= TALLY_DECAY
        if self.batch_size not in (0, record.batch_size):
            low, high = sorted((self.batch_size, record.batch_size))
            self.crossings[low:high] += 1.0
        self.batch_size = record.batch_size
        self.kv_per_request += 0.02 * (record.kv_tokens / record.batch_size - self.kv_per_request)
        self.batches *= TALLY_DECAY
        self.batches[min(record.batch_size, self.info.max_batch)] += 1.0
        disturbed = bool(record.flags & StepFlag.DISTURBED)
        if self.forecast is not None and not disturbed:
            self.context = self.forecast.context_of(record.batch_size, record.kv_tokens)
        switched = self.switch_cost.observe(record)
        findings = Findings() if disturbed else self._learn_times(record, switched)
        if not record.flags & StepFlag.CENSORED:
            self.acceptance.observe(record)
            if record.k and self.forecast is not None:
                findings += self._watch_traffic(record)
        if self.acceptance.waiting_tokens >= LEARN_AT_TOKENS:
            findings += self.learn_acceptance()
        return findings

    def learn_acceptance(self) -> Findings:
        """Learn the queued labels now."""
        scores = tuple(self.acceptance.learn())
        drifts = []
        for score in scores:
            if not score.tokens:
                continue
            bias = (score.accepted - score.expected) / math.sqrt(score.variance + 0.25)
            if self._calibration_drift.update(bias) and self.forecast is not None:
                self.acceptance.discount_past(DRIFT_DISCOUNT)
                drifts.append(DriftNotice("calibration", "acceptance differs from the calibration"))
        return Findings(tuple(drifts), scores)

    def fit(self, stopwatch: Stopwatch = nullcontext) -> Findings:
        """Fit every model to what was learnt and forecast anew. stopwatch: opened around each part, with its name."""
        with stopwatch("acceptance"):
            findings = self.learn_acceptance()
            self.acceptance.refit()
        with stopwatch("latency"):
            self.verify.refit()
            for stage in self.stages.values():
                stage.refit()
            self.overhead.refit()
            self.switch_cost.refit()
        with stopwatch("policy"):
            self.forecast = forecast(self._forecast_inputs(), seed=0)
            self._forecast_speed_factor = self.speed_factor.value
        return findings

    def _forecast_inputs(self) -> ForecastInputs:
        info = self.info
        return ForecastInputs(
            verify=self.verify,
            stages={**self.stages, "overhead": self.overhead},
            acceptance=self.acceptance,
            padding=self.padding,
            granularity=info.granularity,
            candidates=info.candidates,
            allowed=self._allowed,
            max_batch=info.max_batch,
            kv_per_request=self.kv_per_request,
            batches=self.batches,
            switch_s=self.switch_cost.seconds,
            slowest_share=None if self.token_times is None else self.token_times.slowest_share(),
            verified=self._verified,
        )

    def compare(self, record: StepRecord) -> StepComparison | None:
        """Compare an ordinary step with the forecast; None for a trial, a disturbed step, or before the first forecast."""
        forecast_ = self.forecast
        if forecast_ is None or record.flags & (StepFlag.DISTURBED | StepFlag.TRIAL):
            return None
        row = forecast_.row(record.batch_size)
        plans = forecast_.goodput[row, self.context]
        verify_s = self._expected_verify_s(record)
        predicted_s = None if verify_s is None else float(forecast_.fixed_s[record.k, row]) + verify_s
        return StepComparison(float(plans[record.k]), float(plans[self.info.launch_k]), predicted_s)

    def trial_loss_s(self, record: StepRecord) -> float:
        """Seconds a trial step lost against the best plan, negative when it gave more goodput; 0 for other steps and unknown."""
        forecast_ = self.forecast
        if forecast_ is None or record.flags & StepFlag.DISTURBED or not record.flags & StepFlag.TRIAL:
            return 0.0
        best = float(forecast_.goodput[forecast_.row(record.batch_size), self.context].max())
        return record.step_s - record.output_tokens / best if best > 0.0 else 0.0

    def best_step_s(self) -> float:
        """Expected seconds of a step with the plan of most goodput at the present batch size and context; 0 while unknown."""
        forecast_ = self.forecast
        if forecast_ is None:
            return 0.0
        goodput = forecast_.goodput[forecast_.row(self.batch_size), self.context]
        k = int(goodput.argmax())
        output = self.batch_size * float(forecast_.tokens_per_request[forecast_.row(self.batch_size), self.context, k])
        return output / float(goodput[k]) if goodput[k] > 0.0 else 0.0

    def expected_trial_loss_s(self, trial: Trial) -> float:
        """Seconds that one step of a trial is expected to lose against the best plan, >= 0; 0 while that is unknown.

        Seconds of a token count that was not measured are those of the fit, which continues beyond what was measured.
        """
        forecast_, batch_size = self.forecast, trial.batch_size or self.batch_size
        if forecast_ is None or batch_size == 0:
            return 0.0
        row, k = forecast_.row(batch_size), trial.k
        best = float(forecast_.goodput[row, self.context].max())
        output = batch_size * float(forecast_.tokens_per_request[row, self.context, k])
        tokens = int(forecast_.verify_tokens[row, k])
        if trial.num_tokens:
            tokens = trial.num_tokens
            by_slots = forecast_.expected_tokens.get(batch_size)
            if by_slots is not None:
                output = float(by_slots[min(max(tokens - batch_size, 0), len(by_slots) - 1)])
        verify_s = float(forecast_.verify_s[min(tokens, len(forecast_.verify_s) - 1)])
        context_s = forecast_.context_s_per_token * self.kv_per_request * batch_size
        return max(float(forecast_.fixed_s[k, row]) + verify_s + context_s - output / best, 0.0) if best > 0.0 else 0.0

    @property
    def traffic(self) -> Traffic:
        return Traffic(self.batch_size, self.context, self.batches, self.crossings)

    @property
    def staircase(self) -> LatencyFit | None:
        """Verify latency as of the last `fit`, None before anything was measured."""
        return self.verify.fit

    def measured_counts(self) -> MeasuredCounts:
        """What is measured of verify latency so far, by token count."""
        return self.verify.measured(self.padding.padded_to(self.info.candidates))

    @property
    def largest_batch(self) -> int:
        """Largest batch size seen lately, 0 before the first step."""
        seen = np.flatnonzero(self.batches > MIN_TALLY)
        return int(seen[-1]) if len(seen) else 0

    def _expected_verify_s(self, record: StepRecord) -> float | None:
        """Seconds of verification as of the last forecast, context included; None where it forecast none."""
        forecast_ = self.forecast
        # At request granularity the forecast's table has the padding in it.
        at = record.num_tokens if self.info.granularity is Granularity.REQUEST else record.padded_tokens
        if forecast_ is None or at >= len(forecast_.verify_s):
            return None
        return float(forecast_.verify_s[at]) + forecast_.context_s_per_token * record.kv_tokens

    def _watch_traffic(self, record: StepRecord) -> Findings:
        """Notice a change of traffic by the draft's confidence in its first tokens, before enough labels show it; where that
        is unknown by the share of first tokens accepted.
        """
        first, requests = record.confidences[:, 0], record.request_ids.tolist()
        known = first > UNKNOWN_CONFIDENCE
        texts = []
        change = self._traffic_drift.update(np.where(known, first, np.nan).tolist(), requests)
        if change is not None:
            self.acceptance.recent.drop_old_donors(self.acceptance.steps)
            texts.append(f"the draft's mean confidence moved from {change.before:.0%} to {change.after:.0%}")
        if not known.all():
            accepted = np.where(known | (record.verify_len == 0), np.nan, record.accept_len > 0)
            change = self._unscored_traffic_drift.update(accepted.tolist(), requests)
            if change is not None:
                self.acceptance.discount_past(DRIFT_DISCOUNT)
                texts.append(f"acceptance of first draft tokens moved from {change.before:.0%} to {change.after:.0%}")
        return Findings(tuple(DriftNotice("calibration", text) for text in texts))

    def _learn_times(self, record: StepRecord, switched: bool) -> Findings:
        """switched: the step is the first one after a change of K, whose cost is no part of the plan's."""
        step = self.steps
        shift = self.verify.observe(record.padded_tokens, record.kv_tokens, record.verify_s, step)
        overhead_s = record.step_s - record.draft_s - record.verify_s - record.draft_extend_s
        if switched:
            overhead_s -= self.switch_cost.seconds
        self.overhead.observe(record.k, record.batch_size, overhead_s)
        for name, seconds in (("draft", record.draft_s), ("draft_extend", record.draft_extend_s)):
            self.stages[name].observe(record.k, record.batch_size, seconds, step)
        expected = self._expected_verify_s(record)
        if expected is not None:
            # At the present speed factor: a lasting change of it is reported by its own signal.
            residual = math.log(record.verify_s / expected) - (self.speed_factor.value - self._forecast_speed_factor)
            limit = CLIP_SIGMAS * self.verify.noise
            self._latency_bias += 0.05 * (min(max(residual, -limit), limit) - self._latency_bias)
            alarm = self._latency_drift.update(residual / self.verify.noise) and (
                abs(self._latency_bias) >= max(MATERIAL_BIAS, self.speed_factor.jump_limit(self.verify.noise))
            )
            if shift is not None:
                self._latency_drift.restart()
            if shift is not None or alarm:
                ratio = shift.ratio if shift is not None else math.exp(self._latency_bias)
                return Findings((DriftNotice("latency", f"verify latency moved by {ratio - 1.0:+.0%}"),))
        return Findings()

    def latency_state(self) -> dict[str, NDArray[Any]]:
        """Arrays of `latency_model.npz`: the fit for readers, the means to continue from."""
        state: dict[str, NDArray[Any]] = {f"cells.{k}": v for k, v in self.verify.state().items()}
        for name, stage in self.stages.items():
            state |= {f"{name}.{k}": v for k, v in stage.state().items()}
        state["overhead"] = self.overhead.state()
        state["padding"] = self.padding.state()
        state["switch_cost"] = self.switch_cost.state()
        return state | (self.verify.fit.state() if self.verify.fit is not None else {})

    def calibration_state(self) -> dict[str, NDArray[Any]]:
        """Arrays of `calibration.npz`."""
        return dict(self.acceptance.state())

    def take(self, latency: Mapping[str, NDArray[Any]], calibration: Mapping[str, NDArray[Any]]) -> None:
        """Take over the arrays of a profile. Raises ValueError when they do not fit this engine; use a fresh ModelSet then."""
        for name, array in (*latency.items(), *calibration.items()):
            if array.dtype.kind not in "biuf" or not (np.isfinite(array) | (np.isnan(array) & (name in WITH_GAPS))).all():
                raise ValueError(f"profile: {name}: must be finite real numbers")
        try:
            self.padding.restore(latency["padding"])
            self.verify.restore({"rows": latency["cells.rows"], "noise": latency["cells.noise"]})
            for name, stage in self.stages.items():
                parts = {part: latency[f"{name}.{part}"] for part in ("rows", "noise")}
                if f"{name}.plans" in latency:  # absent from profiles of older versions
                    parts["plans"] = latency[f"{name}.plans"]
                stage.restore(parts)
            if "overhead" in latency:  # absent from profiles of older versions; learnt anew in a few steps
                self.overhead.restore(latency["overhead"])
            if "switch_cost" in latency:  # absent from profiles of older versions
                self.switch_cost.restore(latency["switch_cost"])
            self.acceptance.restore(calibration)
        except KeyError as error:
            raise ValueError(f"profile lacks {error.args[0]}") from error
        self.steps = 0  # the ages of restored means count back from here
