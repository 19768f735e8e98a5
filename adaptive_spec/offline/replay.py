"""Replay: what policies would have decided on a recorded trace, and the goodput that would have given.

    goodput(policy) = mean over blocks of 50 steps, weighted by the seconds they took, of sum tokens(plan) / sum seconds(plan)

tokens(plan): exact where the plan verifies no more tokens than were verified, because acceptance of the first tokens does not
depend on how many follow: min(accept_len, verify_len). Where it verifies more and all verified tokens were accepted, expected
tokens are added: by the calibration where the tokens were drafted, else by the acceptance rates of their positions.
seconds(plan): the measured time of the step, multiplied by the ratio of the modelled times of both plans. The model is fitted to
that part of the trace, so that noise and drift of the machine are in both. A token count between measured ones costs between what
they cost; one beyond them between the same as the nearest (memory-bound) and in proportion to its tokens (compute-bound). The
middle is used, and the width is part of the uncertainty.
Traffic is a function of time: a faster policy would have run more steps in the same seconds.

Uncertainty, 90 %: a bootstrap over blocks of 50 steps (Kuensch, 1989) for the sampling of the trace, and the models' own errors
for what was not measured, which do not average out. `supported` is the share of steps whose plan was verified and measured; below
a half, use the interval and not the estimate. Pure: no clock, no files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np

from adaptive_spec.config.settings import ControllerSettings
from adaptive_spec.control.controller import Controller
from adaptive_spec.control.snapshot import Snapshot
from adaptive_spec.domain.arrays import Floats, Ints, Lengths
from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.domain.policy import Granularity, Mode
from adaptive_spec.domain.step_record import UNKNOWN_CONFIDENCE, StepFlag, StepRecord
from adaptive_spec.engine_side.planner import Planner
from adaptive_spec.models.goodput import Forecast
from adaptive_spec.models.model_set import ModelSet

FIT_STEPS = 500
"""Steps per part of the trace; each part has models of its own."""
BLOCK_STEPS = 50
"""Steps per block of the bootstrap."""
RESAMPLES = 300
INTERVAL_SIGMAS = 1.645
"""Half the width of a 90 % interval of a normal distribution, in standard deviations."""
SURE_ERROR = 0.05
"""Relative error of a step's time above which a plan counts as not measured."""


@dataclass(frozen=True)
class Plan:
    """A decision for one step. verify_len: [rows], or None for all k drafted tokens."""

    k: int
    verify_len: Lengths | None = None


class ReplayedPolicy(Protocol):
    """A policy that is asked for its decision in each recorded step."""

    def decide(self, record: StepRecord) -> Plan:
        """Return its decision for this step. Must not use the outcome (accept_len, times)."""
        ...

    def learn(self, record: StepRecord, plan: Plan) -> None:
        """Learn the outcome of the step. plan: what it decided."""
        ...


class ReplayedStatic:
    """Always the same K."""

    def __init__(self, k: int) -> None:
        self._plan = Plan(k)

    def decide(self, record: StepRecord) -> Plan:
        return self._plan

    def learn(self, record: StepRecord, plan: Plan) -> None:
        pass


class ReplayedAdaptive:
    """The sidecar's controller in shadow mode, with the engine's planner executing its policies."""

    def __init__(self, info: EngineInfo, settings: ControllerSettings) -> None:
        self.controller = Controller(settings.model_copy(update={"mode": "shadow"}), info)
        self._planner = Planner(info.launch_k, info.max_k)
        self._ragged = info.granularity is Granularity.REQUEST
        self.step_errors: list[float] = []
        """Relative errors of step times, each predicted before the step was learnt."""

    def decide(self, record: StepRecord) -> Plan:
        k = self._planner.draft_length(record.batch_size, record.kv_tokens)
        if not self._ragged or k == 0:
            return Plan(k)
        confidences = record.confidences[:, :k]
        if k > record.k:  # tokens that were not drafted get the confidence of the last one that was
            last = confidences[:, -1:] if record.k else np.full((len(record.verify_len), 1), 0.5, dtype=np.float32)
            confidences = np.concatenate((confidences, np.repeat(last, k - record.k, axis=1)), axis=1)
        return Plan(k, self._planner.verify_lengths(confidences))

    def learn(self, record: StepRecord, plan: Plan) -> None:
        forecast = self.controller.models.forecast
        if forecast is not None and not record.flags & StepFlag.DISTURBED:
            predicted = step_seconds(forecast, record, Plan(record.k, record.verify_len), self._ragged)
            self.step_errors.append(predicted / record.step_s - 1.0)
        now_s = record.time_ns * 1e-9
        policy = self.controller.observe(record, now_s)
        if self.controller.refit_due(now_s):
            policy = self.controller.refit(now_s) or policy
        if policy is not None:
            self._planner.adopt(replace(policy, acting=True, mode=Mode.ACTIVE, trials=()))


