"""Time per output token of single requests, and the K that keeps the slowest one within a target."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from adaptive_spec.config.settings import ControllerSettings, PolicySettings
from adaptive_spec.control.counters import Counters
from adaptive_spec.control.decision import Decision
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
    exact = 1.0 / ((3 * 4 + 1) / 4)
    assert exact < share[3] < 1.5 * exact  # shrunk towards the others


def test_without_requests_or_drafts_every_request_is_the_mean_one() -> None:
    assert TokenTimes(3, 1.0).slowest_share().tolist() == [1.0] * 4
    assert TokenTimes(0, 1.0).slowest_share().tolist() == [1.0]


def test_of_the_k_within_the_target_goodput_decides_and_where_there_is_none_the_fastest() -> None:
    goodput = np.array([[[100.0, 120.0, 140.0, 0.0]]])
    seconds = np.array([[[0.010, 0.012, 0.020, 0.001]]])
    assert within_target(goodput, seconds, 0.015).tolist() == [[[100.0, 120.0, 0.0, 0.0]]]
    assert within_target(goodput, seconds, 0.005).tolist() == [[[100.0, 0.0, 0.0, 0.0]]]
    assert within_target(goodput, seconds, 1.0).tolist() == goodput.tolist()


def test_a_target_takes_the_k_whose_slowest_request_is_within_it() -> None:
    s = SimulatedServer(engine_info(Granularity.BATCH, holds_batch=True), staircase(), accept=0.9, batch_size=30)
    s.run(1500)
    considered = s.controller.snapshot(s.now_s).considered
    assert considered is not None
    share = np.linspace(1.0, 0.2, s.info.max_k + 1)  # the slowest request accepts next to nothing
    forecast = dataclasses.replace(considered.forecast, slowest_share=share)
    seconds = forecast.seconds_per_token()[30, 0]
    free = Decision(PolicySettings(), s.info).propose(forecast, s.controller.models.traffic, 0.0, True).table[30, 0]
    wanted = int(np.flatnonzero(seconds < seconds[free])[-1])
    target_ms = 1e3 * float(seconds[wanted] + seconds[free]) / 2
    for target, best in ((1e5, free), (1e-3, seconds.argmin())):
        decision = Decision(PolicySettings(slo_tpot_ms=target), s.info)
        assert decision.propose(forecast, s.controller.models.traffic, 0.0, True).table[30, 0] == best
    decision = Decision(PolicySettings(slo_tpot_ms=target_ms), s.info)
    chosen = decision.propose(forecast, s.controller.models.traffic, 0.0, True).table[30, 0]
    assert chosen != free
    assert seconds[chosen] <= target_ms * 1e-3
    assert decision.considered is not None
    assert "above slo_tpot_ms" in next(p.verdict for p in decision.considered.explain(30, 0).plans if p.k == free)


def test_a_controller_with_a_target_counts_requests_and_turns_the_step_choice_off() -> None:
    settings = ControllerSettings(policy=PolicySettings(slo_tpot_ms=50.0))
    s = SimulatedServer(engine_info(Granularity.BATCH, holds_batch=True), staircase(), settings=settings)
    s.run(1500)
    for batch_size in (4, 9):  # requests of the simulated server end when its batch gets smaller
        s.batch_size = batch_size
        s.run(50)
    snapshot = s.controller.snapshot(s.now_s)
    assert sum(snapshot.slo_requests.values()) > 0
    assert snapshot.slo_tpot_s == 0.05
    latest = s.controller.latest_policy
    assert latest is not None
    assert latest.min_gain == 1.0
    state = s.controller.counters.state()
    restored = Counters(s.info.max_k)
    restored.restore(state)
    assert dict(restored.requests) == dict(snapshot.slo_requests)
