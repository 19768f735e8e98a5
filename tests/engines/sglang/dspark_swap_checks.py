"""DSpark's real planner classes under our swaps. Run by test_dspark.py, where SGLang is installed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sglang.srt.managers.overlap_utils import ResolvedConfidence
from sglang.srt.models.dspark import DSparkConfidenceHead
from sglang.srt.speculative.dspark_components.dspark_planner import (
    DSparkScheduleConfig,
    DSparkVerifyPlanner,
    HostConfidenceBudgetPlanner,
    VerifyBudgetDecision,
    compute_verify_token_budget,
    graph_tier_fill_budget,
)
from sglang.srt.speculative.dspark_components.dspark_sps import SpsAdditiveCostTable, SpsCostTable
from sglang.srt.speculative.ragged_verify import round_up_grid

from adaptive_spec.domain.plan_search import best_verified
from adaptive_spec.domain.policy import Granularity, Mode, Policy
from adaptive_spec.domain.survival import GRID_POINTS, LOGIT_LIMIT, SurvivalMap
from adaptive_spec.engines.sglang.dspark_swap import DSparkSwap, GraphSizes, budget_within, cost_table, launch_temperatures

GAMMA, MAX_BATCH = 5, 16
X = np.linspace(-LOGIT_LIMIT, LOGIT_LIMIT, GRID_POINTS)


def policy(version: int = 1, tile: int = 16, jump_s: float = 4e-3, slope: float = 0.5) -> Policy:
    tokens = np.arange(MAX_BATCH * (GAMMA + 1) + 1)
    verify = 5e-3 + jump_s * np.maximum(np.ceil(tokens / tile) - 1, 0) + 1e-5 * tokens
    fixed = 1e-3 + 2e-4 * np.arange(GAMMA + 1)[:, None] + 5e-5 * np.arange(MAX_BATCH + 1)[None, :]
    table = np.tile(1.0 / (1.0 + np.exp(-slope * X)), (GAMMA, 1))
    return Policy(
        version, Mode.ACTIVE, True, Granularity.REQUEST, GAMMA, np.full((MAX_BATCH + 1, 1), GAMMA, np.uint8),
        np.zeros(0, np.float32), fixed.astype(np.float32), verify.astype(np.float32), 0.0,
        SurvivalMap(table.astype(np.float32), True), False,
    )  # fmt: skip


def running_planner(temperatures: list[float] | None = None) -> Any:
    """A planner as a server has it after its start, without a model."""
    old = SpsCostTable(sample_batch_tokens=[1, 64], sample_steps_per_sec=[100.0, 50.0], max_batch_tokens=256)
    budget = HostConfidenceBudgetPlanner(sps_table=old, cfg=DSparkScheduleConfig(gamma=GAMMA), model_runner=SimpleNamespace())
    head = DSparkConfidenceHead(hidden_size=8, markov_rank=0, with_markov=False)
    if temperatures is not None:
        head.sts_temperatures = torch.tensor(temperatures)
    planner = object.__new__(DSparkVerifyPlanner)
    planner._budget_planner, planner._confidence_head, planner._is_verify_all = budget, head, False
    generations = torch.ones(MAX_BATCH, dtype=torch.int64)
    pool = SimpleNamespace(req_generation=generations)
    planner.model_runner = SimpleNamespace(decode_cuda_graph_runner=None, req_to_token_pool=pool)
    planner._align_verify_tokens_to_graph_tier = False
    budget.carry_steps = 0
    return planner


def planned(planner: Any, rows: int, confidence: float | None = 0.8) -> int | None:
    """The budget of a step, as both of SGLang's ways to one ask for it. confidence: None: not there yet."""
    resolved = None
    if confidence is not None:
        ones = torch.ones(rows, dtype=torch.int64)
        resolved = ResolvedConfidence(confidence=torch.full((rows, GAMMA), confidence), generation=ones)
    found: int | None = planner._budget_from_resolved(resolved=resolved, req_pool_indices_cpu=torch.arange(rows))
    return found


def swap_for(planner: Any) -> DSparkSwap:
    return DSparkSwap(planner, GAMMA, launch_temperatures(planner))


def take(swap: DSparkSwap, newest: Policy | None, kv_per_request: float = 0.0) -> None:
    """What a decode step does with its policy."""
    swap.at_plan(newest, kv_per_request)
    swap.at_forward()


