from __future__ import annotations

import numpy as np
import pytest

from adaptive_spec.models.drift import DriftDetector, TrafficChange, TrafficDetector


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


def test_infinite_residuals_leave_it_working() -> None:
    detector = DriftDetector()
    for _ in range(40):
        detector.update(float("inf"))
    noise = np.random.default_rng(0).standard_normal(4000)
    assert sum(detector.update(float(x)) for x in noise) <= 2


Steps = list[tuple[list[float], list[int]]]


def traffic(rng: np.random.Generator, mean: float, steps: int, batch_size: int = 3, first_id: int = 0) -> Steps:
    """Confidences and ids of requests that last some 40 steps, each with a level of its own for as long as it lasts."""
    level = rng.normal(mean, 0.1, batch_size)
    ids = first_id + np.arange(batch_size)
    rows: Steps = []
    for _ in range(steps):
        ended = rng.random(batch_size) < 1 / 40
        level[ended] = rng.normal(mean, 0.1, int(ended.sum()))
        ids[ended] = ids.max() + 1 + np.arange(int(ended.sum()))
        rows.append((np.clip(level + rng.normal(0.0, 0.25, batch_size), 0.0, 1.0).tolist(), ids.tolist()))
    return rows


def changes_in(detector: TrafficDetector, steps: Steps) -> list[tuple[int, TrafficChange]]:
    seen = ((step, detector.update(*row)) for step, row in enumerate(steps))
    return [(step, change) for step, change in seen if change is not None]


@pytest.mark.parametrize("batch_size", [1, 3, 32])
@pytest.mark.parametrize("seed", range(3))
def test_requests_that_differ_are_no_change_of_traffic(seed: int, batch_size: int) -> None:
    steps = traffic(np.random.default_rng(seed), 0.55, 20_000, batch_size)
    assert len(changes_in(TrafficDetector(), steps)) <= 1


@pytest.mark.parametrize("after", [0.35, 0.75])
def test_other_traffic_is_a_change_with_its_means(after: float) -> None:
    rng = np.random.default_rng(5)
    detector = TrafficDetector()
    changes_in(detector, traffic(rng, 0.55, 1500))
    (step, change), *later = changes_in(detector, traffic(rng, after, 800, first_id=1_000_000))
    assert not later
    assert step <= 600
    assert change.before == pytest.approx(0.55, abs=0.06)
    assert change.after == pytest.approx(after, abs=0.08)


def test_requests_in_bursts_of_a_kind_are_no_change_for_long() -> None:
    rng = np.random.default_rng(0)
    detector = TrafficDetector()
    bursts = [traffic(rng, rng.choice([0.5, 0.62]), 80, 4, 1000 * i) for i in range(1000)]
    alarms = sum(len(changes_in(detector, burst)) for burst in bursts)
    assert alarms <= 12


def test_one_long_request_gives_one_sample() -> None:
    detector = TrafficDetector()
    rng = np.random.default_rng(0)
    changes_in(detector, traffic(rng, 0.55, 2000))
    assert not changes_in(detector, [([0.95], [7_000_000])] * 2000)
