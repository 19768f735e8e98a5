from __future__ import annotations

import numpy as np
import pytest

from adaptive_spec.drift import DriftDetector, TrafficDetector


@pytest.mark.parametrize("seed", range(4))
def test_no_alarm_in_noise(seed: int) -> None:
    detector = DriftDetector()
    noise = np.random.default_rng(seed).standard_normal(10_000)
    assert sum(detector.update(float(x)) for x in noise) == 0


@pytest.mark.parametrize(("shift", "within"), [(1.0, 200), (-1.0, 200), (3.0, 60), (0.4, 1500)])
def test_a_shift_is_one_alarm_in_time(shift: float, within: int) -> None:
    rng = np.random.default_rng(11)
    detector = DriftDetector()
    for x in rng.standard_normal(2000):
        assert not detector.update(float(x))
    alarms = [i for i, x in enumerate(rng.standard_normal(within) + shift) if detector.update(float(x))]
    assert len(alarms) == 1


def test_infinite_residuals_do_not_poison_it() -> None:
    detector = DriftDetector()
    for _ in range(40):
        detector.update(float("inf"))
    noise = np.random.default_rng(0).standard_normal(4000)
    assert sum(detector.update(float(x)) for x in noise) <= 2


def confidences(rng: np.random.Generator, mean: float, steps: int, batch_size: int = 3) -> np.ndarray:
    """Mean over a batch of requests that last some 40 steps, each with a level of its own for as long as it lasts."""
    level = rng.normal(mean, 0.1, batch_size)
    values = np.empty(steps)
    for step in range(steps):
        ended = rng.random(batch_size) < 1 / 40
        level[ended] = rng.normal(mean, 0.1, int(ended.sum()))
        values[step] = np.clip(level + rng.normal(0.0, 0.25, batch_size), 0.0, 1.0).mean()
    return values


@pytest.mark.parametrize("seed", range(4))
def test_requests_that_differ_are_no_change_of_traffic(seed: int) -> None:
    detector = TrafficDetector()
    values = confidences(np.random.default_rng(seed), 0.55, 20_000)
    assert sum(detector.update(float(x)) is not None for x in values) <= 2


@pytest.mark.parametrize("after", [0.4, 0.7])
def test_other_traffic_is_a_change_with_its_means(after: float) -> None:
    rng = np.random.default_rng(5)
    detector = TrafficDetector()
    for x in confidences(rng, 0.55, 2000):
        detector.update(float(x))
    changes = [change for x in confidences(rng, after, 1000) if (change := detector.update(float(x))) is not None]
    assert changes
    assert changes[0].before == pytest.approx(0.55, abs=0.06)
    assert changes[0].after == pytest.approx(after, abs=0.08)
