"""The decision alone, on forecasts of numbers: when K changes, how long a change waits, and what a rollback forbids."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from adaptive_spec.config.settings import ControllerSettings, PolicySettings
from adaptive_spec.control.controller import Controller
from adaptive_spec.control.decision import ROLLBACK_HOLD_S, Decision
from adaptive_spec.control.guard_rails import SwapWatch
from adaptive_spec.control.publication import Publisher
from adaptive_spec.domain.policy import Mode
from adaptive_spec.domain.survival import SurvivalMap
from adaptive_spec.models.goodput import Forecast
from adaptive_spec.models.model_set import Traffic
from tests.support.numbers_engine import engine_info
from tests.support.wire import record_of

INFO = engine_info()
SETTINGS = PolicySettings(min_dwell_s=2.0, min_gain=0.02)
SURVIVAL = SurvivalMap(np.full((4, 64), 0.5, np.float32), True)


def forecast(*goodput: float) -> Forecast:
    """The same goodput, tokens/s by K, at every batch size."""
    shape = (INFO.max_batch + 1, 1, len(goodput))
    values = np.broadcast_to(np.array(goodput), shape).copy()
    return Forecast(
        values, np.zeros(shape), np.ones(shape), np.zeros((5, INFO.max_batch + 1)), np.ones(INFO.max_batch * 5 + 1),
        np.zeros(INFO.max_batch * 5 + 1), 0.0, np.zeros(0, np.float32), SURVIVAL, {}, 0.0, {},
        np.ones((INFO.max_batch + 1, 5), np.int64), (0.0,),
    )  # fmt: skip


def traffic(batch_size: int = 4) -> Traffic:
    batches = np.zeros(INFO.max_batch + 1)
    batches[batch_size] = 100.0
    return Traffic(batch_size, 0, batches, np.zeros_like(batches))


def swap(decision: Decision, goodput: Forecast, now_s: float, batch_size: int = 4) -> str | None:
    proposal = decision.propose(goodput, traffic(batch_size), now_s, False)
    decision.adopt(proposal, traffic(batch_size), 7, 1.0, now_s)
    return proposal.swap


FOUR, ONE = forecast(100, 100, 100, 100, 150), forecast(100, 200, 100, 100, 100)


def test_a_swap_waits_twice_as_long_after_every_swap_lately() -> None:
    decision = Decision(SETTINGS, INFO)
    assert swap(decision, FOUR, 0.0) == "gain"
    assert decision.table[4, 0] == 4
    assert swap(decision, ONE, 3.5) is None, "after one swap: min_dwell_s x 2, a little forgotten"
    assert decision.table[4, 0] == 4
    assert swap(decision, ONE, 4.1) == "gain"
    assert decision.table[4, 0] == 1
    assert swap(decision, FOUR, 4.1 + 5.0) is None, "after two: nearly x 4"
    assert swap(decision, FOUR, 4.1 + 8.0) == "gain"


@pytest.mark.parametrize("reason", ["sweep", "command"])
def test_no_swap_waits_because_of_a_sweep_or_a_command(reason: str) -> None:
    decision = Decision(SETTINGS, INFO)
    decision.note_drift(0.0)
    for _ in range(5):
        proposal = decision.propose(FOUR, traffic(), 1.0, True)
        decision.adopt(replace(proposal, swap=reason), traffic(), 7, 1.0, 1.0)
    assert decision.table[4, 0] == 4
    assert swap(decision, ONE, 1.1) == "gain", "what drifted before, the table knew"
    assert decision.table[4, 0] == 1


def test_a_batch_size_served_for_the_first_time_does_not_wait() -> None:
    decision = Decision(SETTINGS, INFO)
    swap(decision, FOUR, 0.0)
    assert swap(decision, ONE, 0.5, batch_size=6) == "gain"
    assert (decision.table[6, 0], decision.table[4, 0]) == (1, 4)


def test_a_gain_below_the_minimum_changes_nothing_except_at_the_end_of_the_sweep() -> None:
    decision = Decision(SETTINGS, INFO)
    small = forecast(100, 100, 100, 101, 100)
    assert decision.propose(small, traffic(), 0.0, False).table[4, 0] == INFO.launch_k
    first = decision.propose(small, traffic(), 0.0, True)
    assert (first.swap, first.table[4, 0]) == ("sweep", 3)


def test_a_drift_is_the_reason_of_the_next_swap_only() -> None:
    decision = Decision(SETTINGS, INFO)
    decision.note_drift(10.0)
    assert swap(decision, FOUR, 11.0) == "drift"
    assert swap(decision, ONE, 100.0) == "gain"


def test_the_rails_hold_for_every_table() -> None:
    decision = Decision(replace_rails(1, 3), INFO)
    for best in (FOUR, forecast(900, 1, 1, 1, 1)):
        assert set(np.unique(decision.propose(best, traffic(), 0.0, True).table[1:])) <= {1, 2, 3}
    for k, run in ((0, 1), (4, 3), (200, 3)):
        decision.pin(k)
        assert (decision.table[1:] == run).all()
    assert not decision.pin(4), "the same table"


def replace_rails(k_min: int, k_max: int) -> PolicySettings:
    return SETTINGS.model_copy(update={"k_min": k_min, "k_max": k_max})


def test_a_swap_that_measures_worse_is_taken_back_and_not_chosen_again_for_a_while() -> None:
    decision = Decision(SETTINGS, INFO)
    swap(decision, FOUR, 0.0)
    step = replace(record_of(1), policy_version=7, step_s=1.0)
    step = replace(step, batch_size=4, accept_len=step.accept_len[:4], verify_len=step.verify_len[:4])
    older = replace(step, policy_version=6)
    worse = forecast(*[step.output_tokens * 10.0] * 5)
    for _ in range(SwapWatch.MIN_STEPS):
        assert not decision.follow(older, 0, worse, 5.0), "a step of the policy before"
    said = [decision.follow(step, 0, worse, 5.0) for _ in range(SwapWatch.MIN_STEPS)]
    assert said[-1].startswith("rolled back at batch 4: measured 10%")
    assert not any(said[:-1])
    assert decision.table[4, 0] == INFO.launch_k
    assert swap(decision, FOUR, 5.0 + ROLLBACK_HOLD_S - 0.1) is None
    assert swap(decision, FOUR, 5.0 + ROLLBACK_HOLD_S) == "gain"


@pytest.mark.parametrize("reason", ["sweep", "command"])
def test_what_was_asked_for_is_never_taken_back(reason: str) -> None:
    decision = Decision(SETTINGS, INFO)
    swap(decision, FOUR, 0.0)
    proposal = replace(decision.propose(ONE, traffic(), 1.0, True), swap=reason)
    assert decision.adopt(proposal, traffic(), 8, 1.0, 1.0) == f"K 4→1 at batch 4: {reason}, +100.0% expected"
    step = replace(record_of(1), policy_version=8, step_s=1.0)
    step = replace(step, batch_size=4, accept_len=step.accept_len[:4], verify_len=step.verify_len[:4])
    worse = forecast(*[step.output_tokens * 10.0] * 5)
    assert not any(decision.follow(step, 0, worse, 5.0) for _ in range(SwapWatch.MIN_STEPS))
    assert decision.table[4, 0] == 1


def test_versions_rise_and_a_policy_is_outdated_by_what_would_change_a_choice() -> None:
    decision, publisher = Decision(SETTINGS, INFO), Publisher(INFO, Decision(SETTINGS, INFO).allowed, 0.02)
    assert publisher.outdated(Mode.ACTIVE, decision.table, FOUR)
    publisher.resume(41)
    publisher.resume(5)
    policy = publisher.publish(Mode.ACTIVE, True, decision.table, FOUR, SURVIVAL, (), 1.0)
    assert (policy.version, publisher.time_s) == (42, 1.0)
    assert publisher.has_table(decision.table)
    assert not publisher.outdated(Mode.ACTIVE, decision.table, FOUR)
    assert publisher.outdated(Mode.ACTIVE, decision.table + np.uint8(1), FOUR)
    slower, slightly = replace(FOUR, verify_s=FOUR.verify_s * 1.01), replace(FOUR, verify_s=FOUR.verify_s * 1.004)
    assert publisher.outdated(Mode.ACTIVE, decision.table, slower)
    assert not publisher.outdated(Mode.SHADOW, decision.table, slower), "nobody acts on its times"
    assert not publisher.outdated(Mode.ACTIVE, decision.table, slightly)
    surer = replace(FOUR, survival=SurvivalMap(SURVIVAL.table + np.float32(0.02), True))
    assert publisher.outdated(Mode.ACTIVE, decision.table, surer)
    assert publisher.outdated(Mode.ACTIVE, decision.table, replace(FOUR, switch_s=0.001))


def test_a_policy_carries_the_rails() -> None:
    publisher = Publisher(INFO, Decision(SETTINGS, INFO).allowed, 0.02, k_min=1, k_max=3)
    policy = publisher.publish(Mode.ACTIVE, True, Decision(SETTINGS, INFO).table, FOUR, SURVIVAL, (), 1.0)
    assert (policy.k_min, policy.k_max) == (1, 3)
    one = Controller(ControllerSettings(policy=PolicySettings(k_min=1, k_max=3)), INFO).tick(0.0)
    assert one is not None
    assert (one.k_min, one.k_max) == (1, 3)


@pytest.mark.parametrize(("slo_tpot_ms", "k"), [(35.0, 1), (60.0, 4)])
def test_a_target_leaves_out_the_k_whose_slowest_request_misses_it(slo_tpot_ms: float, k: int) -> None:
    """At batch 4: K 4 takes 4 / (150 x 0.5) = 53 ms per token of the slowest request, K 1 takes 33 ms, the others 40 ms."""
    goodput = replace(forecast(100, 120, 100, 100, 150), slowest_share=np.array([1.0, 1.0, 1.0, 1.0, 0.5]))
    decision = Decision(SETTINGS.model_copy(update={"slo_tpot_ms": slo_tpot_ms}), INFO)
    assert decision.propose(goodput, traffic(), 0.0, True).table[4, 0] == k


@pytest.mark.parametrize(("steps", "reason"), [(1.0, None), (3.0, "gain")])
def test_a_batch_size_with_less_than_two_percent_of_the_steps_makes_no_swap(steps: float, reason: str | None) -> None:
    decision = Decision(SETTINGS, INFO)
    swap(decision, FOUR, 0.0, batch_size=6)
    swap(decision, FOUR, 0.0)
    goodput = FOUR.goodput.copy()
    goodput[6] = ONE.goodput[6]
    seldom = traffic()
    seldom.batches[6] = steps
    assert decision.propose(replace(FOUR, goodput=goodput), seldom, 100.0, False).swap == reason
