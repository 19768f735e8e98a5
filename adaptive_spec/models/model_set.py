"""The models: all models of one engine, fed step by step, and what they say of each step.

It learns and predicts; it decides nothing. Changes it notices come back as `DriftNotice`, for the controller to act on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from adaptive_spec.config.settings import ControllerSettings
from adaptive_spec.control.counters import Counters
from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.domain.policy import Granularity
from adaptive_spec.domain.step_record import StepFlag, StepRecord
from adaptive_spec.models.acceptance.online import AcceptanceModel
from adaptive_spec.models.drift import DriftDetector, TrafficDetector
from adaptive_spec.models.goodput import Forecast, Models, forecast
from adaptive_spec.models.latency.padding import Padding
from adaptive_spec.models.latency.plan_cost import PlanCostModel
from adaptive_spec.models.latency.robust_mean import CLIP_SIGMAS
from adaptive_spec.models.latency.staircase import LatencyModel

LEARN_AT_TOKENS = 8192
"""Queued draft tokens at which the acceptance model learns without waiting for the refit."""
LOOSEN = 0.25
"""What the past of the calibration still weighs after a drift."""
MATERIAL_BIAS = 0.05
"""Mean relative error of predicted latency below which a detector's alarm is no news to anybody."""


Stopwatch = Callable[[str], AbstractContextManager[object]]
"""Makes a context that times what is named; the clock is the caller's."""


class DriftNotice(NamedTuple):
    """A drift: signal "latency" or "calibration", and what happened in words."""

    signal: str
    words: str


