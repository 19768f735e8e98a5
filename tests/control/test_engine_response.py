from __future__ import annotations

import dataclasses

import pytest

from adaptive_spec.control.engine_response import (
    ADOPTION_STEPS,
    OBSERVE_ONLY_S,
    OBSERVE_ONLY_STEPS,
    EngineResponse,
    PendingTrials,
)
from adaptive_spec.domain.policy import TRIAL_PATIENCE_STEPS, Granularity, Trial
from adaptive_spec.domain.step_record import StepFlag, StepRecord
from tests.support.simulated_server import SimulatedServer, engine_info, staircase

RECORD = SimulatedServer(engine_info(Granularity.BATCH), staircase()).step()


def step(version: int, flags: int = 0) -> StepRecord:
    return dataclasses.replace(RECORD, policy_version=version, flags=flags)


def fed(
    engine_response: EngineResponse, record: StepRecord, steps: int, now_s: float, step_s: float = 0.1, offered: bool = True
) -> float:
    """Feed the same step again and again; returns the time after them."""
    for _ in range(steps):
        engine_response.changed(record, offered, now_s)
        now_s += step_s
    return now_s


def test_steps_by_no_policy_tell_that_none_is_run() -> None:
    engine_response = EngineResponse()
    changes = [engine_response.changed(step(0), True, 0.1 * i) for i in range(OBSERVE_ONLY_STEPS + 50)]
    assert [i for i, changed in enumerate(changes) if changed] == [OBSERVE_ONLY_STEPS - 1]
    assert engine_response.observe_only


def test_one_step_by_a_policy_tells_that_it_is_run() -> None:
    engine_response = EngineResponse()
    now_s = fed(engine_response, step(0), OBSERVE_ONLY_STEPS - 1, 0.0)
    assert not engine_response.changed(step(4), True, now_s), "nothing new"
    now_s = fed(engine_response, step(0), OBSERVE_ONLY_STEPS - 1, now_s)
    assert not engine_response.observe_only, "it counts from the beginning"
    assert engine_response.changed(step(0), True, now_s)
    assert engine_response.changed(step(4), True, now_s), "and once more the other way"
    assert not engine_response.observe_only


def test_a_backlog_tells_nothing() -> None:
    engine_response = EngineResponse()
    fed(engine_response, step(0), 2000, 0.0, step_s=0.0)
    assert not engine_response.observe_only
    engine_response.changed(step(4), True, 100.0)
    fed(engine_response, step(0), 2000, 100.0, step_s=0.9 * OBSERVE_ONLY_S / 2000)
    assert not engine_response.observe_only


def test_an_idle_engine_tells_nothing() -> None:
    engine_response = EngineResponse()
    now_s = fed(engine_response, step(0), OBSERVE_ONLY_STEPS // 2, 0.0)
    assert not engine_response.changed(step(0), True, now_s + 3600.0)


@pytest.mark.parametrize(("flags", "offered"), [(StepFlag.FALLBACK, True), (0, False)])
def test_without_a_policy_to_run_nothing_is_told(flags: int, offered: bool) -> None:
    engine_response = EngineResponse()
    fed(engine_response, step(0, flags), 10 * OBSERVE_ONLY_STEPS, 0.0, offered=offered)
    assert not engine_response.observe_only


def test_trials_end_when_they_were_run() -> None:
    trials = PendingTrials()
    trials.begin((Trial(0, 1, 0, 2), Trial(0, 3, 0, 1)))
    run = step(5, StepFlag.TRIAL)
    assert trials.left == 3
    assert [trials.ended(r, 5) for r in (run, step(4, StepFlag.TRIAL), run, step(5), run, run)] == [
        False, False, False, False, True, False,
    ]  # fmt: skip


def test_trials_end_when_the_planner_skips_them() -> None:
    trials = PendingTrials()
    trials.begin((Trial(9, 1, 0, 2),))
    ends = [trials.ended(step(5), 5) for _ in range(TRIAL_PATIENCE_STEPS + 9)]
    assert [i for i, end in enumerate(ends) if end] == [TRIAL_PATIENCE_STEPS + 8]


def test_trials_of_a_policy_that_no_step_carries_are_overdue() -> None:
    trials = PendingTrials()
    trials.begin((Trial(0, 1, 0, 2),))
    assert not any(trials.ended(step(4), 5) for _ in range(ADOPTION_STEPS - 1))
    assert trials.ended(step(4), 5)
    assert trials.overdue
    trials.begin(trials.trials)
    assert (trials.left, trials.overdue) == (2, False)
    for _ in range(ADOPTION_STEPS - 1):
        trials.ended(step(4), 5)
    trials.ended(step(5), 5)
    assert not trials.ended(step(4), 5), "counted from the beginning: the policy was run"


def test_the_next_trial_steps_are_those_that_no_record_was_seen_of() -> None:
    first, second = Trial(0, 1, 0, 2), Trial(0, 5, 0, 1)
    trials = PendingTrials()
    assert trials.next_steps(2) == []
    trials.begin((first, second))
    assert trials.next_steps(2) == [first, first]
    trials.ended(step(7, int(StepFlag.TRIAL)), 7)
    assert trials.next_steps(2) == [first, second]
    trials.ended(step(7, int(StepFlag.TRIAL)), 7)
    assert trials.next_steps(2) == [second]
