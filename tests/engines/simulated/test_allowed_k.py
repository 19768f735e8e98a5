"""A server that runs other K at every batch size, and one where a change of K costs."""

from __future__ import annotations

from typing import Any

import pytest

from adaptive_spec.domain.step_record import StepFlag, StepRecord
from adaptive_spec.engines.simulated.adaptive import Adaptive, engine_info
from adaptive_spec.engines.simulated.bench import run_policy
from adaptive_spec.engines.simulated.decider import Static
from adaptive_spec.engines.simulated.scenario import Scenario
from adaptive_spec.engines.simulated.server import SimulatedServer
from adaptive_spec.wire.policy_page import check_policy
from tests.engines.simulated.conftest import Small

SGLANG_DEFAULT = {1: [1, 3, 5, 7], 8: [0, 1, 3], 32: [0, 1], 64: [0]}
"""SGLang's default adaptive configuration, without the launch K."""
SEVEN: dict[str, Any] = {
    "max_k": 7, "k_by_batch": SGLANG_DEFAULT, "latency.graph_batch_sizes": [1, 2, 4, 8, 16, 32, 64, 128],
    "classes.chat.accept": [0.7] * 7, "classes.code.accept": [0.9] * 7,
    "latency.verify_curve": [[1, 10.0], [16, 12.0], [64, 20.0], [256, 60.0]],
}  # fmt: skip


class Watched(Adaptive):
    """Adaptive; checks every policy as the page would, and every record."""

    def __init__(self, scenario: Scenario) -> None:
        self.records: list[StepRecord] = []
        super().__init__(scenario)

    def observe(self, record: StepRecord) -> None:
        self.records.append(record)
        super().observe(record)
        if self.controller.latest_policy is not None:
            check_policy(self.controller.latest_policy)
        info = self.controller.info
        assert record.k in info.allowed_k(record.batch_size)
        for b, k in self.controller.k_by_batch_size().items():
            assert k in info.allowed_k(b)


def test_sets_are_those_of_the_padded_batch_with_the_launch_k(small: Small) -> None:
    info = engine_info(small(**SEVEN, timeline=[{"at_s": 0, "running": 100, "mix": {"chat": 1.0}}]))
    assert [info.allowed_k(b) for b in (4, 5, 16, 17, 33, 100)] == [
        (1, 3, 5, 7), (0, 1, 3), (0, 1, 3), (0, 1, 3), (0, 3), (0, 3)
    ]  # fmt: skip
    assert info.candidates == (0, 1, 3, 5, 7)


@pytest.mark.parametrize("granularity", ["batch", "request"])
def test_every_step_is_as_asked_at_batches_1_to_100(small: Small, granularity: str) -> None:
    timeline = [
        {"at_s": at_s, "running": running, "mix": {"chat": 1.0}}
        for at_s, running in [(0.0, [1, 12]), *((4.0 + i / 5, 1 + 7 * i % 100) for i in range(100)), (24.0, [60, 100])]
    ]
    scenario = small(**SEVEN, granularity=granularity, timeline=timeline, duration_s=25)
    policy = Watched(scenario)
    run = SimulatedServer(scenario, 3).run(policy)
    counters = policy.controller.counters
    assert (run.limited_steps, run.failures, counters.limited_steps) == (0, 0, 0)
    assert sum(counters.k_switches.values()) == run.k_switches > 0
    assert len({record.batch_size for record in policy.records}) == 100
    tried = [record for record in policy.records if record.flags & StepFlag.TRIAL]
    assert {record.k for record in tried} >= {1, 3}


def test_a_policy_that_asks_for_another_k_is_limited_and_runs_no_trial(small: Small) -> None:
    class Wrong(Static):
        reads_records = True
        flags = int(StepFlag.TRIAL)

        def observe(self, record: StepRecord) -> None:
            assert record.k == 3
            assert record.flags == int(StepFlag.LIMITED)

    scenario = small(**SEVEN, timeline=[{"at_s": 0, "running": 20, "mix": {"chat": 1.0}}], duration_s=1)
    run = SimulatedServer(scenario, 3).run(Wrong(7))
    assert run.limited_steps == run.steps > 0


@pytest.mark.parametrize(("policy", "as_asked"), [("oracle", True), ("ema", True), ("static-7", False), ("static-5", False)])
def test_every_policy_is_bound_by_the_sets(small: Small, policy: str, as_asked: bool) -> None:
    scenario = small(**SEVEN, timeline=[{"at_s": 0, "running": 20, "mix": {"chat": 1.0}}], duration_s=2)
    run = run_policy(policy, scenario, 3)
    assert run.limited_steps == (0 if as_asked else run.steps)
    if not as_asked:
        assert run.tokens == run_policy("static-3", scenario, 3).tokens, "the largest allowed K below it ran"


def test_a_change_of_k_costs_its_time(small: Small) -> None:
    class Alternating(Static):
        def draft_length(self, batch_size: int, kv_tokens: int) -> int:
            self.k = 3 - self.k
            return self.k

    def seconds_per_step(switch_ms: float) -> float:
        run = SimulatedServer(small(**{"latency.k_switch_ms": switch_ms}), 1).run(Alternating(3))
        assert run.k_switches == run.steps - 1
        return run.seconds / run.steps

    assert seconds_per_step(2.0) - seconds_per_step(0.0) == pytest.approx(0.002, rel=0.05)


def test_a_cost_is_learnt_and_charged(small: Small) -> None:
    scenario = small(**{"latency.k_switch_ms": 3.0, "latency.noise.sigma": 0.02, "duration_s": 40,
                        "classes.chat.request_spread": 1.5,
                        "timeline": [{"at_s": 0, "running": 2, "mix": {"chat": 1.0}}]})  # fmt: skip
    policy = Watched(scenario)
    SimulatedServer(scenario, 3).run(policy)
    assert policy.controller.models.switch_cost.seconds == pytest.approx(0.003, rel=0.2)
    latest = policy.controller.latest_policy
    assert latest is not None
    assert latest.switch_s == pytest.approx(0.003, rel=0.3)