class ModelSet:
    """Models, counters and drift detectors of one engine.

    forecast: goodput of every plan as of the last `fit`, None before the first. batches: forgetting tally of batch sizes
    [max_batch + 1]. batch_size, context: of the last step.
    """

    def __init__(self, settings: ControllerSettings, info: EngineInfo) -> None:
        self.info = info
        memory = settings.latency.memory_samples
        self.verify = LatencyModel(memory, settings.latency.jump_threshold)
        self.speed_factor = self.verify.table.speed_factor
        self.stages = {
            name: PlanCostModel(memory, info.max_batch, self.speed_factor) for name in ("draft", "draft_extend", "overhead")
        }
        self.acceptance = AcceptanceModel(info.max_k, settings.acceptance.memory_steps)
        self.padding = Padding(info.granularity)
        self.counters = Counters(info.max_k)
        self.forecast: Forecast | None = None
        self.batch_size = 0
        self.context = 0
        self.kv_per_request = 512.0
        self.batches = np.zeros(info.max_batch + 1)
        self._latency_drift = DriftDetector()
        self._calibration_drift = DriftDetector()
        self._traffic_drift = TrafficDetector()
        self._latency_bias = 0.0
        self._forecast_speed_factor = 0.0

    def observe(self, record: StepRecord) -> list[DriftNotice]:
        """Learn one step."""
        self.counters.count(record)
        self.padding.observe(record)
        self.batch_size = record.batch_size
        self.kv_per_request += 0.02 * (record.kv_tokens / record.batch_size - self.kv_per_request)
        self.batches *= 0.998
        self.batches[min(record.batch_size, self.info.max_batch)] += 1.0
        noticed = [] if record.flags & StepFlag.DISTURBED else self._learn_times(record)
        if not record.flags & StepFlag.CENSORED:
            self.acceptance.observe(record)
            if record.k and self.forecast is not None:
                noticed += self._watch_traffic(record)
        if self.acceptance.waiting_tokens >= LEARN_AT_TOKENS:
            noticed += self.learn_acceptance()
        return noticed

    def learn_acceptance(self) -> list[DriftNotice]:
        """Learn the queued labels now."""
        noticed = []
        for score in self.acceptance.learn():
            if score.tokens == 0:
                continue
            self.counters.expected_accepted += score.expected
            bias = (score.accepted - score.expected) / math.sqrt(score.variance + 0.25)
            if self._calibration_drift.update(bias) and self.forecast is not None:
                self.acceptance.loosen(LOOSEN)
                noticed.append(DriftNotice("calibration", "acceptance differs from the calibration"))
        return noticed

    def fit(self, stopwatch: Stopwatch = nullcontext) -> list[DriftNotice]:
        """Fit every model to what was learnt and forecast anew. stopwatch: opened around each part, with its name."""
        with stopwatch("acceptance"):
            noticed = self.learn_acceptance()
            self.acceptance.refit()
        with stopwatch("latency"):
            self.verify.refit()
            for stage in self.stages.values():
                stage.refit()
        with stopwatch("policy"):
            self.forecast = forecast(self.models(), seed=0)
            self._forecast_speed_factor = self.speed_factor.value
        return noticed

    def models(self) -> Models:
        """The models a forecast is made of, as they stand."""
        info = self.info
        return Models(
            verify=self.verify,
            stages=tuple(self.stages.values()),
            acceptance=self.acceptance,
            padding=self.padding,
            granularity=info.granularity,
            candidates=info.candidates,
            max_batch=info.max_batch,
            kv_per_request=self.kv_per_request,
            batches=self.batches,
        )

    def judge(self, record: StepRecord) -> float:
        """Compare a step with what was predicted for its own plan, and note what the launch K would have given.

        Returns the seconds a trial lost against the best plan (negative for a lucky one), 0 for ordinary steps.
        """
        forecast_ = self.forecast
        if forecast_ is None or record.flags & StepFlag.DISTURBED:
            return 0.0
        self.context = forecast_.context_of(record.batch_size, record.kv_tokens)
        row, k = forecast_.row(record.batch_size), record.k
        plans = forecast_.goodput[row, self.context]
        if record.flags & StepFlag.TRIAL:
            best = float(plans.max())
            return record.step_s - record.output_tokens / best if best > 0.0 else 0.0
        self.counters.window.append((record.output_tokens, record.step_s, float(plans[k]), float(plans[self.info.launch_k])))
        verify_s = self._expected_verify_s(record)
        if verify_s is not None:
            self.counters.predicted_s += float(forecast_.fixed_s[k, row]) + verify_s
            self.counters.measured_s += record.step_s
        return 0.0

    @property
    def largest_batch(self) -> int:
        """Largest batch size seen lately, 0 before the first step."""
        seen = np.flatnonzero(self.batches > 0.0)
        return int(seen[-1]) if len(seen) else 0

    def _expected_verify_s(self, record: StepRecord) -> float | None:
        """Seconds of verification as of the last forecast, context included; None where it forecast none."""
        forecast_ = self.forecast
        # At request granularity the forecast's table has the padding in it.
        at = record.num_tokens if self.info.granularity is Granularity.REQUEST else record.padded_tokens
        if forecast_ is None or at >= len(forecast_.verify_s):
            return None
        return float(forecast_.verify_s[at]) + forecast_.context_s_per_token * record.kv_tokens

    def _watch_traffic(self, record: StepRecord) -> list[DriftNotice]:
        """Note other traffic by the draft's confidence in its first tokens, before enough of them were accepted or not."""
        change = self._traffic_drift.update(record.confidences[:, 0].tolist(), record.request_ids.tolist())
        if change is None:
            return []
        self.acceptance.recent.forget_decks(self.acceptance.steps)
        words = f"the draft's mean confidence moved from {change.before:.0%} to {change.after:.0%}"
        return [DriftNotice("calibration", words)]

    def _learn_times(self, record: StepRecord) -> list[DriftNotice]:
        step = self.counters.steps
        shift = self.verify.observe(record.padded_tokens, record.kv_tokens, record.verify_s, step)
        overhead_s = record.step_s - record.draft_s - record.verify_s - record.draft_extend_s
        times = {"draft": record.draft_s, "draft_extend": record.draft_extend_s, "overhead": overhead_s}
        for name, seconds in times.items():
            self.stages[name].observe(record.k, record.batch_size, seconds, step)
        expected = self._expected_verify_s(record)
        if expected is not None:
            # At the speed_factor of now: a speed_factor that changes for good is news of its own.
            residual = math.log(record.verify_s / expected) - (self.speed_factor.value - self._forecast_speed_factor)
            limit = CLIP_SIGMAS * self.verify.table.sigma
            self._latency_bias += 0.05 * (min(max(residual, -limit), limit) - self._latency_bias)
            alarm = self._latency_drift.update(residual / self.verify.table.sigma) and (
                abs(self._latency_bias) >= max(MATERIAL_BIAS, self.speed_factor.jump_limit(self.verify.table.sigma))
            )
            if shift is not None:
                self._latency_drift.restart()
            if shift is not None or alarm:
                ratio = shift.ratio if shift is not None else math.exp(self._latency_bias)
                return [DriftNotice("latency", f"verify latency moved by {ratio - 1.0:+.0%}")]
        return []

    def latency_state(self) -> dict[str, NDArray[Any]]:
        """Arrays of `latency_model.npz`: the fit to read, the cells to go on from."""
        state: dict[str, NDArray[Any]] = {f"cells.{k}": v for k, v in self.verify.state().items()}
        for name, stage in self.stages.items():
            state |= {f"{name}.{k}": v for k, v in stage.table.state().items()}
        state["padding"] = self.padding.state()
        return state | (self.verify.fit.state() if self.verify.fit is not None else {})

    def calibration_state(self) -> dict[str, NDArray[Any]]:
        """Arrays of `calibration.npz`."""
        return dict(self.acceptance.state())

    def take(self, latency: Mapping[str, NDArray[Any]], calibration: Mapping[str, NDArray[Any]]) -> None:
        """Take over the arrays of a profile; ValueError when they do not fit this engine (then use a fresh models)."""
        try:
            self.padding.restore(latency["padding"])
            self.verify.restore({"rows": latency["cells.rows"], "noise": latency["cells.noise"]})
            for name, stage in self.stages.items():
                stage.table.restore({"rows": latency[f"{name}.rows"], "noise": latency[f"{name}.noise"]})
            self.acceptance.restore(calibration)
        except KeyError as error:
            raise ValueError(f"profile lacks {error.args[0]}") from error