def survivals(rows: int, seed: int) -> torch.Tensor:
    random = np.random.default_rng(seed)
    return torch.from_numpy(np.cumprod(random.beta(4, 1.3, (rows, GAMMA)), axis=1))


@pytest.mark.parametrize("tile", [7, 16, 40])
def test_a_refitted_table_plans_what_our_policy_plans(tile: int) -> None:
    """SGLang's own budget search on our table, against our own search on the models it was made of."""
    planner, refitted = running_planner(), policy(tile=tile)
    take(swap_for(planner), refitted)
    table = planner._budget_planner.sps_table
    assert isinstance(table, SpsAdditiveCostTable)
    differing = 0
    for seed in range(200):
        rows = 1 + seed % MAX_BATCH
        survival = survivals(rows, seed)
        decision = compute_verify_token_budget(
            history_survival_probs=survival, sps_table=table, cfg=DSparkScheduleConfig(gamma=GAMMA)
        )
        count, goodput = best_verified(survival.numpy(), float(refitted.fixed_s[GAMMA, rows]), refitted.verify_s)
        assert decision.predicted_theta == pytest.approx(goodput, rel=1e-5)
        differing += decision.budget != count
    assert differing <= 2, "only where two plans are equally good"


def test_the_running_planner_follows_the_swap() -> None:
    """The budget of the very object a server asks, before and after: steeper tiles verify less."""
    planner = running_planner()
    swap = swap_for(planner)
    confidence = torch.full((4, GAMMA), 0.8)
    generation = torch.ones(4, dtype=torch.int64)
    rows = torch.arange(4)

    def budget() -> int:
        planner._budget_planner.carry_steps = 0
        return int(planner._budget_planner.compute_budget(
            confidence=confidence, generation=generation, current_generation=generation, req_pool_indices_cpu=rows
        ))  # fmt: skip

    found = []
    for version, jump_s in ((1, 1e-5), (2, 4e-3), (3, 1.0)):
        refitted = policy(version, tile=8, jump_s=jump_s)
        take(swap, refitted)
        found.append(budget())
        survival = np.asarray(np.float64(np.float32(0.8)) ** np.tile(np.arange(1, GAMMA + 1), (4, 1)), np.float64)
        assert found[-1] == best_verified(survival, float(refitted.fixed_s[GAMMA, 4]), refitted.verify_s)[0]
    assert found[0] == 4 * GAMMA
    assert found[0] > found[1] >= found[2] == 4, "to the end of the tile that the bonus tokens begin"
    assert swap.swaps == 3


def broken(change: Callable[[Policy], Policy]) -> Policy:
    return change(policy(2))


@pytest.mark.parametrize(
    "change",
    [
        lambda p: replace(p, verify_s=np.where(np.arange(len(p.verify_s)) == 9, np.nan, p.verify_s)),
        lambda p: replace(p, verify_s=-p.verify_s),
        lambda p: replace(p, fixed_s=p.fixed_s * 0, verify_s=p.verify_s * 0),
        lambda p: replace(p, max_k=GAMMA - 1, fixed_s=p.fixed_s[:-1], survival=SurvivalMap(p.survival.table[:-1], True)),
        lambda p: replace(p, survival=SurvivalMap(p.survival.table[:, ::-1], True)),
        lambda p: replace(p, survival=SurvivalMap(np.full_like(p.survival.table, 0.5), True)),
    ],
)
def test_a_broken_one_is_refused_and_the_old_one_stays(change: Callable[[Policy], Policy]) -> None:
    planner = running_planner([1.0] * GAMMA)
    swap = swap_for(planner)
    take(swap, policy(1))
    table, temperatures = planner._budget_planner.sps_table, planner._confidence_head.sts_temperatures.clone()
    refused = broken(change)
    for _ in range(3):
        take(swap, refused)
    assert (swap.swaps, swap.refused) == (1, 1)
    assert swap.reason
    assert planner._budget_planner.sps_table is table
    assert torch.equal(planner._confidence_head.sts_temperatures, temperatures)


