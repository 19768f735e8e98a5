from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from adaptive_spec.config.settings import ControllerSettings, PolicySettings, SweepSettings
from adaptive_spec.control.sweep import Sweep
from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.domain.policy import Granularity, Trial
from adaptive_spec.domain.step_record import StepFlag, StepRecord
from adaptive_spec.models.latency.measured_counts import MeasuredCounts
from tests.curves import load
from tests.support.simulated_server import SimulatedServer, engine_info, staircase


def sweep(server: SimulatedServer, limit: int = 4000) -> int:
    while server.controller.mode == "sweep" and server.steps < limit:
        server.run(1)
    return server.steps


GUIDE_STEPS = 128 * 5
"""The offline guide walks every batch size 1..128 at K = 8 for 5-10 minutes; five steps each is a lower bound of its cost."""


@pytest.mark.parametrize("name", ["a100_llama3-8b_tp1", "h100_llama2-70b_tp4"])
def test_the_boundaries_of_real_curves_are_found_in_a_quarter_of_the_steps_of_a_full_profile(name: str) -> None:
    tokens, seconds = load(name)
    expected = {"a100_llama3-8b_tp1": [128, 256, 384, 576, 768], "h100_llama2-70b_tp4": [128, 256, 384, 512]}[name]

    def curve(count: int) -> float:
        return float(seconds[min(int(np.searchsorted(tokens, count)), len(tokens) - 1)])

    info = EngineInfo("simulated", name, "gpu", 1, 3, tuple(range(9)), 128, Granularity.REQUEST, True, 1)
    settings = ControllerSettings(sweep=SweepSettings(max_tokens=1024))
    server = SimulatedServer(info, curve, noise=0.01, settings=settings)
    steps = sweep(server)
    fit = server.controller.models.verify.fit
    assert fit is not None
    found = [b.tokens for b in fit.boundaries]
    for boundary in expected:
        assert min(abs(b - boundary) for b in found) <= 1, f"{boundary} not among {found}"
    assert steps <= GUIDE_STEPS / 4


