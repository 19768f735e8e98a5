"""Time per output token of single requests, and the K that keeps the slowest one within a target."""

from __future__ import annotations

import numpy as np
import pytest

from adaptive_spec.config.settings import ControllerSettings, PolicySettings
from adaptive_spec.control.guard_rails import within_target
from adaptive_spec.domain.policy import Granularity
from adaptive_spec.domain.step_record import StepRecord
from adaptive_spec.models.token_times import TokenTimes
from tests.support.simulated_server import SimulatedServer, engine_info, staircase


def record(ids: list[int], accepted: list[int], k: int = 3, step_s: float = 0.02) -> StepRecord:
    b = len(ids)
    return StepRecord(
        1, 0, 100, 1, b * (k + 1), b * (k + 1), b, k, 0, 0.001, 0.015, 0.0, step_s, np.full((b, k), 0.5, np.float32),
        np.full(b, k, np.uint8), np.array(accepted, np.uint8), np.array(ids, np.uint32),
    )  # fmt: skip


def test_a_request_that_ends_has_the_time_of_its_steps_over_its_tokens() -> None:
    times = TokenTimes(3, 0.012)
    assert times.observe(record([1, 2], [3, 0])) == []
    assert times.observe(record([1, 2], [1, 0])) == []
    assert sorted(times.observe(record([3], [0]))) == pytest.approx([0.04 / 6, 0.04 / 2])
    assert times.within([0.04 / 6, 0.04 / 2]) == (1, 1)


def test_the_slowest_request_is_the_one_whose_drafts_are_rejected() -> None:
    times = TokenTimes(3, 0.012)
    for _ in range(200):
        times.observe(record([1, 2, 3, 4], [3, 3, 3, 0]))
    share = times.slowest_share()
    assert share[0] == 1.0
    assert (np.diff(share) < 0.0).all()
    mean = (3 * 4 + 1) / 4
    assert share[3] == pytest.approx(1.0 / mean, rel=0.25)  # shrunk towards the others


def test_without_requests_or_drafts_every_request_is_the_mean_one() -> None:
    assert TokenTimes(3, 1.0).slowest_share().tolist() == [1.0] * 4
    assert TokenTimes(0, 1.0).slowest_share().tolist() == [1.0]


def test_of_the_k_within_the_target_goodput_decides_and_where_there_is_none_the_fastest() -> None:
    goodput = np.array([[[100.0, 120.0, 140.0, 0.0]]])
    seconds = np.array([[[0.010, 0.012, 0.020, 0.001]]])
    assert within_target(goodput, seconds, 0.015).tolist() == [[[100.0, 120.0, 0.0, 0.0]]]
    assert within_target(goodput, seconds, 0.005).tolist() == [[[100.0, 0.0, 0.0, 0.0]]]
    assert within_target(goodput, seconds, 1.0).tolist() == goodput.tolist()


def swept(slo_tpot_ms: float | None) -> SimulatedServer:
    settings = ControllerSettings(policy=PolicySettings(slo_tpot_ms=slo_tpot_ms))
    s = SimulatedServer(
        engine_info(Granularity.BATCH, holds_batch=True), staircase(), accept=0.9, batch_size=30, settings=settings
    )
    s.run(1500)
    return s


def test_a_target_shortens_the_draft_that_goodput_alone_would_take() -> None:
    free = swept(None)
    k_free = free.controller.k_by_batch_size()[30]
    considered = free.controller.snapshot(free.now_s).considered
    assert considered is not None
    assert free.controller.models.token_times is None
    forecast = considered.forecast
    # Every request is like the others here, so a longer draft is faster for each: only an impossible target changes K.
    seconds = forecast.seconds_per_token()[30, 0]
    assert seconds.argmin() == k_free
    bound = swept(1e3 * float(seconds[k_free]) * 0.2)
    snapshot = bound.controller.snapshot(bound.now_s)
    assert snapshot.slo_requests["beyond"] + snapshot.slo_requests["within"] >= 0
    latest = bound.controller.latest_policy
    assert latest is not None
    assert latest.min_gain == 1.0, "the step choice is off"
    assert snapshot.slo_tpot_s == pytest.approx(float(seconds[k_free]) * 0.2)
