"""The controller: one pure state machine from step records to policies.

    observe(record, now_s) -> Policy | None      learn one step; a policy comes back when it must change at once
    refit(now_s)           -> Policy | None      fit the models and decide anew; called when `refit_due(now_s)`

Modes. SWEEP: rounds of trials until the staircase is known. ACTIVE: the table acts. SHADOW: decides and reports, the engine
stays on its launch K. PAUSED: keeps the last table, goes on learning. PINNED: one K for all. FALLBACK: the sidecar does not
trust itself; the engine stays on its launch K until a refit succeeds. An engine that runs no policy is noticed: ACTIVE is then
shown as SHADOW, and the page goes on asking. Time is an argument everywhere; nothing here does I/O.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptive_spec.config.settings import ControllerSettings
from adaptive_spec.control.checkpoint import ControllerState
from adaptive_spec.control.counters import Counters, Histogram
from adaptive_spec.control.engine_response import WATCHED, EngineResponse, PendingTrials
from adaptive_spec.control.guard_rails import SwapWatch, Table, allowed, better_table, table_for
from adaptive_spec.control.probing import ProbeBudget, probe_plans
from adaptive_spec.control.snapshot import Snapshot
from adaptive_spec.control.sweep import Sweep
from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.domain.policy import Granularity, Mode, Policy, Trial
from adaptive_spec.domain.step_record import StepFlag, StepRecord
from adaptive_spec.models.goodput import Forecast
from adaptive_spec.models.model_set import Findings, ModelSet, Stopwatch

ROLLBACK_HOLD_S = 30.0
TRIAL_PATIENCE_S = 5.0
DRIFT_GRANT_STEPS = 10
OFF_MODES = (Mode.SHADOW, Mode.FALLBACK)


class Controller:
    """Keeps K right for one engine. Not thread-safe: one thread owns it and hands out snapshots."""

    def __init__(self, settings: ControllerSettings, info: EngineInfo) -> None:
        self.settings, self.info = settings, info
        self.models = ModelSet(settings, info)
        self.counters = Counters(info.max_k)
        self.mode = Mode.SWEEP if settings.mode == "active" else Mode.SHADOW
        self.reason = "cold start"
        self.latest_policy: Policy | None = None
        self._table: Table = np.full((info.max_batch + 1, 1), info.launch_k, dtype=np.uint8)
        self._budget = ProbeBudget(settings.policy.probe_budget)
        self._sweep = Sweep(settings.sweep, info, settings.latency.jump_threshold)
        self._version = 0
        self._policy_time_s = 0.0
        self._trials = PendingTrials()
        self._engine_response = EngineResponse()
        self._next_refit_s = 0.0
        self._swap_time_s = -math.inf
        self._swap_version = 0
        self._drift_time_s = -math.inf
        self._watch: SwapWatch | None = None
        self._banned: NDArray[np.bool_] | None = None
        self._banned_until_s = 0.0
        self._sweep_started_s: float | None = None
        self._swept = False
        self._trusted_mode = self.mode

    # -- learning ------------------------------------------------------------------------------------------------------

    def observe(self, record: StepRecord, now_s: float) -> Policy | None:
        """Learn one step. now_s: seconds on any steadily rising clock. Returns a policy when one must be adopted at once."""
        trial = bool(record.flags & StepFlag.TRIAL)
        self._budget.earn(record.step_s)
        self.counters.count(record)
        self._take_findings(self.models.observe(record), now_s)
        self.counters.compare(record, self.models.compare(record))
        lost_s = self.models.trial_loss_s(record)
        if self.mode is not Mode.SWEEP:
            self.counters.probe_lost_s += lost_s
            self._budget.spend(lost_s)
        return (
            self._follow_engine_response(record, now_s)
            or self._follow_trials(record, now_s)
            or self._follow_swap(record, now_s, trial)
        )

    def _take_findings(self, findings: Findings, now_s: float) -> None:
        """Count what the models found. After a drift: refit soon, stop the watch over the last swap, allow a few probes."""
        self.counters.count_scores(findings.scores)
        for signal, text in findings.drifts:
            self.counters.drift[signal] += 1
            self.counters.event(now_s, "drift", f"{signal} drift: {text}")
            self._drift_time_s = now_s
            self._next_refit_s = min(self._next_refit_s, now_s)
            self._watch = None
            self._budget.grant(DRIFT_GRANT_STEPS)

    # -- what the engine makes of it -----------------------------------------------------------------------------------

    @property
    def watched_only(self) -> bool:
        """Whether the mode is shown as SHADOW because the engine runs none of the policies made for it."""
        return self._engine_response.ignored and self.mode is Mode.ACTIVE

    def _follow_engine_response(self, record: StepRecord, now_s: float) -> Policy | None:
        offered = self.latest_policy is not None and self.latest_policy.acting
        if not self._engine_response.changed(record, offered, now_s) or self.mode not in (Mode.SWEEP, Mode.ACTIVE):
            return None
        if self._engine_response.ignored:
            self._set_mode(Mode.SHADOW, WATCHED, now_s)
            self.mode = Mode.ACTIVE  # the page goes on asking
            self._next_refit_s = now_s
            return self._publish(now_s)
        self.mode, words = Mode.SHADOW, "the engine runs the policies made for it"  # shadow is what was shown
        if not self._swept:
            return self._begin_sweep(words, now_s)
        self._set_mode(Mode.ACTIVE, words, now_s)
        return None

    # -- trials --------------------------------------------------------------------------------------------------------

    def _follow_trials(self, record: StepRecord, now_s: float) -> Policy | None:
        begin = self._trials.left == 0 and self._sweep_started_s is None
        if self.mode is not Mode.SWEEP:
            self._trials.ended(record, self._version, now_s)
            return None
        return self._next_sweep_round(now_s) if begin or self._trials.ended(record, self._version, now_s) else None

    def _begin_sweep(self, reason: str, now_s: float) -> Policy | None:
        self._sweep = Sweep(self.settings.sweep, self.info, self.settings.latency.jump_threshold)
        self._sweep_started_s = None
        self._set_mode(Mode.SWEEP, reason, now_s)
        return self._next_sweep_round(now_s)

    def _next_sweep_round(self, now_s: float) -> Policy | None:
        if self.models.batch_size == 0 and not self.info.holds_batch:
            return None  # token counts depend on the batch: wait for the first step
        if self._sweep_started_s is None:
            self._sweep_started_s = now_s
        trials = self._sweep.next_round(self.models.measured_counts(), self.models.batch_size)
        if trials:
            self._take_findings(self.models.learn_acceptance(), now_s)
            self.models.acceptance.refit()
            return self._publish(now_s, trials)
        self.counters.sweep_s += now_s - self._sweep_started_s
        self._swept = True
        self._set_mode(Mode.ACTIVE, "sweep done", now_s)
        self._take_findings(self.models.fit(), now_s)
        return self._decide(now_s, first=True) or self._publish(now_s)

    # -- deciding ------------------------------------------------------------------------------------------------------

    def refit_due(self, now_s: float) -> bool:
        return now_s >= self._next_refit_s

    def tick(self, now_s: float) -> Policy | None:
        """What must be done without a record: begin the sweep, refit when due."""
        if self.mode is Mode.SWEEP and self._trials.left == 0:
            return self._next_sweep_round(now_s)
        return self.refit(now_s) if self.refit_due(now_s) else None

    def refit(self, now_s: float, stopwatch: Stopwatch = nullcontext) -> Policy | None:
        """Fit all models to what was learnt and decide anew. stopwatch: see `ModelSet.fit`."""
        self._next_refit_s = now_s + self.settings.refit_interval_s
        self._take_findings(self.models.fit(stopwatch), now_s)
        if self.mode is Mode.FALLBACK:
            self._set_mode(self._trusted_mode, "models fitted again", now_s)
        if self.mode in (Mode.SWEEP, Mode.PAUSED, Mode.PINNED):
            return None
        return self._decide(now_s)

    def _decide(self, now_s: float, first: bool = False) -> Policy | None:
        forecast_, rails = self.models.forecast, self.settings.policy
        if forecast_ is None:
            return None
        goodput = allowed(forecast_, rails.k_min, rails.k_max)
        if now_s >= self._banned_until_s:
            self._banned = None
        if self._banned is not None and self._banned.shape != goodput.shape:
            self._banned = np.repeat(self._banned[:, :1], goodput.shape[1], axis=1)
        current = table_for(self._table, goodput.shape[1])
        if first:
            wanted = goodput.argmax(axis=-1).astype(np.uint8)
        else:
            wanted = better_table(goodput, forecast_.uncertainty, current, rails.min_gain, self._banned)
        used = self.models.batches > 0.02 * max(self.models.batches.sum(), 1e-9)
        moved = bool((wanted != current)[used, min(self.models.context, wanted.shape[1] - 1)].any())
        drifted = self._drift_time_s > self._swap_time_s
        if moved and not first and not drifted and now_s - self._swap_time_s < rails.min_dwell_s:
            wanted, moved = current, False
        if self._trials.running(now_s) and not moved:
            return None  # let the probe finish
        previous, self._table = current, wanted
        if moved:
            self._note_swap("sweep" if first else "drift" if drifted else "gain", previous, goodput, now_s)
        trials = () if moved else self._probes(forecast_, goodput)
        if moved or trials or self._refreshed(forecast_):
            return self._publish(now_s, trials)
        return None

    def _note_swap(self, reason: str, previous: Table, goodput: NDArray[np.float64], now_s: float) -> None:
        self.counters.swaps[reason] += 1
        self._swap_time_s, self._swap_version = now_s, self._version + 1
        b = min(max(self.models.batch_size, 1), self.info.max_batch)
        c = min(self.models.context, self._table.shape[1] - 1)
        old, new = int(previous[b, c]), int(self._table[b, c])
        where = f"at batch {b}" if old != new else "at other batch sizes"
        gain = goodput[b, c, new] / goodput[b, c, old] - 1.0 if old != new and goodput[b, c, old] > 0.0 else 0.0
        words = f"K {old}→{new} {where}" if old != new else f"K changed {where}"
        self.counters.event(now_s, "swap", f"{words}: {reason}" + (f", {gain:+.1%} expected" if gain else ""))
        self._watch = None
        if reason != "sweep":
            self._watch = SwapWatch(previous, self._table, self.settings.policy.rollback_loss, self.counters.bias(64))

    def _follow_swap(self, record: StepRecord, now_s: float, trial: bool) -> Policy | None:
        watch, forecast_ = self._watch, self.models.forecast
        if (
            watch is None
            or forecast_ is None
            or trial
            or self.mode is not Mode.ACTIVE
            or record.policy_version < self._swap_version
        ):
            return None
        row, c = min(record.batch_size, self.info.max_batch), min(self.models.context, watch.changed.shape[1] - 1)
        if not watch.add(row, c, record.output_tokens, record.step_s):
            return None
        if not watch.failed(forecast_.goodput):
            if watch.steps >= watch.MAX_STEPS:
                self._watch = None
            return None
        self._watch = None
        self._banned = np.zeros((*watch.changed.shape, self.info.max_k + 1), dtype=bool)
        changed = np.argwhere(watch.previous != watch.changed)
        self._banned[changed[:, 0], changed[:, 1], watch.changed[changed[:, 0], changed[:, 1]]] = True
        self._banned_until_s = now_s + ROLLBACK_HOLD_S
        self._table = watch.previous
        self.counters.swaps["rollback"] += 1
        self._swap_time_s = now_s
        share, _ = watch.share(forecast_.goodput)
        self.counters.event(
            now_s, "swap", f"rolled back at batch {row}: measured {share:.0%} of what the previous K would have given"
        )
        return self._publish(now_s)

    def _probes(self, forecast_: Forecast, goodput: NDArray[np.float64]) -> tuple[Trial, ...]:
        if (
            self.mode is not Mode.ACTIVE
            or self._engine_response.ignored
            or self.models.batch_size == 0
            or self.counters.steps == 0
        ):
            return ()
        b = min(self.models.batch_size, self.info.max_batch)
        c = min(self.models.context, goodput.shape[1] - 1)
        k_now, min_gain = int(self._table[b, c]), self.settings.policy.min_gain
        return self._budget.choose(probe_plans(forecast_, goodput, b, c, k_now, self.info.granularity, min_gain))

    def _refreshed(self, forecast_: Forecast) -> bool:
        """Whether the engine's own per-step search would notice the new models."""
        last = self.latest_policy
        if last is None or self.mode is Mode.SHADOW:
            return last is None or not np.array_equal(last.k_table, self._table)
        if not np.array_equal(last.k_table, self._table):
            return True
        n = min(len(last.verify_s), len(forecast_.verify_s))
        moved_cost = float(np.max(np.abs(last.verify_s[1:n] / forecast_.verify_s[1:n] - 1.0)))
        moved_calibration = float(np.max(np.abs(last.survival.table - forecast_.survival.table)))
        return moved_cost > 0.005 or moved_calibration > 0.01 or last.survival.conditional != forecast_.survival.conditional

    def _publish(self, now_s: float, trials: tuple[Trial, ...] = ()) -> Policy:
        """Make the next policy from the table and the latest forecast."""
        forecast_ = self.models.forecast
        info = self.info
        pinned = self.mode is Mode.PINNED
        if forecast_ is not None:
            fixed_s, verify_s, survival = forecast_.fixed_s, forecast_.verify_s, forecast_.survival
            slope, edges = forecast_.context_s_per_token, forecast_.context_edges
        else:
            # Nothing measured yet: verify everything, and let trials choose tokens by the untrained calibration.
            fixed_s = np.zeros((info.max_k + 1, info.max_batch + 1))
            verify_s = np.ones(info.max_batch * (info.max_k + 1) + 1)
            survival, slope, edges = self.models.acceptance.survival, 0.0, np.zeros(0, dtype=np.float32)
        table = table_for(self._table, len(edges) + 1)
        self._version += 1
        self._policy_time_s = now_s
        self._trials.begin(trials, now_s + TRIAL_PATIENCE_S + (25.0 if self.mode is Mode.SWEEP else 0.0))
        self.latest_policy = Policy(
            self._version, self.mode, self.mode not in OFF_MODES, info.granularity, info.max_k, table, edges,
            fixed_s.astype(np.float32), verify_s.astype(np.float32), slope, survival,
            pinned or forecast_ is None or info.granularity is Granularity.BATCH, trials,
        )  # fmt: skip
        return self.latest_policy

    # -- commands ------------------------------------------------------------------------------------------------------

    def command(self, name: str, now_s: float, k: int | None = None) -> Policy | None:
        """Carry out an operator's command; ValueError, one line, when it is unknown or its K is not one of the candidates."""
        if name == "pin":
            if k not in self.info.candidates:
                raise ValueError(f"pin: K {k} is not one of {list(self.info.candidates)}")
            self._table = np.full_like(self._table, k)
            self.counters.swaps["pin"] += 1
            self._set_mode(Mode.PINNED, f"pinned at K = {k}", now_s)
            return self._publish(now_s)
        if name == "pause":
            self._set_mode(Mode.PAUSED, "paused by command", now_s)
            return self._publish(now_s)
        if name == "refit":
            return self.refit(now_s)
        if name == "resweep":
            return self._begin_sweep("sweep asked for", now_s)
        modes = {"resume": self.settings.mode, "unpin": self.settings.mode, "active": "active", "shadow": "shadow"}
        if name not in modes:
            raise ValueError(f"command {name!r} is not one of pause, resume, shadow, active, pin, unpin, refit, resweep")
        if modes[name] == "active" and not self._swept and self.models.forecast is None:
            self._set_mode(Mode.SWEEP, "cold start", now_s)
            return self._next_sweep_round(now_s)
        self._set_mode(Mode(modes[name]), f"{name} by command", now_s)
        self._take_findings(self.models.fit(), now_s)
        return self._decide(now_s, first=True) or self._publish(now_s)

    def fail(self, reason: str, now_s: float) -> Policy:
        """The sidecar caught a failure of the controller: engine back to its launch K until a refit succeeds."""
        if self.mode is not Mode.FALLBACK:
            self._trusted_mode = self.mode
        self._set_mode(Mode.FALLBACK, reason, now_s)
        self._next_refit_s = now_s + 10.0 * self.settings.refit_interval_s
        return self._publish(now_s)

    def note_dropped(self, reason: str, count: int) -> None:
        self.counters.dropped[reason] += count

    def note_refit(self, model: str, seconds: float) -> None:
        self.counters.refits.setdefault(model, Histogram()).add(seconds)

    def resume_version(self, version: int) -> None:
        """Continue counting policies after `version`: versions never go back, whoever published the last one."""
        self._version = max(self._version, version)

    def _set_mode(self, mode: Mode, reason: str, now_s: float) -> None:
        if mode is not self.mode:
            self.counters.event(now_s, "mode", f"{self.mode} → {mode}: {reason}")
            self._watch = None
        if mode is Mode.SWEEP:
            self._engine_response = EngineResponse()  # trials wait for the engine: it gets its chance
        self.mode, self.reason = mode, reason

    # -- state ---------------------------------------------------------------------------------------------------------

    def latency_state(self) -> dict[str, NDArray[Any]]:
        """Arrays of `latency_model.npz`."""
        return self.models.latency_state()

    def calibration_state(self) -> dict[str, NDArray[Any]]:
        """Arrays of `calibration.npz`."""
        return self.models.calibration_state()

    def restore_profile(self, latency: Mapping[str, NDArray[Any]], calibration: Mapping[str, NDArray[Any]]) -> None:
        """Begin from a profile: the sweep is skipped. ValueError when it does not fit this engine (then nothing is changed)."""
        ModelSet(self.settings, self.info).take(latency, calibration)
        self.models.take(latency, calibration)
        self._swept = True
        if self.mode is Mode.SWEEP:
            self.mode, self.reason = Mode.ACTIVE, "already profiled"

    def policy_summary(self) -> dict[str, Any]:
        """JSON form of the policy: for people, and the table to restart with."""
        return {
            "version": self._version, "mode": str(self.mode), "reason": self.reason, "candidates": list(self.info.candidates),
            "k_by_batch_size": {str(b): k for b, k in self.k_by_batch_size().items()}, "table": self._table.tolist(),
        }  # fmt: skip

    def state(self) -> dict[str, NDArray[Any]]:
        """Everything a restarted sidecar needs, as arrays."""
        models = self.models
        return ControllerState(
            self.counters.state(), self.policy_summary(), self._swept, self.settings.mode, models.kv_per_request, models.batches,
            self._sweep.steps, self._engine_response.ignored, models.latency_state(), models.calibration_state(),
        ).arrays()  # fmt: skip

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Continue from `state()`; ValueError when it is foreign or damaged (use a fresh controller then)."""
        state = ControllerState.of(arrays)
        table = state.table
        self.counters.restore(state.counters)
        if len(table) != len(self._table) or table.max() > self.info.max_k or state.batches.shape != self.models.batches.shape:
            raise ValueError("checkpoint is of another engine: the K table does not fit")
        if state.swept or state.mode is not Mode.SWEEP:
            self.restore_profile(state.latency, state.calibration)
            # A mode newly asked for in the configuration wins over the one the old process was in.
            self.mode = Mode(self.settings.mode) if state.asked != self.settings.mode else state.mode
            self.reason = "continued from the checkpoint"
        self._table, self.models.batches, self.models.kv_per_request = table, state.batches, state.kv_per_request
        self._swept, self._sweep.steps = state.swept, state.sweep_steps
        self._engine_response = EngineResponse(state.ignored)
        self.resume_version(state.policy_version)

    def k_by_batch_size(self) -> dict[int, int]:
        """K of the table where it changes, up to a little above the largest batch seen."""
        largest = min(self.models.largest_batch + 2 if self.models.largest_batch else 8, self.info.max_batch)
        c = min(self.models.context, self._table.shape[1] - 1)
        return {b: int(self._table[b, c]) for b in range(1, largest + 1)}

    def snapshot(self, now_s: float) -> Snapshot:
        """Immutable view for metrics and pages."""
        counters, fit, quality = self.counters, self.models.verify.fit, self.models.acceptance.reliability
        predicted_gain, measured_gain = counters.gains()
        share = self._sweep.steps / (self._sweep.steps + 6.0 * self._sweep.FIRST_SAMPLES * max(self._sweep.open_intervals, 1))
        return Snapshot(
            time_s=now_s, mode=Mode.SHADOW if self.watched_only else self.mode, watched_only=self.watched_only,
            reason=WATCHED if self.watched_only else self.reason, engine=self.info.name, launch_k=self.info.launch_k,
            policy_version=self._version, policy_time_s=self._policy_time_s, k_by_batch_size=self.k_by_batch_size(),
            segments=fit.segments if fit else (), boundaries=fit.boundaries if fit else (),
            latency_points=tuple(zip(fit.tokens.tolist(), fit.mean_s.tolist(), fit.weight.tolist(), strict=True)) if fit else (),
            latency_mape=fit.mape if fit else None,
            stage_histograms={name: h.data() for name, h in counters.stages.items()},
            predicted_step_s_total=counters.predicted_s, measured_step_s_total=counters.measured_s,
            draft_tokens=tuple(counters.draft.tolist()), verified_tokens=tuple(counters.verified.tolist()),
            accepted_tokens=tuple(counters.accepted.tolist()), expected_accepted_tokens=counters.expected_accepted,
            output_tokens=counters.output_tokens, decode_steps=counters.steps, goodput_tokens_per_s=counters.goodput(),
            calibration_kind=self.models.acceptance.kind, calibration_error=quality.ece, calibration_brier=quality.brier,
            calibration_log_loss=quality.log_loss, calibration_curve=quality.curve(),
            drift_events=dict(counters.drift), swaps=dict(counters.swaps),
            predicted_gain=predicted_gain, measured_gain=measured_gain,
            observations=counters.observations, dropped=dict(counters.dropped),
            refit_histograms={name: h.data() for name, h in counters.refits.items()},
            sweep_steps=self._sweep.steps, sweep_progress=share if self.mode is Mode.SWEEP else 1.0, sweep_s=counters.sweep_s,
            probe_share=counters.probe_lost_s / counters.decode_s if counters.decode_s > 0.0 else 0.0,
            events=tuple(counters.events), batch_size=self.models.batch_size,
        )  # fmt: skip
