"""The simulated server keeps the contract: costs, padding, load path, acceptance, drift, equal random draws for all policies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from adaptive_spec.domain.step_record import StepRecord
from adaptive_spec.engines.simulated.decider import Static
from adaptive_spec.engines.simulated.load_path import LoadPath
from adaptive_spec.engines.simulated.oracle import Oracle
from adaptive_spec.engines.simulated.plans import Costs, best_ragged, expected_tokens
from adaptive_spec.engines.simulated.requests import Requests
from adaptive_spec.engines.simulated.scenario import Scenario, TimelineEntry
from adaptive_spec.engines.simulated.server import SimulatedServer
from tests.engines.simulated.conftest import Small

CHAT = {"chat": 1.0}


class Watcher(Static):
    """A fixed K that keeps every record."""

    reads_scores = True
    reads_records = True

    def __init__(self, k: int, verify: int | None = None) -> None:
        super().__init__(k)
        self.records: list[StepRecord] = []
        self._verify = verify

    def verify_lengths(self, confidences: np.ndarray) -> np.ndarray | None:
        return None if self._verify is None else np.full(len(confidences), self._verify, dtype=np.uint8)

    def observe(self, record: StepRecord) -> None:
        assert record.invalid_reason() is None
        self.records.append(record)


def watched(scenario: Scenario, k: int, verify: int | None = None, seed: int = 1) -> list[StepRecord]:
    watcher = Watcher(k, verify)
    SimulatedServer(scenario, seed).run(watcher)
    return watcher.records


def test_a_step_costs_verify_draft_context_and_overhead(small: Small) -> None:
    record = watched(small(duration_s=1), 2)[0]
    # 6 requests padded to 8, K = 2: 24 tokens of the curve's 32; 6 x 1000 tokens of context; all times 1.
    assert (record.batch_size, record.num_tokens, record.padded_tokens, record.kv_tokens) == (6, 18, 24, 6000)
    assert record.draft_s == pytest.approx((0.5 + 2 * 1.0) * 1e-3)
    assert record.verify_s == pytest.approx((20.0 + 0.1 * 6) * 1e-3)
    assert record.step_s == pytest.approx((20.0 + 0.6 + 2.5 + 2.0) * 1e-3)


def test_no_draft_costs_no_draft(small: Small) -> None:
    record = watched(small(duration_s=1), 0)[0]
    assert record.draft_s == 0.0
    assert record.step_s == pytest.approx((12.0 + 0.6 + 2.0) * 1e-3)
    assert record.output_tokens == 6


def test_at_request_granularity_tokens_are_padded_to_their_own_buckets(small: Small) -> None:
    changes: dict[str, Any] = {"granularity": "request", "duration_s": 1, "latency.token_buckets": [16, 40]}
    record = watched(small(**changes), 3, verify=2)[0]
    assert (record.k, record.num_tokens, record.padded_tokens) == (3, 18, 40)
    assert record.verify_s == pytest.approx((30.0 + 0.6) * 1e-3)
    assert record.draft_s == pytest.approx(3.5e-3)
    unpadded = watched(small(**{**changes, "latency.token_buckets": None}), 3, verify=2)[0]
    assert (unpadded.num_tokens, unpadded.padded_tokens) == (18, 18)


def test_a_batch_beyond_every_graph_is_not_padded(small: Small) -> None:
    record = watched(small(duration_s=1, **{"latency.graph_batch_sizes": [1, 2, 4]}), 1)[0]
    assert record.padded_tokens == record.num_tokens == 12


def test_noise_has_mean_1_and_spikes_multiply_single_steps(small: Small) -> None:
    noise = {"sigma": 0.3, "spike_rate": 0.0, "spike_factor": 1.0}
    steps = [r.step_s for r in watched(small(duration_s=120, **{"latency.noise": noise}), 1)]
    plain = watched(small(duration_s=1), 1)[0].step_s
    assert np.mean(steps) == pytest.approx(plain, rel=0.03)
    noise = {"sigma": 0.0, "spike_rate": 0.05, "spike_factor": 7.0}
    ratios = np.array([r.step_s for r in watched(small(duration_s=120, **{"latency.noise": noise}), 1)]) / plain
    assert set(np.round(ratios, 6)) == {1.0, 7.0}
    assert np.mean(ratios > 1.0) == pytest.approx(0.05, abs=0.015)


def test_acceptance_follows_the_class(small: Small) -> None:
    records = watched(small(duration_s=400), 3)
    accepted = np.concatenate([r.accept_len for r in records])
    survival = [(accepted >= j).mean() for j in (1, 2, 3)]
    assert survival == pytest.approx([0.7, 0.7 * 0.6, 0.7 * 0.6 * 0.5], abs=0.01)


@pytest.mark.parametrize("granularity", ["batch", "request"])
def test_confidences_carry_the_acceptance_probability_through_slope_and_bias(small: Small, granularity: str) -> None:
    chat = {"accept": [0.7, 0.6, 0.5], "concentration": 4, "score_slope": 0.5, "score_bias": -0.8}
    records = watched(small(duration_s=300, granularity=granularity, **{"classes.chat": chat}), 3)
    p = np.concatenate([r.confidences for r in records]).astype(np.float64)
    accepted = np.concatenate([r.accept_len for r in records])
    x = np.log(p) - np.log1p(-np.minimum(p, 1 - 1e-7))
    q = 1 / (1 + np.exp(-(x * 0.5 - 0.8)))
    for j in range(3):  # among those that came so far, one in so many with this q is accepted
        at_risk = accepted >= j
        for low, high in ((0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 0.95)):
            inside = at_risk & (q[:, j] >= low) & (q[:, j] < high)
            assert (accepted[inside] > j).mean() == pytest.approx(q[inside, j].mean(), abs=0.03)


def test_quality_makes_some_requests_better_than_others_for_their_whole_life(small: Small) -> None:
    chat = {"accept": [0.7, 0.7, 0.7], "concentration": 4, "request_spread": 1.0}
    server = SimulatedServer(small(**{"classes.chat": chat, "timeline": [{"at_s": 0, "running": 4000, "mix": CHAT}]}), 3)
    server._pass_events()
    server.requests.resize(4000)
    quality = server.requests.quality[:4000]
    assert (quality.mean(), quality.std()) == pytest.approx((0.0, 1.0), abs=0.05)
    logit = np.log(0.7 / 0.3) + quality
    assert np.allclose(server.requests.mean[:4000, 0], 1 / (1 + np.exp(-logit)))


def test_requests_leave_after_a_geometric_number_of_tokens(small: Small) -> None:
    records = watched(small(duration_s=600, mean_output_tokens=50), 0)
    ids = np.concatenate([r.request_ids for r in records])
    _, lives = np.unique(ids, return_counts=True)
    assert lives.mean() == pytest.approx(50, rel=0.05)
    assert lives.std() == pytest.approx(50, rel=0.1)


def test_the_load_wanders_within_its_range_from_the_middle_and_is_the_same_for_all() -> None:
    entry = TimelineEntry.model_validate({"at_s": 0, "running": [4, 9], "mix": CHAT})
    paths = [LoadPath([entry], 2000.0, np.random.default_rng(5)) for _ in range(2)]
    counts = [paths[0].at(t / 10) for t in range(20_000)]
    # The second one is looked at more rarely, as a slower policy would.
    assert [paths[1].at(t / 10) for t in range(0, 20_000, 7)] == counts[::7]
    assert counts[0] == 6
    assert set(counts) == set(range(4, 10))
    moves = np.diff(counts)
    assert set(moves.tolist()) == {-1, 0, 1}
    inside = moves[(np.array(counts[:-1]) > 4) & (np.array(counts[:-1]) < 9)]
    assert (inside == 1).mean() == pytest.approx(0.3, abs=0.02)
    assert (inside == -1).mean() == pytest.approx(0.3, abs=0.02)


def test_arrivals_are_the_same_whatever_a_policy_does(small: Small) -> None:
    scenario = small(timeline=[{"at_s": 0, "running": 3, "mix": {"chat": 0.5, "code": 0.5}}])
    lives = []
    for tokens in (1, 4):
        requests = Requests(scenario.file, scenario.max_batch, 9)
        requests.mix({"chat": 0.5, "code": 0.5})
        requests.resize(3)
        seen: list[tuple[int, float, int]] = []
        while len(seen) < 40:
            seat = (int(requests.kind[0]), float(requests.quality[0]), int(requests.remaining[0]))
            born = int(requests.ids[0])
            seen.append(seat)
            while requests.ids[0] == born:
                requests.generate(np.full(3, tokens))
        lives.append(seen)
    assert lives[0] == lives[1]


def test_drift_events_change_scale_curve_scores_and_acceptance(small: Small) -> None:
    scenario = small(
        duration_s=50,
        drift=[
            {"at_s": 10, "latency_scale": 2.0},
            {"at_s": 20, "verify_curve": [[1, 5.0], [64, 5.0], [128, 6.0]]},
            {"at_s": 30, "class": "chat", "accept": [0.01, 0.01, 0.01]},
            {"at_s": 40, "class": "chat", "score_slope": 1.0, "score_bias": -8.0},
        ],
    )
    records = watched(scenario, 3)
    part = {n: [r for r in records if n * 10 + 0.1 < r.time_ns * 1e-9 < n * 10 + 9.9] for n in range(5)}
    step = {n: float(np.mean([r.step_s for r in part[n]])) * 1e3 for n in part}
    assert step[0] == pytest.approx(20.0 + 0.6 + 3.5 + 2.0)
    assert step[1] == pytest.approx(2 * step[0])
    assert step[2] == pytest.approx(2 * (5.0 + 0.6 + 3.5 + 2.0))
    accepted = {n: np.concatenate([r.accept_len for r in part[n]]).mean() for n in part}
    assert accepted[2] > 1.0
    assert accepted[3] < 0.03
    confidence = {n: float(np.mean([r.confidences.mean() for r in part[n]])) for n in part}
    assert confidence[3] < 0.05
    assert confidence[4] > 0.15


def test_another_mix_arrives_with_new_requests_only(small: Small) -> None:
    timeline = [{"at_s": 0, "running": 6, "mix": CHAT}, {"at_s": 5, "running": 6, "mix": {"code": 1.0}}]
    records = watched(small(duration_s=60, timeline=timeline, mean_output_tokens=300), 1)
    kv = [(r.time_ns * 1e-9, r.kv_tokens) for r in records]
    assert {tokens for at_s, tokens in kv if at_s < 5} == {6000}
    assert 6000 in {tokens for at_s, tokens in kv if 5 < at_s < 5.5}
    assert {tokens for at_s, tokens in kv if at_s > 55} == {12000}


def test_the_same_seed_gives_the_same_run_and_another_one_another(small: Small) -> None:
    scenario = small(timeline=[{"at_s": 0, "running": [2, 9], "mix": {"chat": 0.5, "code": 0.5}}])
    first, second, other = (watched(scenario, 3, seed=seed) for seed in (1, 1, 2))
    assert [r.step_s for r in first] == [r.step_s for r in second]
    assert all((a.confidences == b.confidences).all() for a, b in zip(first, second, strict=True))
    assert [r.output_tokens for r in first] != [r.output_tokens for r in other]


def test_the_oracle_takes_the_best_k_of_a_batch(small: Small) -> None:
    scenario = small(duration_s=60)
    oracle = SimulatedServer(scenario, 1)
    best = oracle.run(Oracle(oracle))
    statics = {k: SimulatedServer(scenario, 1).run(Static(k)) for k in range(4)}
    survival = np.cumprod([0.7, 0.6, 0.5])
    tokens = 6 * np.concatenate(([1.0], 1.0 + np.cumsum(survival)))
    expected = tokens / np.array([12.6 + 2.0, 12.6 + 3.5, 20.6 + 4.5, 20.6 + 5.5]) * 1e3
    for k, run in statics.items():
        assert run.goodput == pytest.approx(expected[k], rel=0.02)
    assert best.goodput == max(run.goodput for run in statics.values())
    assert best.phases[0].good_after == 50


def test_the_ragged_oracle_finds_the_best_plan_there_is(small: Small) -> None:
    rng = np.random.default_rng(0)
    bumpy = [[1, 5.0], [4, 9.0], [5, 6.0], [7, 6.5], [8, 11.0], [12, 12.0]]
    for trial in range(30):
        scenario = small(granularity="request", **{"latency.verify_curve": bumpy, "latency.draft_ms_per_step": 0.2 * trial / 30})
        costs = Costs(scenario)
        q = rng.beta(2.0, 1.0, (3, 3))
        survival = np.cumprod(q, axis=1)
        plans = {}
        for k in range(4):
            for lengths in np.ndindex(*([k + 1] * 3)):
                tokens = 3 + sum(survival[i, :n].sum() for i, n in enumerate(lengths))
                plans[k, lengths] = tokens / costs.ragged_step_ms(k, 3 + sum(lengths), 3000)
        k, count, value = best_ragged(q, costs, 3000, range(8))
        assert value == pytest.approx(max(plans.values()))
        assert max(v for (kk, lengths), v in plans.items() if kk == k and sum(lengths) == count) == pytest.approx(value)


def test_expected_tokens_by_k() -> None:
    survival = np.array([[0.5, 0.25], [1.0, 0.5]])
    assert expected_tokens(survival).tolist() == [2.0, 3.5, 4.25]


def test_steps_to_95_percent_start_with_the_phase_and_count_to_a_full_window(small: Small) -> None:
    class Late(Static):
        def draft_length(self, batch_size: int, kv_tokens: int) -> int:
            self.steps = getattr(self, "steps", 0) + 1
            return 0 if self.steps <= 200 else 1

    scenario = small(duration_s=20, drift=[{"at_s": 15, "latency_scale": 1.1}])
    run = SimulatedServer(scenario, 1).run(Late(0))
    worth = (6 / 14.6) / (6 * 1.7 / 16.1)
    late = int(np.ceil(50 * (0.95 - worth) / (1 - worth)))  # good steps that a window of 50 needs
    assert run.phases[0].good_after == 200 + late
    assert run.phases[1].good_after == 50
    assert sum(phase.steps for phase in run.phases) == run.steps
