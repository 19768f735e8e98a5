from __future__ import annotations

import math

import numpy as np
import pytest

from adaptive_spec.models.latency.speed_factor import SHIFT_SAMPLES, WINDOW, SpeedFactor

SIGMA = 0.03


def follow(speed_factor: SpeedFactor, true: np.ndarray, rng: np.random.Generator, noise: float = SIGMA) -> int:
    """Feed residuals of machines whose speed factor is `true` [n]; returns how often a shift was announced."""
    shifts = 0
    for value in true:
        speed_factor.follow(float(value - speed_factor.value + rng.normal(0.0, noise)), SIGMA)
        shifts += speed_factor.shift() is not None
    return shifts


def test_a_jump_is_followed_within_two_windows_and_is_announced_once() -> None:
    rng = np.random.default_rng(0)
    speed_factor = SpeedFactor()
    assert follow(speed_factor, np.zeros(400), rng) == 0
    follow(speed_factor, np.full(2 * WINDOW, 0.3), rng)
    assert speed_factor.value == pytest.approx(0.3, abs=0.03)
    assert follow(speed_factor, np.full(400, 0.3), rng) == 1


def test_a_slow_drift_is_followed_and_noise_is_averaged_out() -> None:
    rng = np.random.default_rng(1)
    speed_factor = SpeedFactor()
    assert follow(speed_factor, np.zeros(2000), rng) == 0
    assert abs(speed_factor.value) < SIGMA / 3
    follow(speed_factor, np.linspace(0.0, 0.2, 1000), rng)
    assert speed_factor.value == pytest.approx(0.2, abs=0.03)


def test_a_burst_shorter_than_shift_samples_is_not_announced() -> None:
    rng = np.random.default_rng(2)
    speed_factor = SpeedFactor()
    follow(speed_factor, np.zeros(300), rng)
    assert follow(speed_factor, np.concatenate((np.full(SHIFT_SAMPLES - WINDOW, 0.4), np.zeros(300))), rng) == 0
    assert abs(speed_factor.value) < 0.02


def test_spikes_move_nothing() -> None:
    rng = np.random.default_rng(3)
    speed_factor = SpeedFactor()
    for _ in range(3000):
        spike = math.log(5.0) if rng.random() < 0.02 else 0.0
        speed_factor.follow(float(rng.normal(0.0, SIGMA)) + spike - speed_factor.value, SIGMA)
    assert abs(speed_factor.value) < 0.01


def test_a_slowness_that_comes_and_goes_is_unrest_and_a_lasting_one_is_not() -> None:
    rng = np.random.default_rng(4)
    lasting = SpeedFactor()
    follow(lasting, np.repeat([0.0, 0.4], 100), rng)
    assert lasting.unrest == 0.0
    bursts = SpeedFactor()
    follow(bursts, np.tile(np.repeat([0.0, 0.4], 40), 5), rng)
    assert bursts.unrest == pytest.approx(0.4, abs=0.1)
    follow(bursts, np.zeros(600), rng)
    assert bursts.unrest == 0.0, "forgotten"


def test_a_jump_of_the_base_is_not_followed_a_second_time() -> None:
    rng = np.random.default_rng(5)
    base = SpeedFactor()
    stage = SpeedFactor(base)
    for value in np.repeat([0.0, 1.0], 60):
        for factor in (base, stage):
            factor.follow(float(value - factor.value + rng.normal(0.0, SIGMA)), SIGMA)
        assert stage.value < 1.2
    assert stage.value == pytest.approx(1.0, abs=0.05)
