from __future__ import annotations

import pytest

from adaptive_spec.control.probing import ProbeBudget, ProbeCandidate
from adaptive_spec.domain.policy import Trial


def earned(share: float, steps: int) -> ProbeBudget:
    budget = ProbeBudget(share)
    for _ in range(steps):
        budget.earn(0.02)
    return budget


def test_budget_is_earned_spent_and_does_not_pile_up() -> None:
    budget = ProbeBudget(0.01)
    for _ in range(100_000):
        budget.earn(0.02)
    full = 0.01 * ProbeBudget.MEMORY_STEPS * 0.02
    assert budget.credit_s == pytest.approx(full)
    budget.spend(0.15)
    assert budget.credit_s == pytest.approx(full - 0.15)
    budget.grant(1000)
    assert budget.credit_s == pytest.approx(full)


def test_steps_in_which_nothing_may_be_probed_save_nothing() -> None:
    budget = ProbeBudget(0.01)
    for _ in range(10_000):
        budget.earn(0.02, False)
    assert budget.credit_s == 0.0
    budget.grant(10)
    assert budget.credit_s == pytest.approx(10 * 0.02), "the length of a step is known all the same"


def test_no_budget_means_no_probe_even_after_drift() -> None:
    budget = ProbeBudget(0.0)
    budget.earn(1000.0)
    budget.grant(10)
    assert budget.credit_s == 0.0


def test_the_largest_possible_gain_per_cost_is_probed_first() -> None:
    small, large = ProbeCandidate(1.1, 0.1, Trial(8, 2, 0, 3)), ProbeCandidate(1.5, 0.1, Trial(8, 4, 0, 3))
    budget = earned(0.01, 10_000)
    assert budget.choose([small, large]) == (large.trial, small.trial)


def test_an_expensive_probe_in_front_is_saved_for() -> None:
    cheap, expensive = ProbeCandidate(1.01, 0.02, Trial(8, 2, 0, 3)), ProbeCandidate(9.0, 1.0, Trial(8, 7, 0, 3))
    budget = earned(0.01, 150)
    assert budget.choose([cheap]) == (cheap.trial,), "alone it is within the budget"
    assert budget.choose([cheap, expensive]) == (), "3 whole steps are more than 1.5 steps of budget"
    assert budget.choose([cheap, expensive]) == ()


def test_a_probe_beyond_any_budget_is_skipped() -> None:
    cheap, impossible = ProbeCandidate(1.01, 0.02, Trial(8, 2, 0, 3)), ProbeCandidate(9.0, 1.0, Trial(8, 7, 0, 30))
    assert earned(0.01, 10_000).choose([cheap, impossible]) == (cheap.trial,)


def test_grants_are_advances_on_the_same_share() -> None:
    budget = earned(0.01, 10)
    spent_s = 0.0
    for step in range(20_000):
        budget.earn(0.02)
        if step % 50 == 0:
            budget.grant(10)
            lost_s = max(budget.credit_s, 0.0)
            budget.spend(lost_s)
            spent_s += lost_s
    assert spent_s <= 0.01 * 20_010 * 0.02 + 10 * 0.02 + 1e-9, "the long-run budget and one advance"
    assert spent_s > 0.9 * 0.01 * 20_000 * 0.02