@pytest.mark.parametrize("tile", [4, 16, 48])
def test_a_staircase_is_found_to_the_token(tile: int) -> None:
    server = SimulatedServer(engine_info(Granularity.REQUEST, max_batch=16, holds_batch=True), staircase(tile=tile, step_s=0.008))
    sweep(server)
    fit = server.controller.models.verify.fit
    assert fit is not None
    true = [t for t in range(tile, 128, tile) if 0.008 / (0.010 + 0.008 * (t // tile - 1)) > 0.2]
    found = [b.tokens for b in fit.boundaries]
    assert [t for t in true if t not in found] == []


def test_without_control_of_the_batch_only_its_own_plans_are_measured() -> None:
    server = SimulatedServer(engine_info(Granularity.BATCH), staircase(), batch_size=6)
    steps = sweep(server)
    assert steps < 40
    assert set(server.controller.models.measured_counts().by_padded) == {6 * (k + 1) for k in range(8)}


def test_the_sweep_keeps_to_its_budget_and_ends() -> None:
    settings = ControllerSettings(sweep=SweepSettings(max_steps=30))
    server = SimulatedServer(engine_info(Granularity.REQUEST, holds_batch=True), staircase(), settings=settings)
    sweep(server)
    assert server.controller.mode == "active"
    assert server.controller.snapshot(0.0).sweep_steps <= 30


def test_trials_are_always_plans_the_engine_can_run() -> None:
    info = EngineInfo("simulated", "m", "g", 1, 2, (0, 1, 3, 5), 24, Granularity.BATCH, True, 1)
    planner = Sweep(SweepSettings(), info, 0.15)
    trials = planner.next_round(MeasuredCounts({}, {}, 0.02), 0)
    assert trials
    for trial in trials:
        assert trial.k in info.candidates
        assert 1 <= trial.batch_size <= 24
        assert trial.num_tokens == 0


@pytest.mark.parametrize("granularity", list(Granularity))
@pytest.mark.parametrize("holds_batch", [True, False])
def test_it_measures_no_k_beyond_the_guard_rails(granularity: Granularity, holds_batch: bool) -> None:
    settings = ControllerSettings(policy=PolicySettings(k_min=1, k_max=3))
    server = SimulatedServer(engine_info(granularity, holds_batch=holds_batch), staircase(), settings=settings, batch_size=5)
    steps = []
    while server.controller.mode == "sweep" and server.steps < 4000:
        steps.append(server.step())
        server.controller_sees(steps[-1])
    assert server.controller.mode == "active"
    assert {record.k for record in steps if record.policy_version} == {1, 2, 3}


@pytest.mark.parametrize("rails", [(1, 3), (0, 2), (5, 32), (3, 3)])
@pytest.mark.parametrize("holds_batch", [True, False])
def test_with_one_k_every_count_is_within_the_guard_rails(holds_batch: bool, rails: tuple[int, int]) -> None:
    """In the sweep, in probes and by the table: DSPARK drafts gamma tokens whatever the rails say."""
    info = replace(engine_info(Granularity.REQUEST, holds_batch=holds_batch), candidates=(7,), launch_k=7)
    settings = ControllerSettings(policy=PolicySettings(k_min=rails[0], k_max=rails[1], probe_budget=0.2))
    server = SimulatedServer(info, staircase(tile=8), settings=settings, batch_size=5)
    trials, asked, records = list[Trial](), 0, list[StepRecord]()
    for _ in range(1500):
        policy = server.planner.policy
        if policy is not None and policy.version != asked:
            asked, trials = policy.version, [*trials, *policy.trials]
        records.append(server.step())
        server.controller_sees(records[-1])
    assert server.controller.mode == "active"
    low, high = (min(rail, 7) for rail in rails)
    assert len({trial.num_tokens for trial in trials}) > 3 or low == high
    for trial in trials:
        b = trial.batch_size or 5
        assert b * (low + 1) <= trial.num_tokens <= b * (high + 1), trial
    for record in records:
        if record.policy_version:
            assert record.batch_size * low <= record.verify_len.sum() <= record.batch_size * high
    forecast = server.controller.models.forecast
    assert forecast is not None
    verified = forecast.verify_tokens[5, 7] / 5 - 1
    assert low <= verified <= high


@pytest.mark.parametrize("granularity", list(Granularity))
@pytest.mark.parametrize("holds_batch", [True, False])
def test_it_asks_only_for_k_allowed_at_the_batch_size(granularity: Granularity, holds_batch: bool) -> None:
    info = replace(
        engine_info(granularity, holds_batch=holds_batch), allowed_from=((1, (1, 3, 5, 7)), (8, (0, 1, 3)), (32, (0,)))
    )
    planned = Sweep(SweepSettings(), info, 0.15)
    for batch_size in (1, 9, 40):
        counts = planned.reachable(batch_size)
        assert counts[-1] <= max(b * (info.allowed_k(b)[-1] + 1) for b in range(1, 65))
        trials = planned.next_round(MeasuredCounts({}, {}, 0.01), batch_size)
        for trial in trials:
            b = trial.batch_size or batch_size
            assert trial.k in info.allowed_k(b)
            assert b <= (trial.num_tokens or b) <= b * (trial.k + 1)
        planned = Sweep(SweepSettings(), info, 0.15)
        assert trials


def slow_server(granularity: Granularity, max_loss_s: float) -> SimulatedServer:
    """80 requests on a consumer card: 0.6 s a step without drafts, 5 s with seven a request."""
    settings = ControllerSettings(sweep=SweepSettings(max_loss_s=max_loss_s))
    return SimulatedServer(
        engine_info(granularity, max_batch=103),
        lambda tokens: 0.025 + 0.007 * tokens,
        accept=0.5,
        batch_size=80,
        settings=settings,
    )


def cold_start(server: SimulatedServer) -> tuple[float, int]:
    """(seconds that trials lost against the best K, trial steps) until the sweep's last trial is run."""
    best, lost_s, trials = server.static_goodput(server.best_static()), 0.0, 0
    while server.controller.mode == "sweep" and server.steps < 1000:
        record = server.step()
        if record.flags & StepFlag.TRIAL:
            lost_s += record.step_s - record.output_tokens / best
            trials += 1
        server.controller_sees(record)
    return lost_s, trials


@pytest.mark.parametrize("granularity", list(Granularity))
def test_the_sweep_of_a_slow_server_loses_no_more_than_its_bound(granularity: Granularity) -> None:
    free_s, free_trials = cold_start(slow_server(granularity, 1000.0))
    server = slow_server(granularity, 5.0)
    lost_s, trials = cold_start(server)
    assert free_s > 12.0
    assert 0.0 < lost_s < 5.5  # what is lost is known to about a tenth
    assert 2 <= trials < free_trials
    assert "ended by its bound" in server.controller.reason
    assert server.controller.snapshot(server.now_s).sweep_steps == trials
    server.run(30)
    goodput = server.run(30)
    assert goodput > 0.95 * server.static_goodput(server.best_static())


def test_an_engine_that_holds_batches_sweeps_without_a_bound() -> None:
    info = engine_info(Granularity.REQUEST, max_batch=16, holds_batch=True)
    settings = ControllerSettings(sweep=SweepSettings(max_loss_s=0.0))
    server = SimulatedServer(info, staircase(tile=16, step_s=0.1), settings=settings)
    sweep(server)
    assert server.controller.reason == "sweep done"


def test_a_sweep_may_lose_three_steps_of_the_best_plan_whatever_the_bound() -> None:
    server = slow_server(Granularity.BATCH, 0.0)
    lost_s, trials = cold_start(server)
    best_s = server.curve(80) + 0.0005
    assert server.best_static() == 0
    assert trials > 0
    assert lost_s < 3.3 * best_s


@pytest.mark.parametrize("granularity", list(Granularity))
def test_the_bound_changes_nothing_on_a_quick_server(granularity: Granularity) -> None:
    runs = []
    for max_loss_s in (SweepSettings().max_loss_s, 1000.0):
        settings = ControllerSettings(sweep=SweepSettings(max_loss_s=max_loss_s))
        server = SimulatedServer(engine_info(granularity), staircase(), settings=settings)
        lost_s, trials = cold_start(server)
        runs.append((lost_s, trials, server.controller.k_by_batch_size()))
        assert server.controller.reason == "sweep done"
    assert runs[0] == runs[1]


@pytest.mark.parametrize("granularity", list(Granularity))
def test_what_a_trial_will_lose_is_known_from_what_was_measured(granularity: Granularity) -> None:
    server = slow_server(granularity, 1000.0)
    sweep(server)
    best = server.static_goodput(server.best_static())
    for k in (0, 3, 7):
        step_s = server.curve(80 * (k + 1)) + 0.0005 * (k + 1)
        true_s = step_s - step_s * server.static_goodput(k) / best
        trial = Trial(0, k, 80 * (k + 1) if granularity is Granularity.REQUEST else 0, 1)
        assert server.controller.models.expected_trial_loss_s(trial) == pytest.approx(true_s, rel=0.15, abs=0.15)
    assert server.controller.models.best_step_s() == pytest.approx(server.curve(80), rel=0.15)
