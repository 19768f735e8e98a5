"""What a change of K costs, learnt from the steps around it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest

from adaptive_spec.domain.policy import Granularity
from adaptive_spec.domain.step_record import StepFlag, StepRecord
from adaptive_spec.models.latency.speed_factor import SpeedFactor
from adaptive_spec.models.latency.switch_cost import MEMORY_SAMPLES, MIN_SAMPLES, SwitchCost


def step(number: int, k: int, step_s: float, batch_size: int = 4, flags: int = 0, verify_s: float = 0.005) -> StepRecord:
    lengths = np.zeros(batch_size, np.uint8)
    return StepRecord(
        number, 0, 0, 1, batch_size, batch_size, batch_size, k, flags, 0.0, verify_s, 0.0, step_s, np.zeros((0, 0), np.float32),
        lengths, lengths, np.zeros(batch_size, np.uint32),
    )  # fmt: skip


def steps(cost_s: float, count: int = 900, noise: float = 0.03, spikes: float = 0.0, scale: float = 1.0) -> Iterator[StepRecord]:
    """K changes every third step; a step with K takes 10 + K ms."""
    rng = np.random.default_rng(1)
    for i in range(count):
        k = i // 3 % 2
        spike = 5.0 if rng.random() < spikes else 1.0
        step_s = (0.010 + 0.001 * k) * math.exp(rng.normal(0.0, noise)) * spike + cost_s * (i % 3 == 0)
        yield step(i + 1, k, step_s * scale)


def learnt(records: Iterator[StepRecord], speed: float = 0.0, granularity: Granularity = Granularity.BATCH) -> SwitchCost:
    factor = SpeedFactor()
    factor.value = speed
    cost = SwitchCost(granularity, factor)
    for record in records:
        cost.observe(record)
    cost.refit()
    return cost


@pytest.mark.parametrize("spikes", [0.0, 0.02])
def test_the_cost_is_found_whatever_each_k_takes_and_despite_spikes(spikes: float) -> None:
    cost = learnt(steps(0.0003, spikes=spikes))
    assert cost.seconds == pytest.approx(0.0003, rel=0.25)
    assert cost.measured_s == cost.seconds
    assert cost.error_s is not None
    assert 0.0 < cost.error_s < 0.00005


def test_without_a_cost_nothing_is_charged() -> None:
    cost = learnt(steps(0.0))
    assert cost.mean_s is not None
    assert cost.mean_s < 0.0001
    assert cost.seconds == 0.0


def test_nothing_is_said_before_enough_samples() -> None:
    cost = learnt(steps(0.01, count=3 * MIN_SAMPLES))
    assert (cost.measured_s, cost.seconds) == (None, 0.0)


def test_the_cost_follows_the_speed_factor() -> None:
    cost = learnt(steps(0.0003, scale=2.0), speed=math.log(2.0))
    assert cost.mean_s == pytest.approx(0.0003, rel=0.25)
    assert cost.seconds == pytest.approx(0.0006, rel=0.25)


@pytest.mark.parametrize("spoilt", ["batch", "disturbed", "lost"])
def test_steps_that_differ_by_more_than_k_are_left_out(spoilt: str) -> None:
    def records() -> Iterator[StepRecord]:
        for i, record in enumerate(steps(0.0)):
            late = step(record.step + (i // 3 if spoilt == "lost" else 0), record.k, record.step_s + 0.01 * (i % 3 == 0),
                        4 + (i // 3 % 2 if spoilt == "batch" else 0),
                        int(StepFlag.DISTURBED) if spoilt == "disturbed" and i % 3 == 0 else 0)  # fmt: skip
            yield late

    assert learnt(records()).measured_s is None


def test_with_ragged_verification_the_verify_time_does_not_count() -> None:
    def records() -> Iterator[StepRecord]:
        rng = np.random.default_rng(2)
        for record in steps(0.0003, noise=0.0):
            verify_s = float(rng.uniform(0.0, 0.02))
            yield step(record.step, record.k, record.step_s + verify_s, verify_s=verify_s)

    assert learnt(records(), granularity=Granularity.REQUEST).seconds == pytest.approx(0.0003)


def test_it_says_which_step_follows_a_change() -> None:
    cost = SwitchCost(Granularity.BATCH, SpeedFactor())
    assert [cost.observe(record) for record in steps(0.0, count=9)] == [False] * 3 + [True, False, False] * 2


def test_the_state_comes_back_and_a_damaged_one_is_refused() -> None:
    cost = learnt(steps(0.0003))
    again = SwitchCost(Granularity.BATCH, SpeedFactor())
    again.restore(cost.state())
    assert again.seconds == cost.seconds > 0.0
    for damaged in (np.zeros((2, 2)), np.array([np.nan]), np.zeros(MEMORY_SAMPLES + 1)):
        with pytest.raises(ValueError, match="switch_cost"):
            again.restore(damaged)
