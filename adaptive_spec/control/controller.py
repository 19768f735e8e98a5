"""The controller: one pure state machine from step records to policies.

    observe(record, now_s) -> Policy | None      learn one step; a policy when the engine must get one at once
    refit(now_s)           -> Policy | None      fit the models and decide again; called when `refit_due(now_s)`

What it is made of: `ModelSet` learns and forecasts, `Decision` owns the K table, `Publisher` makes policies of it, `Sweep` and
`ProbeBudget` choose what to measure, `PendingTrials` and `EngineResponse` tell what the engine does with a policy, `Counters`
count.

Modes. SWEEP: rounds of trials until the staircase is known. ACTIVE: the table acts. SHADOW: decides and reports, but
its policies do not act. PAUSED: keeps the last table and continues learning. PINNED: one K for all. FALLBACK: a call failed; no
policy acts until a refit succeeds. The mode follows from what was asked for and from the health (`modes.py`); a policy is
published whenever it changes. An engine that runs no policy is observe-only: ACTIVE is then shown as
SHADOW, and policies are still published. Time is an argument everywhere; nothing here does I/O.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from adaptive_spec.config.settings import ControllerSettings
from adaptive_spec.control.checkpoint import ControllerState
from adaptive_spec.control.control_arm import ControlArm
from adaptive_spec.control.counters import Counters, Histogram
from adaptive_spec.control.decision import Decision, Proposal
from adaptive_spec.control.engine_response import OBSERVE_ONLY, EngineResponse, PendingTrials
from adaptive_spec.control.k_switches import switch_reason
from adaptive_spec.control.modes import Health, Request, effective_mode
from adaptive_spec.control.probing import ProbeBudget, probe_plans
from adaptive_spec.control.publication import Publisher
from adaptive_spec.control.snapshot import Snapshot, build_snapshot
from adaptive_spec.control.sweep import Sweep
from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.domain.policy import Granularity, Mode, Policy, Trial
from adaptive_spec.domain.step_record import StepFlag, StepRecord
from adaptive_spec.models.acceptance.online import StepScore
from adaptive_spec.models.goodput import Forecast
from adaptive_spec.models.model_set import Findings, ModelSet, Stopwatch

Models = tuple[Mapping[str, NDArray[Any]], Mapping[str, NDArray[Any]]]
"""Arrays of the latency model and of the calibration; both empty: no models."""
FAILED_RECORDS = 8
"""Records in a row that fail to be learnt before no policy acts: one or two bad ones say nothing about the models."""
FAILED_REFITS = 10
"""Refits or publications in a row that fail before the models are forgotten and a sweep begins."""
RECOVERY_REFITS = 10.0
"""Refit intervals until the first refit after a failure."""
DRIFT_GRANT_STEPS = 10
"""Steps' worth of probing advanced after a drift, paid back out of the budget."""
NEWS_INTERVAL_S = 60.0
"""Least time between two drift events of one signal that people are told of."""
FORECAST_RATIO_STEPS = 64
LEAST_LOSS_STEPS = 3.0
"""Steps of the best plan that a sweep may lose whatever `sweep.max_loss_s`: 5 % of the 60 steps after which a cold start is to be
within 5 % of the best plan (issue 11). Less leaves a server with steps of seconds without a second sample of any plan."""
COMMITTED_STEPS = 1
"""Decode steps that still follow the policy before: the engine runs one while the record of the last one is read."""


