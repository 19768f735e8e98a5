"""Replay: estimates from a trace agree with what the policies really give in the same simulated server."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from adaptive_spec.cli.replay import ReplayedEma, policies_of
from adaptive_spec.config.settings import ControllerSettings
from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.domain.policy import Granularity
from adaptive_spec.domain.step_record import UNKNOWN_CONFIDENCE, StepRecord
from adaptive_spec.engines.simulated.adaptive import engine_info
from adaptive_spec.engines.simulated.decider import Static
from adaptive_spec.engines.simulated.scenario import Scenario, load_scenario
from adaptive_spec.engines.simulated.server import SimulatedServer
from adaptive_spec.offline.replay import Plan, Replay, ReplayedStatic, replay
from adaptive_spec.storage.trace import Trace, save_trace
from tests.support.processes import assert_one_line, run_cli

SCENARIOS = Path(__file__).parents[1] / "scenarios"


class Wanderer(Static):
    """Changes K now and then, so that its trace holds all of them."""

    reads_scores = True
    reads_records = True

    def __init__(self, ks: Sequence[int]) -> None:
        super().__init__(ks[0])
        self.records: list[StepRecord] = []
        self._ks, self._rng = ks, np.random.default_rng(0)

    def draft_length(self, batch_size: int, kv_tokens: int) -> int:
        if len(self.records) % 20 == 0:
            self.k = int(self._rng.choice(self._ks))
        return self.k

    def observe(self, record: StepRecord) -> None:
        self.records.append(record)


def scenario_of(name: str) -> Scenario:
    return load_scenario(SCENARIOS / f"{name}.yaml")


def traced(scenario: Scenario, ks: Sequence[int], until_s: float) -> list[StepRecord]:
    wanderer = Wanderer(ks)
    SimulatedServer(scenario, 5).run(wanderer, until_s)
    return wanderer.records


def replayed(scenario: Scenario, records: Sequence[StepRecord], policies: str) -> Replay:
    info = engine_info(scenario)
    return replay(info, records, policies_of(policies, info), ControllerSettings())


@pytest.mark.parametrize("name", ["h100-70b-steady", "ragged-steady"])
def test_estimates_agree_with_running_the_policies(name: str) -> None:
    scenario = scenario_of(name)
    result = replayed(scenario, traced(scenario, range(8), 40.0), "static")
    for k in range(8):
        truth = SimulatedServer(scenario, 5).run(Static(k), 40.0).goodput
        estimate = result.estimates[f"static-{k}"]
        assert estimate.goodput == pytest.approx(truth, rel=0.05), k
        assert estimate.gain == pytest.approx(estimate.goodput / result.goodput - 1.0)
        assert estimate.gain_low <= truth / result.goodput - 1.0 + 0.02
        assert estimate.gain_high >= truth / result.goodput - 1.0 - 0.02
    best = max(one.goodput for label, one in result.estimates.items() if label.startswith("static"))
    assert result.estimates["adaptive"].goodput > 0.95 * best
    assert result.step_time_mape is not None
    assert result.step_time_mape < 0.06
    assert result.snapshot.calibration_error is not None
    assert result.snapshot.calibration_error < 0.05


def test_a_trace_without_confidences_is_judged_by_rates() -> None:
    scenario = scenario_of("h100-70b-steady")
    records = [
        replace(record, confidences=np.full_like(record.confidences, UNKNOWN_CONFIDENCE))
        for record in traced(scenario, range(8), 40.0)
    ]
    result = replayed(scenario, records, "static,adaptive")
    for k in (0, 2, 7):
        truth = SimulatedServer(scenario, 5).run(Static(k), 40.0).goodput
        assert result.estimates[f"static-{k}"].goodput == pytest.approx(truth, rel=0.05), k
    best = max(one.goodput for label, one in result.estimates.items() if label.startswith("static"))
    assert result.estimates["adaptive"].goodput > 0.95 * best
    assert result.snapshot.calibration_error is None


def test_phases_count_by_their_seconds_and_not_by_their_steps() -> None:
    scenario = scenario_of("draft-collapse")
    result = replayed(scenario, traced(scenario, range(6), 100.0), "static-0,static-5")
    for k in (0, 5):
        truth = SimulatedServer(scenario, 5).run(Static(k), 100.0).goodput
        assert result.estimates[f"static-{k}"].goodput == pytest.approx(truth, rel=0.04)


def test_the_policy_that_ran_is_reproduced_exactly() -> None:
    scenario = scenario_of("h100-70b-steady")
    records = traced(scenario, [4], 5.0)
    estimate = replayed(scenario, records, "static-4").estimates["static-4"]
    goodput = sum(r.output_tokens for r in records) / sum(r.step_s for r in records)
    assert estimate.goodput == pytest.approx(goodput)
    assert (estimate.gain, estimate.gain_low, estimate.gain_high) == pytest.approx((0.0, 0.0, 0.0), abs=1e-9)
    assert estimate.supported == 1.0


def test_plans_that_were_not_measured_have_wide_intervals() -> None:
    scenario = scenario_of("h100-70b-steady")
    records = traced(scenario, [3], 20.0)
    result = replayed(scenario, records, "static")
    ran = SimulatedServer(scenario, 5).run(Static(3), 20.0).goodput
    for k in (0, 1, 2, 4, 5, 6, 7):
        estimate = result.estimates[f"static-{k}"]
        truth = SimulatedServer(scenario, 5).run(Static(k), 20.0).goodput / ran - 1.0
        assert estimate.gain_low < truth < estimate.gain_high, k
        assert estimate.supported < 0.1
        assert estimate.gain_high - estimate.gain_low > 0.1


def test_shorter_drafts_are_counted_exactly() -> None:
    scenario = scenario_of("tiny-batch")
    records = traced(scenario, [7], 5.0)
    wanted = sum(int(np.minimum(r.accept_len, 2).sum()) + r.batch_size for r in records)
    full = replayed(scenario, records, "static-2").estimates["static-2"]
    assert full.mean_k == 2.0
    info = engine_info(scenario)
    from adaptive_spec.offline.replay import TraceEvaluator

    evaluator = TraceEvaluator(info, records)
    tokens = sum(evaluator.value(i, record, Plan(2))[0] for i, record in enumerate(records))
    assert tokens == pytest.approx(wanted)


def test_sglangs_rule_sees_only_what_its_own_k_would_have_shown() -> None:
    info = EngineInfo("e", "m", "g", 1, 3, tuple(range(8)), 8, Granularity.BATCH, False, 1)
    policy = ReplayedEma(info, wide=False)
    rows = np.full((2, 7), 0.9, dtype=np.float32)
    record = StepRecord(
        1, 1, 100, 0, 16, 16, 2, 7, 0, 0.001, 0.01, 0.0, 0.012, rows, np.full(2, 7, np.uint8), np.full(2, 7, np.uint8),
        np.zeros(2, np.uint32),
    )  # fmt: skip
    ks = []
    for _ in range(60):
        plan = policy.decide(record)
        ks.append(plan.k)
        policy.learn(record, plan)
    assert ks[0] == 3
    assert sorted(set(ks)) == [3, 5, 7]
    assert ks == sorted(ks)


def test_too_short_a_trace_is_one_line(tmp_path: Path) -> None:
    scenario = scenario_of("tiny-batch")
    records = traced(scenario, [2], 0.5)
    info = engine_info(scenario)
    with pytest.raises(ValueError, match="too few"):
        replay(info, records[:1], {"static-2": ReplayedStatic(2)}, ControllerSettings())
    save_trace(tmp_path / "one.npz", Trace(info, tuple(records[:1]), 0))
    assert_one_line(run_cli("replay", tmp_path / "one.npz"), "TRACE", "too few")
    save_trace(tmp_path / "good.npz", Trace(info, tuple(records), 0))
    assert_one_line(run_cli("replay", tmp_path / "good.npz", "--policies", "static-9"), "--policies", "static-9")
    assert_one_line(run_cli("replay", tmp_path / "good.npz", "--json", tmp_path / "no" / "r.json"), "--json")


def test_the_command_writes_what_it_prints(tmp_path: Path) -> None:
    scenario = scenario_of("ragged-steady")
    save_trace(tmp_path / "t.npz", Trace(engine_info(scenario), tuple(traced(scenario, range(8), 10.0)), 2))
    result = run_cli("replay", tmp_path / "t.npz", "--policies", "static-3,ema-wide", "--json", tmp_path / "r.json")
    assert result.returncode == 0, result.stderr
    document = json.loads((tmp_path / "r.json").read_text())
    assert document["version"] == 1
    assert document["trace"]["granularity"] == "request"
    assert document["trace"]["lost"] == 2
    assert list(document["policies"]) == ["adaptive", "static-3", "ema-wide"]
    for name, one in document["policies"].items():
        assert one["gain_low"] <= one["gain_ratio"] <= one["gain_high"]
        assert name in result.stdout
    assert 0.0 <= document["calibration"]["ece"] < 0.2
    assert document["step_time"]["mape"] < 0.2
    assert "simulated ragged-steady" in result.stdout