def plan_tokens(record: StepRecord, plan: Plan, ragged: bool) -> int:
    """Tokens a plan would verify in a step: num_tokens at request granularity; at batch granularity padded like the step."""
    if not ragged:
        return record.padded_tokens // (record.k + 1) * (plan.k + 1)
    per_row = plan.k if plan.verify_len is None else float(plan.verify_len.mean())
    return round(record.batch_size * (1.0 + per_row))


def step_seconds(forecast: Forecast, record: StepRecord, plan: Plan, ragged: bool) -> float:
    """Modelled seconds of a step with a plan."""
    verify_s = float(forecast.verify_s[min(plan_tokens(record, plan, ragged), len(forecast.verify_s) - 1)])
    return _beside_verification(forecast, record, plan.k) + verify_s


def _beside_verification(forecast: Forecast, record: StepRecord, k: int) -> float:
    return float(forecast.fixed_s[k, forecast.row(record.batch_size)]) + forecast.context_s_per_token * record.kv_tokens


@dataclass(frozen=True)
class Estimate:
    """Estimate of a policy.

    goodput: tokens/s. gain: relative to what ran; gain_low, gain_high: its 90 % interval. mean_k: mean K over the steps.
    supported: see the module.
    """

    goodput: float
    gain: float
    gain_low: float
    gain_high: float
    mean_k: float
    supported: float


@dataclass(frozen=True)
class Replay:
    """Result of a replay. goodput: of what ran. snapshot: of the controller after the trace. step_time_mape, step_time_bias:
    predicted against measured step times, mean absolute and mean relative error, None before anything was predicted.
    """

    steps: int
    seconds: float
    goodput: float
    snapshot: Snapshot
    step_time_mape: float | None
    step_time_bias: float | None
    estimates: dict[str, Estimate]


class Part(NamedTuple):
    """Models at the end of a part of the trace.

    rates, errors: conditional acceptance by position and its standard error. measured: padded token counts with data, ascending;
    measured_s: their verify times. padded: the padded count of each token count.
    """

    forecast: Forecast
    rates: Floats
    errors: Floats
    measured: Ints
    measured_s: Floats
    padded: Ints

    def verify_seconds(self, tokens: int) -> tuple[float, float]:
        """Return the verify time of a token count and its standard error."""
        at = min(tokens, len(self.forecast.verify_s) - 1)
        modelled, error = float(self.forecast.verify_s[at]), float(self.forecast.verify_error_s[at])
        tokens = int(self.padded[at])
        above = int(np.searchsorted(self.measured, tokens))
        if above < len(self.measured) and self.measured[above] == tokens:
            return modelled, error
        if above == len(self.measured):
            low = float(self.measured_s[-1])
            high = low * tokens / float(self.measured[-1])
        elif above == 0:
            high = float(self.measured_s[0])
            low = high * tokens / float(self.measured[0])
        else:
            low, high = sorted((float(self.measured_s[above - 1]), float(self.measured_s[above])))
            return min(max(modelled, low), high), math.hypot(error, (high - low) / 2.0 / INTERVAL_SIGMAS)
        # The 90 % interval reaches from `low` to `high`.
        return (low + high) / 2.0, math.hypot(error, (high - low) / 2.0 / INTERVAL_SIGMAS)