class Controller:
    """Chooses K for one engine. Not thread-safe: one thread owns it and hands out snapshots."""

    def __init__(self, settings: ControllerSettings, info: EngineInfo) -> None:
        self.settings, self.info = settings, info
        self.models = ModelSet(settings, info)
        self.counters = Counters(info.max_k)
        self.request = Request(settings.mode)
        self.reason = "cold start"
        self._untrained = self.models.acceptance.survival
        self._decision = Decision(settings.policy, info)
        self._publisher = Publisher(
            info, self._decision.allowed, settings.policy.min_gain, step_choice=settings.policy.slo_tpot_ms is None,
            k_min=settings.policy.k_min, k_max=settings.policy.k_max,
        )  # fmt: skip
        self._budget = ProbeBudget(settings.policy.probe_budget)
        self._control_arm = ControlArm(settings.policy.control_share, min(info.launch_k, info.max_k))
        self._sweep = self._new_sweep()
        self._sweep_started_s: float | None = None
        self._sweep_lost_s = 0.0
        """Seconds that the trials of the latest sweep lost against the best plan."""
        self._sweep_version = 0
        """Version of the last policy of a sweep that is over: its trials are none of the probes."""
        self._swept = False
        self._sweeping = self.request.plain_active
        self._sweep_due = False
        """A sweep was broken off by a command, or the models were forgotten: it begins when nothing else is asked for."""
        self._failed = False
        self._failed_records = self._failed_refits = self._failed_publications = 0
        self.models_forgotten = 0
        """How often `FAILED_REFITS` was reached."""
        self._round: tuple[Trial, ...] = ()
        """The sweep's latest round of trials."""
        self._trials = PendingTrials()
        self._engine_response = EngineResponse()
        self._last_record: StepRecord | None = None
        self._counted = False
        """Whether the record of the last `observe` is counted."""
        self._relearnt: deque[StepScore] | None = None
        """Scores of records that are learnt again, the last ones, which are not counted yet; None: nothing is learnt again."""
        self._next_refit_s = 0.0
        self._largest_shown = 8
        self._news_s: dict[str, float] = {}
        """When people were last told of a drift, by signal."""

    # -- modes ---------------------------------------------------------------------------------------------------------

    @property
    def health(self) -> Health:
        return Health.FAILED if self._failed else Health.SWEEPING if self._sweeping else Health.OK

    @property
    def healthy(self) -> bool:
        """Whether the last record, refit and publication succeeded: only then are the models worth keeping."""
        return not (self._failed or self._failed_records or self._failed_refits or self._failed_publications)

    @property
    def mode(self) -> Mode:
        """What follows from `request` and `health`."""
        return effective_mode(self.request, self.health)

    @property
    def _acting(self) -> bool:
        mode = self.mode
        return mode is Mode.SWEEP or (mode is not Mode.FALLBACK and self.request.acts)

    def _note_mode(self, before: Mode, reason: str, now_s: float) -> None:
        """Record the reason, and an event when the mode is not `before` any more."""
        mode = self.mode
        if mode is not before:
            self.counters.event(now_s, "mode", f"{before} → {mode}: {reason}")
            self._decision.stop_watching()
        if mode is Mode.SWEEP:
            self._engine_response = EngineResponse()  # trials show again whether the engine runs policies
        self.reason = reason

    # -- learning ------------------------------------------------------------------------------------------------------

    def observe(self, record: StepRecord, now_s: float) -> Policy | None:
        """Learn one step. now_s: seconds on any steadily rising clock. Returns a policy when the engine must get one at once.

        Raises what a model raises; the record is then neither counted nor learnt again, see `record_failed`.
        """
        self._counted = False
        findings = self.models.observe(record)
        self._failed_records = 0
        self._budget.earn(record.step_s, self.mode is Mode.ACTIVE)
        self._control_arm.observe(record)
        self.counters.count(record)
        self._counted = True
        self.counters.count_switch(switch_reason(self._last_record, record, self.info))
        self._last_record = record
        if self.models.token_times is not None:
            self.counters.count_requests(*self.models.token_times.within(self.models.token_times.observe(record)))
        self._take_findings(findings, now_s)
        self.counters.compare(record, self.models.compare(record))
        lost_s = self.models.trial_loss_s(record)
        if self.mode is Mode.SWEEP or record.policy_version <= self._sweep_version:
            self._sweep_lost_s += lost_s
            self.counters.sweep_steps += bool(record.flags & StepFlag.TRIAL)
        else:
            self.counters.probe_lost_s += lost_s
            self._budget.spend(lost_s)
        return (
            self._follow_engine_response(record, now_s) or self._follow_trials(record, now_s) or self._follow_swap(record, now_s)
        )

    def _take_findings(self, findings: Findings, now_s: float) -> None:
        """Count what the models found. After a drift: refit soon, stop watching the last swap, allow a few probes."""
        if self._relearnt is not None:
            self._relearnt.extend(findings.scores)
            return
        self.counters.count_scores(findings.scores)
        for signal, text in findings.drifts:
            if now_s - self._news_s.get(signal, -math.inf) >= NEWS_INTERVAL_S:
                self._news_s[signal] = now_s
                self.counters.drift[signal] += 1
                self.counters.event(now_s, "drift", f"{signal} drift: {text}")
            self._next_refit_s = min(self._next_refit_s, now_s)
            self._decision.note_drift(now_s)
            if self.mode is Mode.ACTIVE:
                self._budget.grant(DRIFT_GRANT_STEPS)

    def begin_relearning(self, waiting: int) -> None:
        """The next records are counted already and are only learnt, see `relearn`: after a crash, those behind the checkpoint.

        waiting: of the last of them, how many have expected accepted tokens that are not counted yet.
        """
        self._relearnt = deque(maxlen=waiting)

    def relearn(self, record: StepRecord) -> None:
        """Learn one step that is counted already. Raises what a model raises."""
        self._take_findings(self.models.observe(record), 0.0)
        self._last_record = record
        if self.models.token_times is not None:
            self.models.token_times.observe(record)

    def end_relearning(self) -> None:
        """Count the scores that were not counted yet; from now on records are new."""
        scores, self._relearnt = self._relearnt, None
        if scores is not None:
            scores.extend(self.models.learn_acceptance().scores)
            self.counters.count_scores(scores)

    # -- deciding ------------------------------------------------------------------------------------------------------

    def refit_due(self, now_s: float) -> bool:
        return now_s >= self._next_refit_s

    def tick(self, now_s: float) -> Policy | None:
        """What must be done without a record: begin the sweep, refit when due."""
        if self.mode is Mode.SWEEP and self._trials.left == 0:
            return self._next_sweep_round(now_s)
        return self.refit(now_s) if self.refit_due(now_s) else None

    def refit(self, now_s: float, stopwatch: Stopwatch = nullcontext) -> Policy | None:
        """Fit all models to what was learnt and decide again. stopwatch: see `ModelSet.fit`.

        Raises what a model raises. After `FAILED_REFITS` in a row the models are forgotten.
        """
        self._next_refit_s = now_s + self.settings.refit_interval_s
        try:
            self._take_findings(self.models.fit(stopwatch), now_s)
            policy = self._after_fit(now_s)
        except Exception:
            self._failed_refits += 1
            if self._failed_refits >= FAILED_REFITS:
                self._forget_models(now_s)
            raise
        self._failed_refits = 0
        return policy

    def _after_fit(self, now_s: float) -> Policy | None:
        if self._failed and self._failed_records < FAILED_RECORDS:
            before, self._failed = self.mode, False
            self._note_mode(before, "models fitted again", now_s)
        if self.mode is Mode.SWEEP:
            if self._published:
                return None
            return self._publish(now_s, self._round) if self._round else self._next_sweep_round(now_s)
        if self.mode is Mode.ACTIVE or self.mode is Mode.SHADOW:
            return self._decide(now_s) or self._publish_if_due(now_s)
        return self._publish_if_due(now_s)

    def _forget_models(self, now_s: float) -> None:
        """Begin with new models: what the present ones hold cannot be fitted or published."""
        before = self.mode
        self.models = ModelSet(self.settings, self.info)
        self._failed_refits = self._failed_publications = 0
        self._swept, self._round = False, ()
        self.models_forgotten += 1
        self._sweep = self._new_sweep()
        self._sweep_started_s, self._sweep_lost_s = None, 0.0
        self._trials.begin(())
        self._sweeping = self.request.plain_active
        self._sweep_due = not self._sweeping
        self.counters.event(now_s, "mode", f"{FAILED_REFITS} refits failed in a row: the models are forgotten")
        self._note_mode(before, self.reason, now_s)

    def _decide(self, now_s: float, first: str = "") -> Policy | None:
        """Propose a table, adopt it, and publish when the engine would choose differently or something must be probed.

        first: reason of a swap to the best K everywhere, whatever ran before; "": only where it gains enough.
        """
        forecast, traffic = self.models.forecast, self.models.traffic
        if forecast is None:
            return None
        proposal = self._decision.propose(forecast, traffic, now_s, bool(first))
        if first and proposal.swap is not None:
            proposal = replace(proposal, swap=first)
        if proposal.swap is None and self._trials.left > 0:
            return None  # let the probe finish
        ratio, version = self.counters.forecast_ratio(FORECAST_RATIO_STEPS), self._publisher.version + 1
        text = self._decision.adopt(proposal, traffic, version, ratio, now_s)
        if proposal.swap is not None:
            self.counters.count_swap(proposal.swap, now_s, text)
            return self._publish(now_s)
        if trials := self._control(forecast, proposal):
            policy = self._publish(now_s, trials)
            self._control_arm.begin(policy.version)
            return policy
        trials = self._probes(forecast, proposal)
        if trials or self._publisher.outdated(self.mode, self._decision.table, forecast):
            return self._publish(now_s, trials)
        return None

    def _control(self, forecast: Forecast, proposal: Proposal) -> tuple[Trial, ...]:
        """The launch K for some steps, to measure the gain over it, as far as the probing budget allows."""
        arm = self._control_arm
        if self.mode is not Mode.ACTIVE or self._engine_response.observe_only or not arm.due:
            return ()
        trial = arm.trial
        row, context = self._decision.entry(self.models.traffic)
        if trial.batch_size > self.info.max_batch or not self._decision.allowed[trial.batch_size, trial.k]:
            return ()  # the guard rails, or the engine, exclude the launch K
        k_now = int(self._decision.table[row, context])
        if k_now == trial.k and self.info.granularity is Granularity.BATCH:
            arm.count_same()
            return ()
        if trial.k > self._decision.verified[1]:
            return ()  # the guard rails exclude verifying all that is drafted
        now, launch = proposal.goodput[row, context, k_now], proposal.goodput[row, context, trial.k]
        loss = 1.0 - launch / now if now > 0.0 else 1.0
        return (trial,) if self._budget.affords(max(loss, 0.0), trial.steps, forecast.switch_s) else ()

    def _probes(self, forecast: Forecast, proposal: Proposal) -> tuple[Trial, ...]:
        """Trials of plans that may be better than the present one, as far as the budget allows."""
        traffic = self.models.traffic
        if (
            self.mode is not Mode.ACTIVE
            or self._engine_response.observe_only
            or traffic.batch_size == 0
            or self.counters.steps == 0
        ):
            return ()
        b, c = self._decision.entry(traffic)
        k_now, min_gain = int(self._decision.table[b, c]), self.settings.policy.min_gain + forecast.unrest
        plans = probe_plans(forecast, proposal.goodput, b, c, k_now, self.info.granularity, min_gain, self._decision.verified)
        return self._budget.choose(plans, forecast.switch_s)

    def _follow_swap(self, record: StepRecord, now_s: float) -> Policy | None:
        forecast = self.models.forecast
        if forecast is None or self.mode is not Mode.ACTIVE or record.flags & StepFlag.TRIAL:
            return None
        text = self._decision.follow(record, self.models.traffic.context, forecast, now_s)
        if not text:
            return None
        self.counters.count_swap("rollback", now_s, text)
        return self._publish(now_s)

    def _publish(self, now_s: float, trials: tuple[Trial, ...] = ()) -> Policy:
        self._trials.begin(trials)
        # In fallback the forecast may be what is wrong.
        forecast = None if self._failed else self.models.forecast
        survival = self.models.acceptance.survival if forecast is not None else self._untrained
        return self._publisher.publish(self.mode, self._acting, self._decision.table, forecast, survival, trials, now_s)

    @property
    def _published(self) -> bool:
        """Whether the latest policy is of the present mode and table."""
        last = self._publisher.latest
        return (
            last is not None
            and (last.mode, last.acting) == (self.mode, self._acting)
            and self._publisher.has_table(self._decision.table)
        )

    def _publish_if_due(self, now_s: float) -> Policy | None:
        return None if self._published else self._publish(now_s)

    # -- the sweep and its trials --------------------------------------------------------------------------------------

    def _follow_trials(self, record: StepRecord, now_s: float) -> Policy | None:
        begin = self._trials.left == 0 and self._sweep_started_s is None
        ended = self._trials.ended(record, self._publisher.version)
        if self.mode is not Mode.SWEEP:
            return None
        if self._trials.overdue:
            return self._publish(now_s, self._trials.trials)  # the publication was lost: again
        if begin or ended:
            return self._next_sweep_round(now_s)
        return None if self._affords(self._trials.next_steps(COMMITTED_STEPS + 1)) else self._cut_sweep(now_s)

    def _affords(self, steps: Sequence[Trial]) -> bool:
        """Whether what the sweep has lost and these trial steps are expected to lose is within its bound.

        An engine that holds a batch for a trial keeps requests waiting for it anyway: there the sweep has no bound.
        """
        if self.info.holds_batch:
            return True
        expected_s = sum(self.models.expected_trial_loss_s(trial) for trial in steps)
        bound_s = max(self.settings.sweep.max_loss_s, LEAST_LOSS_STEPS * self.models.best_step_s())
        return self._sweep_lost_s + expected_s <= bound_s

    def _new_sweep(self) -> Sweep:
        decision, threshold = self._decision, self.settings.latency.jump_threshold
        return Sweep(self.settings.sweep, self.info, threshold, decision.allowed, decision.verified)

    def _begin_sweep(self, reason: str, now_s: float) -> Policy | None:
        self._sweep = self._new_sweep()
        self._sweep_started_s, self._sweep_lost_s = None, 0.0
        before, self._sweeping, self._sweep_due = self.mode, True, False
        self._round = ()
        self._trials.begin(())
        self._note_mode(before, reason, now_s)
        return self._next_sweep_round(now_s)

    def _next_sweep_round(self, now_s: float) -> Policy | None:
        batch_size = self.models.traffic.batch_size
        if self._failed:
            return None  # after the next good refit
        if batch_size == 0 and not self.info.holds_batch:
            return None  # token counts depend on the batch: wait for the first step
        if self._sweep_started_s is None:
            self._sweep_started_s = now_s
        trials = self._sweep.next_round(self.models.measured_counts(), batch_size)
        if trials and not self._affords(trials[:1]):
            return self._cut_sweep(now_s)
        self._round = trials
        if trials:
            self._take_findings(self.models.learn_acceptance(), now_s)
            self.models.acceptance.refit()
            return self._publish(now_s, trials)
        return self._end_sweep("sweep done", now_s)

    def _cut_sweep(self, now_s: float) -> Policy:
        return self._end_sweep(f"sweep ended by its bound: {max(self._sweep_lost_s, 0.0):.1f} s lost", now_s)

    def _end_sweep(self, reason: str, now_s: float) -> Policy:
        self.counters.sweep_s += now_s - (self._sweep_started_s or now_s)
        self._sweep_version = self._publisher.version
        before, self._swept, self._sweeping = self.mode, True, False
        self._note_mode(before, reason, now_s)
        self._take_findings(self.models.fit(), now_s)
        decided = self._decide(now_s, first="sweep") if self.mode in (Mode.ACTIVE, Mode.SHADOW) else None
        return decided or self._publish(now_s)

    # -- what the engine does with policies ----------------------------------------------------------------------------

    @property
    def observe_only(self) -> bool:
        """Whether the mode is shown as SHADOW because the engine runs none of the policies made for it."""
        return self._engine_response.observe_only and self.mode is Mode.ACTIVE

    def _follow_engine_response(self, record: StepRecord, now_s: float) -> Policy | None:
        offered = self.latest_policy is not None and self.latest_policy.acting
        before = self.mode
        if not self._engine_response.changed(record, offered, now_s) or before not in (Mode.SWEEP, Mode.ACTIVE):
            return None
        if self._engine_response.observe_only:
            # Policies are still published, in case the engine begins to run them. Shown is SHADOW.
            self._sweeping = False
            self.counters.event(now_s, "mode", f"{before} → {Mode.SHADOW}: {OBSERVE_ONLY}")
            self._decision.stop_watching()
            self.reason = OBSERVE_ONLY
            self._next_refit_s = now_s
            return self._publish(now_s)
        reason = "the engine runs the policies made for it"
        if self._swept or not self.request.plain_active:
            self.counters.event(now_s, "mode", f"{Mode.SHADOW} → {self.mode}: {reason}")
            self.reason = reason
            return None
        self.counters.event(now_s, "mode", f"{Mode.SHADOW} → {Mode.SWEEP}: {reason}")
        self._sweeping = True
        return self._begin_sweep(reason, now_s)

    # -- commands ------------------------------------------------------------------------------------------------------

    def command(self, name: str, now_s: float, k: int | None = None) -> Policy | None:
        """Carry out an operator's command. Raises ValueError when it is unknown or its K is not one of the candidates."""
        if name == "pin" and (k is None or k not in self.info.candidates):
            raise ValueError(f"pin: K {k} is not one of {list(self.info.candidates)}")
        if name == "pin" and not self._decision.allowed[:, k].any():
            rails = self.settings.policy
            raise ValueError(f"pin: K {k} is outside of k_min..k_max = {rails.k_min}..{rails.k_max}")
        if name == "refit":
            return self.refit(now_s)
        if name == "resweep":
            if self.request.steering == "shadow":
                self.request = replace(self.request, steering=self.settings.mode)
            return self._begin_sweep("sweep asked for", now_s)
        return self._ask(self.request.after(name, k, self.settings.mode), f"{name} by command", now_s)

    def _ask(self, request: Request, reason: str, now_s: float) -> Policy | None:
        """Take a new request: the mode, the table and what is published follow."""
        before, was = self.mode, self.request
        self.request = request
        if self._sweeping and (self._swept or not request.plain_active):
            self._sweeping, self._sweep_due = False, not self._swept
        if request.plain_active and (self._sweep_due or (not self._swept and self.models.forecast is None)):
            return None if self._sweeping else self._begin_sweep("cold start", now_s)
        if request.pinned_k is not None:
            reason = f"pinned at K = {request.pinned_k}" if not request.paused else reason
            if self._decision.pin(request.pinned_k):
                self.counters.count_swap("pin", now_s, reason)
        self._note_mode(before, reason, now_s)
        if self.mode in (Mode.ACTIVE, Mode.SHADOW) and (request != was or before is not self.mode):
            self._take_findings(self.models.fit(), now_s)
            return self._decide(now_s, first="command") or self._publish(now_s)
        return self._publish_if_due(now_s)

    def fail(self, reason: str, now_s: float) -> Policy | None:
        """A call of the controller failed: no policy acts until a refit succeeds. Returns None when that is so already."""
        if self._failed:
            return self._publish_if_due(now_s)
        before, self._failed = self.mode, True
        self._note_mode(before, reason, now_s)
        self._next_refit_s = now_s + RECOVERY_REFITS * self.settings.refit_interval_s
        return self._publish(now_s)

    def record_failed(self, now_s: float) -> Policy | None:
        """`observe` raised: the record, if it is not counted yet, is counted as dropped. After `FAILED_RECORDS` in a row no
        policy acts.
        """
        self._failed_records += 1
        if not self._counted:
            self.counters.dropped["failed"] += 1
        if self._failed_records < FAILED_RECORDS:
            return None
        return self.fail(f"{FAILED_RECORDS} records in a row could not be learnt", now_s)

    def publication_failed(self, now_s: float) -> Policy | None:
        """The latest policy could not be published: no policy acts until one can."""
        self._failed_publications += 1
        if self._failed_publications >= FAILED_REFITS:
            self._forget_models(now_s)
        return self.fail("the policy could not be published", now_s)

    def published(self) -> None:
        """A policy of a good refit was published."""
        if not self._failed:
            self._failed_publications = 0

    def note_dropped(self, reason: str, count: int) -> None:
        self.counters.dropped[reason] += count

    def note_refit(self, model: str, seconds: float) -> None:
        self.counters.refits.setdefault(model, Histogram()).add(seconds)

    def resume_version(self, version: int) -> None:
        """Continue counting policies after `version`: versions never go back, whichever process published the last one."""
        self._publisher.resume(version)

    # -- state ---------------------------------------------------------------------------------------------------------

    def latency_state(self) -> dict[str, NDArray[Any]]:
        """Arrays of `latency_model.npz`."""
        return self.models.latency_state()

    def calibration_state(self) -> dict[str, NDArray[Any]]:
        """Arrays of `calibration.npz`."""
        return self.models.calibration_state()

    def restore_profile(self, latency: Mapping[str, NDArray[Any]], calibration: Mapping[str, NDArray[Any]]) -> None:
        """Begin from a profile, without a sweep. Raises ValueError, and changes nothing, when it does not fit this engine."""
        ModelSet(self.settings, self.info).take(latency, calibration)
        self.models.take(latency, calibration)
        self._swept, self._sweeping = True, False
        self.reason = "already profiled"

    def policy_summary(self) -> dict[str, Any]:
        """JSON form of the policy: for readers, and the table to restart with."""
        return {
            "version": self._publisher.version, "mode": str(self.mode), "reason": self.reason,
            "candidates": list(self.info.candidates),
            "k_by_batch_size": {str(b): k for b, k in self.k_by_batch_size().items()}, "table": self._decision.table.tolist(),
        }  # fmt: skip

    def state(self, profile: Models | None = None) -> dict[str, NDArray[Any]]:
        """Everything a restarted sidecar needs, as arrays. profile: models to write in place of the present ones."""
        models = self.models
        latency, calibration = profile or (models.latency_state(), models.calibration_state())
        swept = self._swept and bool(latency)
        return ControllerState(
            self.counters.state(), self.policy_summary(), swept, self.settings.mode, models.kv_per_request, models.batches,
            self._sweep.steps, self._engine_response.observe_only, latency, calibration,
            self.request, self._sweeping or self._sweep_due or not latency,
        ).arrays()  # fmt: skip

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Continue from `state()`. Raises ValueError when it is damaged or of another engine; use a fresh controller then."""
        state = ControllerState.of(arrays)
        table = state.table
        self.counters.restore({"sweep_steps": state.sweep_steps, **state.counters})  # older versions had it elsewhere
        if (
            len(table) != len(self._decision.table)
            or table.max() > self.info.max_k
            or state.batches.shape != self.models.batches.shape
        ):
            raise ValueError("checkpoint is of another engine: the K table does not fit")
        if state.swept or not state.sweeping:
            self.restore_profile(state.latency, state.calibration)
        # A mode that was changed in the configuration since wins over what the old process was asked for.
        self.request = state.request if state.configured_mode == self.settings.mode else Request(self.settings.mode)
        self._sweeping = state.sweeping and self.request.plain_active
        self._sweep_due = state.sweeping and not self._sweeping
        self.reason = "cold start" if self._sweeping else "continued from the checkpoint"
        self._decision.table = self._decision.runnable(table)
        if self.request.pinned_k is not None:
            self._decision.pin(self.request.pinned_k)
        self.models.batches, self.models.kv_per_request = state.batches, state.kv_per_request
        self._swept, self._sweep.steps = state.swept, state.sweep_steps
        self._engine_response = EngineResponse(state.observe_only)
        self.resume_version(state.policy_version)

    # -- what others read ----------------------------------------------------------------------------------------------

    @property
    def latest_policy(self) -> Policy | None:
        return self._publisher.latest

    def k_by_batch_size(self) -> dict[int, int]:
        """K of the table for batch sizes up to the power of two above the largest seen, at least 8. No series comes and goes."""
        self._largest_shown = max(self._largest_shown, 1 << (self.models.largest_batch + 1).bit_length())
        return self._decision.k_by_batch_size(self.models.traffic.context, self._largest_shown)

    def snapshot(self, now_s: float) -> Snapshot:
        """Immutable view for metrics and pages."""
        mode, reason = (Mode.SHADOW, OBSERVE_ONLY) if self.observe_only else (self.mode, self.reason)
        return build_snapshot(
            now_s, mode, reason, self.observe_only, self.k_by_batch_size(),
            info=self.info, models=self.models, counters=self.counters, publisher=self._publisher, sweep=self._sweep,
            considered=self._decision.considered,
            control_gain=self._control_arm.gain(), last_k=self._last_record.k if self._last_record else None,
        )  # fmt: skip
