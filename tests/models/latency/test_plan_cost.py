from __future__ import annotations

import numpy as np
import pytest

from adaptive_spec.models.latency.plan_cost import PlanCostModel, non_negative_least_squares
from adaptive_spec.models.latency.speed_factor import SpeedFactor


def test_plan_costs_generalise_to_plans_never_run() -> None:
    rng = np.random.default_rng(6)
    model = PlanCostModel(64, 64, SpeedFactor())
    for step in range(3000):
        k, b = int(rng.choice([1, 3, 5])), int(rng.choice([1, 4, 16, 32]))
        model.observe(k, b, (0.0002 + 0.0004 * k + 1e-5 * k * b) * float(np.exp(rng.normal(0, 0.03))), step)
    model.refit()
    seconds, error_s = model.predict(7, 64)
    error = error_s / np.maximum(seconds, 1e-9)
    assert seconds[7, 24] == pytest.approx(0.0002 + 0.0028 + 1e-5 * 7 * 24, rel=0.1)
    assert error[7, 24] == pytest.approx(np.hypot(0.08, 0.15 * np.log2(32 / 24)))
    assert error[3, 4] < 0.03
    assert error[3, 64] > error[3, 32] + 0.05


def test_a_large_batch_is_not_charged_for_what_small_ones_cannot_tell() -> None:
    rng = np.random.default_rng(9)
    model = PlanCostModel(64, 256, SpeedFactor())
    for step in range(600):
        k = int(rng.integers(1, 4))
        model.observe(k, 2, (0.0002 + 0.0017 * k) * float(np.exp(rng.normal(0, 0.03))), step)
    model.refit()
    seconds, error_s = model.predict(3, 256)
    error = error_s / np.maximum(seconds, 1e-9)
    assert seconds[3, 2] == pytest.approx(0.0053, rel=0.03)
    assert seconds[3, 128] < 2.5 * seconds[3, 2]
    assert error[3, 128] > 0.5


def test_an_absent_stage_costs_nothing() -> None:
    model = PlanCostModel(64, 8, SpeedFactor())
    for step in range(50):
        model.observe(step % 4, 2, 0.0, step)
    model.refit()
    assert model.predict(7, 8)[0].max() < 1e-5


def test_non_negative_least_squares_matches_projection() -> None:
    system = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    found = non_negative_least_squares(system.T @ system, system.T @ np.array([3.0, 2.0, 1.0]))
    assert found == pytest.approx([2.0, 0.0], abs=1e-9)