class TraceEvaluator:
    """Models fitted to each part of the trace, to evaluate other plans there."""

    def __init__(self, info: EngineInfo, records: Sequence[StepRecord]) -> None:
        self._ragged = info.granularity is Granularity.REQUEST
        self.parts: list[Part] = []
        models = ModelSet(ControllerSettings(), info)
        for start in range(0, len(records), FIT_STEPS):
            for record in records[start : start + FIT_STEPS]:
                models.observe(record)
            models.fit()
            fit = models.verify.fit
            if models.forecast is not None and fit is not None:
                rates, errors = models.acceptance.conditional_rates()
                largest = len(models.forecast.verify_s) - 1
                padded = models.padding.table(largest) if self._ragged else np.arange(largest + 1)
                self.parts.append(Part(models.forecast, rates, errors, fit.tokens, fit.mean_s, padded))

    def value(self, index: int, record: StepRecord, plan: Plan) -> tuple[float, float, float, float, bool]:
        """Return (tokens, seconds, uncertainty of the tokens, relative error of the seconds, supported) of a plan in a step."""
        part = self.parts[min(index // FIT_STEPS, len(self.parts) - 1)]
        rows, scale = len(record.verify_len), record.batch_size / len(record.verify_len)
        wanted = np.full(rows, plan.k, dtype=np.uint8) if plan.verify_len is None else plan.verify_len
        exact = np.minimum(record.accept_len, wanted)
        beyond = (wanted > record.verify_len) & (record.accept_len == record.verify_len)
        extra = doubt = 0.0
        if beyond.any():
            extra, doubt = self._beyond(record, wanted, np.flatnonzero(beyond), part)
        seconds, error = record.step_s, 0.0
        if plan.k != record.k or bool((wanted != record.verify_len).any()):
            verify_s, error_s = part.verify_seconds(plan_tokens(record, replace(plan, verify_len=wanted), self._ragged))
            ours = _beside_verification(part.forecast, record, plan.k) + verify_s
            theirs = step_seconds(part.forecast, record, Plan(record.k, record.verify_len), self._ragged)
            seconds, error = record.step_s * ours / theirs, error_s / ours
        tokens = record.batch_size + scale * (float(exact.sum()) + extra)
        supported = error < SURE_ERROR and not bool((wanted > record.verify_len).any())
        return tokens, seconds, scale * doubt, error, supported

    def _beyond(self, record: StepRecord, wanted: Lengths, rows: Ints, part: Part) -> tuple[float, float]:
        """Expected tokens behind those verified and accepted, and their uncertainty."""
        survival = part.forecast.survival.survival(record.confidences) if record.k else np.zeros((len(wanted), 0))
        known = np.logical_and.accumulate(record.confidences > UNKNOWN_CONFIDENCE, axis=1).sum(axis=1)
        extra = doubt = 0.0
        for row in rows.tolist():
            reached, error = 1.0, 0.0
            verified = int(record.verify_len[row])
            base = float(survival[row, verified - 1]) if verified else 1.0
            for j in range(verified, int(wanted[row])):
                if j < known[row]:
                    reached = float(survival[row, j]) / max(base, 1e-9)
                else:
                    reached *= float(part.rates[j])
                error += float(part.errors[j]) / max(float(part.rates[j]), 0.05)
                extra += reached
                doubt += reached * min(error, 1.0)
        return extra, doubt


def replay(
    info: EngineInfo, records: Sequence[StepRecord], policies: dict[str, ReplayedPolicy], settings: ControllerSettings,
    progress: Callable[[int], None] = lambda steps: None,
) -> Replay:  # fmt: skip
    """Evaluate the decisions of policies on the records.

    progress: called with steps done; in total `len(policies) + 2` times the steps of the trace.
    Raises ValueError when there are fewer than two steps, or all of them are disturbed.
    """
    if len(records) < 2:
        raise ValueError(f"too few steps: must be at least 2, got {len(records)}")
    evaluator = TraceEvaluator(info, records)
    progress(len(records))
    if not evaluator.parts:
        raise ValueError("every step was disturbed: no step times to fit")
    adaptive = ReplayedAdaptive(info, settings)
    ran_tokens = np.array([record.output_tokens for record in records], dtype=np.float64)
    ran_seconds = np.array([record.step_s for record in records])
    estimates: dict[str, Estimate] = {}
    for name, policy in {"adaptive": adaptive, **policies}.items():
        values, ks = [], []
        for index, record in enumerate(records):
            plan = policy.decide(record)
            values.append(evaluator.value(index, record, plan))
            ks.append(plan.k)
            policy.learn(record, plan)
        estimates[name] = _estimate(np.array(values, dtype=np.float64), ran_tokens, ran_seconds, float(np.mean(ks)))
        progress(len(records))
    errors = np.array(adaptive.step_errors)
    return Replay(
        steps=len(records),
        seconds=float(ran_seconds.sum()),
        goodput=float(ran_tokens.sum() / ran_seconds.sum()),
        snapshot=adaptive.controller.snapshot(records[-1].time_ns * 1e-9),
        step_time_mape=float(np.abs(errors).mean()) if len(errors) else None,
        step_time_bias=float(errors.mean()) if len(errors) else None,
        estimates=estimates,
    )


def _estimate(values: Floats, ran_tokens: Floats, ran_seconds: Floats, mean_k: float) -> Estimate:
    tokens, seconds, doubt, error, supported = values.T
    blocks = np.arange(0, len(tokens), BLOCK_STEPS)
    t, s, ran_t, ran_s = (np.add.reduceat(column, blocks) for column in (tokens, seconds, ran_tokens, ran_seconds))
    given = ran_s * t / s  # tokens the policy would have given in the seconds of each block
    ratio = given.sum() / ran_t.sum()
    drawn = np.random.default_rng(0).integers(len(blocks), size=(RESAMPLES, len(blocks)))
    sampling = float(np.std(given[drawn].sum(axis=1) / ran_t[drawn].sum(axis=1)))
    model = ratio * math.hypot(float(doubt.sum() / tokens.sum()), float((error * seconds).sum() / seconds.sum()))
    half, gain = INTERVAL_SIGMAS * math.hypot(sampling, model), float(ratio) - 1.0
    return Estimate(float(given.sum() / ran_s.sum()), gain, max(gain - half, -1.0), gain + half, mean_k, float(supported.mean()))