def test_temperatures_calibrate_the_confidence_head() -> None:
    """Raw confidences whose truth is sigmoid(raw / 2): after the swap the head says so, at the address it had."""
    planner = running_planner([1.0] * GAMMA)
    head = planner._confidence_head
    address = head.sts_temperatures.data_ptr()
    swap = swap_for(planner)
    take(swap, policy(1, slope=0.5))
    assert head.sts_temperatures.tolist() == pytest.approx([2.0] * GAMMA, rel=1e-3)
    assert head.sts_temperatures.data_ptr() == address, "captured graphs read from there"
    raw = torch.linspace(-3, 3, 7)[:, None].expand(7, GAMMA)
    torch.testing.assert_close(head.apply_sts(raw), torch.sigmoid(raw / 2.0), atol=1e-4, rtol=1e-3)
    # The calibration stays one of confidences under the temperatures of the launch: it changes nothing to say the same again.
    for version in range(2, 9):
        take(swap, policy(version, slope=0.5))
    assert head.sts_temperatures.tolist() == pytest.approx([2.0] * GAMMA, rel=1e-3)
    take(swap, None)
    assert head.sts_temperatures.tolist() == [1.0] * GAMMA


def test_one_temperature_for_all_is_left_alone() -> None:
    planner = running_planner()
    take(swap_for(planner), policy(1))
    assert planner._confidence_head.sts_temperatures.ndim == 0
    assert isinstance(planner._budget_planner.sps_table, SpsAdditiveCostTable)


def test_temperatures_are_written_on_the_streams_turn_only() -> None:
    planner = running_planner([1.0] * GAMMA)
    swap = swap_for(planner)
    swap.at_plan(policy(1), 0.0)
    assert planner._confidence_head.sts_temperatures.tolist() == [1.0] * GAMMA, "another stream may be reading them"
    assert isinstance(planner._budget_planner.sps_table, SpsAdditiveCostTable)


@pytest.mark.parametrize(("mode", "verify_all"), [(Mode.PAUSED, False), (Mode.PINNED, True), (Mode.SWEEP, True)])
def test_a_policy_that_plans_nothing_leaves_the_table_as_it_is(mode: Mode, verify_all: bool) -> None:
    planner = running_planner()
    swap = swap_for(planner)
    take(swap, policy(1))
    kept = planner._budget_planner.sps_table
    take(swap, replace(policy(2, tile=9), mode=mode, verify_all=verify_all))
    assert planner._budget_planner.sps_table is kept
    assert (swap.swaps, swap.refused) == (1, 0)


def test_context_is_a_cost_of_requests() -> None:
    planner, refitted = running_planner(), replace(policy(1), context_s_per_token=1e-6)
    take(swap_for(planner), refitted, kv_per_request=3000.0)
    for rows in (1, 5, MAX_BATCH):
        wanted = float(refitted.fixed_s[GAMMA, rows]) + 3e-3 * rows + float(refitted.verify_s[2 * rows])
        assert planner._budget_planner.sps_table.step_time(num_reqs=rows, budget=rows) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("rows", range(1, MAX_BATCH + 1))
def test_a_forced_count_is_what_sglang_plans(rows: int) -> None:
    planner = running_planner()
    swap = swap_for(planner)
    planner._budget_planner.carry_steps = 0
    ones, numbers = torch.ones(rows, dtype=torch.int64), torch.arange(rows)
    for count in range(rows * GAMMA + 1):
        swap.force(count, rows)
        budget = planner._budget_planner.compute_budget(
            confidence=torch.rand(rows, GAMMA), generation=ones, current_generation=ones, req_pool_indices_cpu=numbers
        )
        assert budget == count
    swap.force(None, rows)
    assert planner._budget_planner.forced_budget_frac is None


