from __future__ import annotations

import numpy as np
import pytest

from adaptive_spec.drift import DriftDetector


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
