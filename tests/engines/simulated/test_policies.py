"""Policies of the benchmark: each sees what a server sees, and does what it says it stands for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from adaptive_spec.domain.policy import Mode
from adaptive_spec.domain.step_record import StepFlag
from adaptive_spec.engines.simulated.adaptive import DELAY_STEPS, Adaptive
from adaptive_spec.engines.simulated.catalogue import ABLATIONS, PEERS, build, first_phase_profile, policy_names
from adaptive_spec.engines.simulated.decider import Static
from adaptive_spec.engines.simulated.oracle import Oracle
from adaptive_spec.engines.simulated.peers.offline_files import OfflineFiles
from adaptive_spec.engines.simulated.peers.sglang_ema import StandIn, build_params, configuration
from adaptive_spec.engines.simulated.results import Run
from adaptive_spec.engines.simulated.server import SimulatedServer
from adaptive_spec.errors import BadInput
from tests.engines.simulated.conftest import Small

CHAT = {"chat": 1.0}
NOISE = {"sigma": 0.02, "spike_rate": 0.002, "spike_factor": 4.0}


def run(name: str, scenario: Any, seed: int = 1) -> Run:
    server = SimulatedServer(scenario, seed)
    return server.run(build(name, scenario, server, seed))


# -- SGLang's rule ----------------------------------------------------------------------------------------------------------


def ema(candidates: list[int], launch_k: int = 3, down: float = -0.25) -> StandIn:
    return StandIn(launch_k, {"1": {"candidate_steps": candidates, "up_hysteresis": 0.0, "down_hysteresis": down}})


def feed(policy: StandIn, accepted: float, steps: int, batch_size: int = 4) -> list[int]:
    """Ks after each step of a draft of which on the mean `accepted` tokens are accepted, as far as K lets them."""
    ks = []
    for _ in range(steps):
        k = policy.get_steps_for_batch(batch_size)
        share = min(accepted, float(k))
        policy.on_verify_complete([int(share + (i / batch_size < share % 1.0)) for i in range(batch_size)], batch_size)
        ks.append(policy.get_steps_for_batch(batch_size))
    return ks


def test_sglangs_rule_waits_ten_steps_and_then_moves_every_five() -> None:
    ks = feed(ema([1, 3, 5, 7]), 7.0, 40)
    changes = [i + 1 for i in range(1, 40) if ks[i] != ks[i - 1]]
    assert ks[:14] == [3] * 14
    assert changes
    assert all(step % 5 == 0 and step > 10 for step in changes)
    assert ks[-1] == 7


def test_sglangs_rule_falls_when_little_is_accepted_and_looks_again_from_zero() -> None:
    assert feed(ema([1, 3, 5, 7]), 0.0, 60)[-1] == 1
    ks = feed(ema([0, 1, 3]), 0.0, 200)
    assert 0 in ks
    assert ks[ks.index(0) :].count(1) > 10  # it drafts again every other time, whatever that costs


def test_sglangs_rule_starts_in_the_middle_when_the_launch_k_is_no_candidate() -> None:
    assert ema([1, 2, 5, 7]).get_steps_for_batch(1) == 5


def test_sglangs_rule_routes_padded_batch_sizes_to_slots() -> None:
    policy = StandIn(3, configuration(7, wide=False))
    assert [policy.get_steps_for_batch(b) for b in (1, 7, 8, 31, 32, 63, 64, 500)] == [3, 3, 3, 3, 1, 1, 0, 0]
    policy.set_cuda_graph_bs([8, 64])
    assert [policy.get_steps_for_batch(b) for b in (1, 9)] == [3, 0]


def test_sglangs_candidates_are_cut_to_what_there_is_or_widened_to_all() -> None:
    assert [entry["candidate_steps"] for entry in configuration(4, wide=False).values()] == [[1, 3], [0, 1, 3], [0, 1], [0]]
    assert all(entry["candidate_steps"] == [0, 1, 2, 3, 4] for entry in configuration(4, wide=True).values())


def test_the_real_class_is_used_where_it_is_installed_and_said_so() -> None:
    params, origin = build_params(7, wide=False)
    if isinstance(params, StandIn):
        assert origin.startswith("stand-in of SGLang 0.5.23's rule: ")
        return
    assert origin.startswith("sglang ")
    stand_in = StandIn(3, configuration(7, wide=False))
    rng = np.random.default_rng(0)
    for _ in range(3000):
        b = int(rng.integers(1, 80))
        assert params.get_steps_for_batch(b) == stand_in.get_steps_for_batch(b)
        accepted = rng.integers(0, stand_in.get_steps_for_batch(b) + 1, size=b).tolist()
        assert params.on_verify_complete(accepted, b) == stand_in.on_verify_complete(accepted, b)


# -- adaptive ---------------------------------------------------------------------------------------------------------------


def test_adaptive_starts_cold_on_its_launch_k_and_adopts_a_step_late(small: Small) -> None:
    scenario = small(**{"latency.noise": NOISE})
    policy = Adaptive(scenario)
    seen: list[tuple[int, int, int]] = []
    decided: list[int] = []

    class Spy:
        reads_scores = reads_records = True
        version = property(lambda self: policy.version)
        flags = property(lambda self: policy.flags)
        failures, swaps, probe_share = 0, 0, None

        def expect(self, request_ids: np.ndarray) -> None:
            policy.expect(request_ids)

        def draft_length(self, batch_size: int, kv_tokens: int) -> int:
            return policy.draft_length(batch_size, kv_tokens)

        def verify_lengths(self, confidences: np.ndarray) -> np.ndarray | None:
            return policy.verify_lengths(confidences)

        def observe(self, record: Any) -> None:
            seen.append((record.k, record.flags, record.policy_version))
            policy.observe(record)
            latest = policy.controller.latest_policy
            decided.append(latest.version if latest is not None else 0)

    SimulatedServer(scenario, 1).run(Spy(), 3.0)
    assert seen[0] == (3, int(StepFlag.FALLBACK), 0)
    assert any(flags & StepFlag.TRIAL for _, flags, _ in seen[:40])
    for step in range(1 + DELAY_STEPS, len(seen)):
        assert seen[step][2] == decided[step - 1 - DELAY_STEPS]


@pytest.mark.parametrize("granularity", ["batch", "request"])
def test_adaptive_comes_close_to_the_oracle(small: Small, granularity: str) -> None:
    scenario = small(duration_s=60, granularity=granularity, timeline=[{"at_s": 0, "running": [4, 12], "mix": CHAT}],
                     **{"latency.noise": NOISE})  # fmt: skip
    ours, oracle = run("adaptive", scenario), run("oracle", scenario)
    assert 0.96 <= ours.goodput / oracle.goodput <= 1.01
    assert ours.failures == 0
    assert ours.probe_share is not None


def test_a_controller_that_raises_costs_speed_and_not_the_run(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = small(duration_s=5)
    policy = Adaptive(scenario)

    def broken(*arguments: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(policy.controller, "refit", broken)
    result = SimulatedServer(scenario, 1).run(policy)
    assert result.failures == policy.failures > 0
    assert policy.controller.mode is Mode.FALLBACK
    assert result.steps > 100


def test_a_warm_start_needs_no_sweep(small: Small) -> None:
    scenario = small(duration_s=20, **{"latency.noise": NOISE})
    warm = Adaptive(scenario, profile=first_phase_profile(scenario, 1))
    assert warm.controller.mode is Mode.ACTIVE
    assert Adaptive(scenario).controller.mode is Mode.SWEEP
    SimulatedServer(scenario, 1).run(warm)
    assert warm.controller.snapshot(20.0).sweep_steps == 0


# -- peers and ablations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["batch", "request"])
@pytest.mark.parametrize("name", [*PEERS, *ABLATIONS])
def test_every_policy_runs_and_repeats_itself(small: Small, name: str, granularity: str) -> None:
    scenario = small(duration_s=25, granularity=granularity, timeline=[{"at_s": 0, "running": [4, 12], "mix": CHAT}],
                     drift=[{"at_s": 15, "class": "chat", "accept": [0.2, 0.2, 0.2]}], **{"latency.noise": NOISE})  # fmt: skip
    first, second = run(name, scenario), run(name, scenario)
    assert (first.tokens, first.seconds, first.steps) == (second.tokens, second.seconds, second.steps)
    assert 0.3 <= first.goodput / run("oracle", scenario).goodput <= 1.01
    assert first.failures == 0


def test_a_startup_profile_does_not_notice_another_curve_and_adaptive_does(small: Small) -> None:
    # At first a second tile is cheap, later it costs double: a policy that measures again stays below it.
    cheap, expensive = [[1, 10.0], [64, 10.5]], [[1, 10.0], [16, 10.5], [32, 30.0], [64, 31.0]]
    scenario = small(
        duration_s=80, **{"latency.verify_curve": cheap, "latency.noise": NOISE, "latency.draft_ms_per_step": 0.2},
        drift=[{"at_s": 20, "verify_curve": expensive}],
    )  # fmt: skip
    oracle, ours, peer = run("oracle", scenario), run("adaptive", scenario), run("startup-profile", scenario)
    assert peer.phases[0].goodput / oracle.phases[0].goodput > 0.98
    assert peer.phases[1].goodput / oracle.phases[1].goodput < 0.85
    assert ours.phases[1].goodput / oracle.phases[1].goodput > 0.95


def test_files_are_right_until_the_traffic_changes(small: Small) -> None:
    scenario = small(
        duration_s=40, **{"latency.draft_ms_per_step": 2.0},
        drift=[{"at_s": 20, "class": "chat", "accept": [0.02, 0.02, 0.02]}],
    )  # fmt: skip
    oracle, peer = run("oracle", scenario), run("offline-files", scenario)
    assert peer.phases[0].goodput / oracle.phases[0].goodput > 0.99
    assert peer.phases[1].goodput / oracle.phases[1].goodput < 0.97
    assert peer.swaps == 0


def test_offline_calibration_is_fitted_to_requests_the_run_does_not_meet(small: Small) -> None:
    scenario = small(granularity="request", **{"classes.chat.score_slope": 0.5, "classes.chat.score_bias": -0.8})
    policy = OfflineFiles(scenario, 1)
    q = np.array([[0.5, 0.6, 0.4]])
    confidences = 1.0 / (1.0 + np.exp(-(np.log(q / (1 - q)) + 0.8) / 0.5))
    assert policy._survival is not None
    assert policy._survival.survival(confidences.astype(np.float32))[0] == pytest.approx(np.cumprod(q), abs=0.1)


def test_the_bandit_tries_every_k_and_then_mostly_takes_the_best(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = small(duration_s=60)
    server = SimulatedServer(scenario, 1)
    policy = build("goodput-bandit", scenario, server, 1)
    ks: list[int] = []
    choose = policy.draft_length

    def noted(batch_size: int, kv_tokens: int) -> int:
        ks.append(choose(batch_size, kv_tokens))
        return ks[-1]

    monkeypatch.setattr(policy, "draft_length", noted)
    server.run(policy)
    assert ks[:32] == [0] * 8 + [1] * 8 + [2] * 8 + [3] * 8
    oracle = SimulatedServer(scenario, 1)
    best = Oracle(oracle)
    oracle.run(best, 1.0)
    assert np.mean(np.array(ks[32:]) == best._k) > 0.85


# -- names ------------------------------------------------------------------------------------------------------------------


def test_names_are_written_out_once_and_in_order(small: Small) -> None:
    scenario = small()
    assert policy_names("oracle, static,static-2", scenario) == ["oracle", "static-0", "static-1", "static-2", "static-3"]
    assert policy_names("peers", scenario) == list(PEERS)
    for bad in ("static-4", "", "Adaptive", "adaptive,,oracle"):
        with pytest.raises(BadInput, match="--policies: "):
            policy_names(bad, scenario)


def test_a_static_policy_keeps_its_k(small: Small) -> None:
    seen: list[int] = []

    class Recorded(Static):
        reads_records = True

        def observe(self, record: Any) -> None:
            seen.append(record.k)

    assert SimulatedServer(small(), 1).run(Recorded(2)).swaps == 0
    assert len(seen) > 100
    assert set(seen) == {2}