def test_the_table_has_corners_only() -> None:
    table = cost_table(policy(tile=16), GAMMA)
    assert len(table.m_probes) <= 2 * (MAX_BATCH * (GAMMA + 1) // 16 + 1)
    assert len(table.bs_probes) == 2
    built = SpsAdditiveCostTable(**table._asdict())
    source = policy(tile=16)
    for rows in range(1, MAX_BATCH + 1):
        for budget in range(rows * GAMMA + 1):
            wanted = float(source.fixed_s[GAMMA, rows]) + float(source.verify_s[rows + budget])
            assert built.step_time(num_reqs=rows, budget=budget) == pytest.approx(wanted, rel=1e-5)


# -- rails -------------------------------------------------------------------------------------------------------------

GREEDY, MEAN = 1e-6, 1.0
"""Seconds of a tile boundary: everything pays, and nothing beyond the first tile."""


def railed(k_min: int, k_max: int, jump_s: float = GREEDY, **changes: Any) -> Policy:
    return replace(policy(1, tile=8, jump_s=jump_s), k_min=k_min, k_max=k_max, **changes)


@pytest.mark.parametrize("rows", [1, 3, MAX_BATCH])
@pytest.mark.parametrize("rails", [(0, 2), (2, GAMMA), (1, 3), (3, 3), (0, 0), (8, 32)])
def test_the_planners_own_plans_stay_within_the_rails(rows: int, rails: tuple[int, int]) -> None:
    low, high = (rows * min(rail, GAMMA) for rail in rails)
    for jump_s in (GREEDY, 4e-3, MEAN):
        free, bound = running_planner(), running_planner()
        take(swap_for(free), railed(0, 32, jump_s))
        swap = swap_for(bound)
        take(swap, railed(*rails, jump_s))
        for confidence in (0.999, 0.8, 0.3):
            wanted = planned(free, rows, confidence)
            assert wanted is not None
            found = planned(bound, rows, confidence)
            assert found == min(max(wanted, low), high)
            assert bound.take_budget_decision().budget == found
        assert (swap.swaps, swap.refused) == (1, 0)


def test_rails_that_bind_nothing_replace_nothing() -> None:
    planner = running_planner()
    swap = swap_for(planner)
    for rails in ((0, 32), (0, GAMMA)):
        take(swap, railed(*rails))
        assert "_budget_from_resolved" not in vars(planner)
    assert planned(planner, 4, 0.999) == 4 * GAMMA
    assert planned(planner, 4, None) is None


@pytest.mark.parametrize(
    ("mode", "verify_all"), [(Mode.ACTIVE, False), (Mode.PAUSED, False), (Mode.PINNED, True), (Mode.SWEEP, True)]
)
def test_rails_bind_in_every_mode_that_acts(mode: Mode, verify_all: bool) -> None:
    planner = running_planner()
    swap = swap_for(planner)
    take(swap, railed(0, 2, mode=mode, verify_all=verify_all))
    assert planned(planner, 4, 0.999) == 8


def test_rails_follow_the_policy_and_go_with_it() -> None:
    planner = running_planner()
    plan, swap = planner._budget_from_resolved, swap_for(planner)
    for k_max in (1, 4, 2, 5, 3):
        take(swap, railed(0, k_max))
        assert planned(planner, 3, 0.999) == 3 * k_max
    take(swap, railed(0, 1, acting=False))
    assert planner._budget_from_resolved == plan
    assert "_budget_from_resolved" not in vars(planner), "its class has it again"
    assert planned(planner, 3, None) is None
    take(swap, railed(0, 1))
    assert planned(planner, 3, 0.999) == 3
    take(swap, None)
    assert planner._budget_from_resolved == plan


def test_a_broken_policy_has_rails_all_the_same() -> None:
    planner = running_planner()
    swap = swap_for(planner)
    wrong = railed(0, 2)
    take(swap, replace(wrong, verify_s=-wrong.verify_s))
    assert swap.refused == 1
    assert planned(planner, 4, 0.999) is not None
    found = planned(planner, 4, 0.999)
    assert found is not None
    assert found <= 8


def test_forced_counts_stay_within_the_rails() -> None:
    planner = running_planner()
    swap = swap_for(planner)
    take(swap, railed(1, 3))
    for count in range(4 * GAMMA + 1):
        swap.force(count, 4)
        assert planned(planner, 4) == min(max(count, 4), 12) == swap.within(count, 4)
    swap.force(None, 4)
    # What SGLang's own profiling forces stays.
    planner.set_forced_budget_frac(1.0)
    assert planned(planner, 4) == 4 * GAMMA


def test_a_step_that_sglang_cannot_plan_is_capped() -> None:
    """With the overlap scheduler the confidences of the first steps are not there: SGLang then verifies every drafted token."""
    planner = running_planner()
    swap = swap_for(planner)
    take(swap, railed(1, GAMMA))
    assert planned(planner, 4, None) is None, "all is within these rails"
    take(swap, railed(0, 2))
    assert planned(planner, 4, None) == 8
    assert planner.take_budget_decision().budget == 8


def test_another_one_that_replaced_the_method_since_is_left_alone() -> None:
    planner = running_planner()
    swap = swap_for(planner)
    take(swap, railed(0, 2))
    ours, calls = planner._budget_from_resolved, []

    def theirs(**arguments: Any) -> Any:
        calls.append(1)
        return ours(**arguments)

    planner._budget_from_resolved = theirs
    take(swap, None)
    assert planner._budget_from_resolved is theirs
    planner._budget_planner.sps_table = SpsAdditiveCostTable(**cost_table(railed(0, 32), GAMMA)._asdict())
    assert planned(planner, 4, 0.999) == 4 * GAMMA, "no rails act"
    take(swap, railed(0, 1))
    assert planned(planner, 4, 0.999) == 4
    assert len(calls) == 2


def test_rails_that_someone_else_took_away_come_back_with_the_next_step() -> None:
    """A wrapper around ours whose owner removes it by deleting the planner's attribute takes ours with it."""
    planner = running_planner()
    swap = swap_for(planner)
    take(swap, railed(0, 1))
    del planner._budget_from_resolved
    take(swap, railed(0, 1))
    assert planned(planner, 4, 0.999) == 4
    take(swap, None)
    assert "_budget_from_resolved" not in vars(planner)


def test_a_failure_inside_leaves_sglangs_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    planner = running_planner()
    swap = swap_for(planner)
    take(swap, railed(0, 2))
    monkeypatch.setattr(swap, "_clipped", lambda *_: {"a": 1}["x"])
    assert planned(planner, 4, 0.999) == 4 * GAMMA
    assert planned(planner, 4, None) is None
    decision = planner._budget_planner.last_decision
    assert decision is None or isinstance(decision, VerifyBudgetDecision)


def what_runs(budget: int, rows: int, sizes: GraphSizes) -> int:
    """Draft tokens that SGLang verifies for a budget, by its own rounding."""
    if not sizes.filled:
        return budget if rows + budget <= sizes.tokens[-1] else rows * GAMMA
    return int(
        graph_tier_fill_budget(
            graph_num_tokens=round_up_grid(rows + budget, list(sizes.tokens)), bs=rows, verify_num_draft_tokens=GAMMA + 1,
            min_verify_len=1,
        )
    )  # fmt: skip


@pytest.mark.parametrize("filled", [False, True])
def test_budgets_that_sglang_rounds_up_to_graphs_stay_within_the_rails(filled: bool) -> None:
    """Every budget, batch size and pair of rails, by SGLang's own functions."""
    sizes = GraphSizes((1, 2, 4, 8, 12, 16, 24, 32, 64), filled)
    beyond = 0
    for rows in range(1, MAX_BATCH + 1):
        for most in range(GAMMA + 1):
            for least in range(most + 1):
                for budget in range(rows * GAMMA + 1):
                    found = budget_within(budget, rows, GAMMA, least, most, sizes)
                    ran = what_runs(found, rows, sizes)
                    if ran > rows * most:
                        beyond += 1
                        smallest = min(what_runs(other, rows, sizes) for other in range(sizes.tokens[-1] - rows + 1))
                        assert ran == smallest, "no budget runs fewer"
                    elif not filled and rows * (1 + least) <= sizes.tokens[-1]:
                        assert ran >= rows * least
                    runnable = rows + budget <= sizes.tokens[-1] and what_runs(budget, rows, sizes) == budget
                    if runnable and rows * least <= budget <= rows * most:
                        assert found == budget, "what is within stays"
    assert (beyond > 0) is filled


def test_where_sglang_fills_graphs_no_plan_is_too_large_for_it() -> None:
    """SGLang raises for such a plan. Without rails too: trials, pins and our table may plan more than those of the launch."""
    planner = running_planner()
    planner._align_verify_tokens_to_graph_tier = True
    captured = SimpleNamespace(ragged_verify_mode=True, capture_num_tokens=[4, 8, 12], max_bs=MAX_BATCH)
    planner.model_runner.decode_cuda_graph_runner = captured
    swap = swap_for(planner)
    take(swap, railed(0, 32))
    swap.force(4 * GAMMA, 4)
    assert planned(planner, 4) == 8
    assert planned(planner, 4, None) is None
    take(swap, None)
    assert "_budget_from_resolved" not in vars(planner)


def test_the_count_a_trial_runs_is_known_before() -> None:
    for filled in (False, True):
        sizes = GraphSizes((4, 8, 12, 16, 24, 32, 64), filled)
        for rows in range(1, MAX_BATCH + 1):
            for budget in range(rows * GAMMA + 1):
                if rows + budget <= sizes.tokens[-1]:
                    assert sizes.rounded(rows + budget, rows, GAMMA) == rows + what_runs(budget, rows, sizes)
