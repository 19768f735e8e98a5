"""The planner: trials first, then the K table, then the verify lengths of each request."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptive_spec.domain.policy import TRIAL_PATIENCE_STEPS, Granularity, Mode, Policy, Trial
from adaptive_spec.domain.survival import GRID_POINTS, LOGIT_LIMIT, SurvivalMap
from adaptive_spec.engine_side.planner import Planner

GRID = np.linspace(-LOGIT_LIMIT, LOGIT_LIMIT, GRID_POINTS)
IDENTITY = (1.0 / (1.0 + np.exp(-GRID))).astype(np.float32)
LAUNCH_K = 4


def policy(**changes: object) -> Policy:
    """K = 3 up to batch 4 and 1 above, 5 and 2 from 1000 KV tokens a request on; verification costs the same for any count."""
    table = np.array([[3, 5]] * 5 + [[1, 2]] * 4, np.uint8)
    plain = Policy(
        1, Mode.ACTIVE, True, Granularity.REQUEST, 7, table, np.array([1000.0], np.float32), np.full((8, 9), 1e-3, np.float32),
        np.full(65, 1e-3, np.float32), 0.0, SurvivalMap(np.tile(IDENTITY, (7, 1)), True), False,
    )  # fmt: skip
    return replace(plain, **changes)  # type: ignore[arg-type]  # a test names the fields it changes


def planner(adopted: Policy | None, max_k: int = 7) -> Planner:
    made = Planner(LAUNCH_K, max_k)
    made.adopt(adopted)
    return made


@pytest.mark.parametrize(
    ("batch_size", "kv_tokens", "k"), [(1, 0, 3), (4, 3999, 3), (4, 4000, 5), (5, 0, 1), (8, 8000, 2), (99, 0, 1)]
)
def test_k_is_looked_up_by_batch_size_and_context(batch_size: int, kv_tokens: int, k: int) -> None:
    assert planner(policy()).draft_length(batch_size, kv_tokens) == k


def test_k_is_never_above_the_engines_largest() -> None:
    small = planner(policy(trials=(Trial(0, 7, 0, 1),)), max_k=2)
    assert [small.draft_length(1, 0) for _ in range(3)] == [2, 2, 2]


@pytest.mark.parametrize("mode", [Mode.SHADOW, Mode.PAUSED, Mode.FALLBACK])
def test_a_policy_that_does_not_act_keeps_the_launch_k(mode: Mode) -> None:
    idle = planner(policy(mode=mode, acting=False, trials=(Trial(2, 1, 3, 5),)))
    for _ in range(10):
        assert idle.draft_length(2, 10) == LAUNCH_K
        assert (idle.in_trial, idle.version, idle.held_batch_size) == (False, 0, 0)
        assert idle.verify_lengths(np.full((2, LAUNCH_K), 1e-6, np.float32)).tolist() == [LAUNCH_K] * 2


def test_back_to_the_launch_k_without_a_policy() -> None:
    made = planner(policy())
    assert (made.draft_length(1, 0), made.version) == (3, 1)
    made.adopt(None)
    assert (made.draft_length(1, 0), made.version) == (LAUNCH_K, 0)


def test_trials_run_their_steps_in_turn_and_only_once() -> None:
    made = planner(policy(trials=(Trial(2, 6, 0, 3), Trial(0, 0, 0, 2), Trial(5, 7, 0, 1))))
    seen = []
    for batch_size in (2, 3, 2, 2, 3, 8, 5, 5, 5):
        held = made.held_batch_size
        seen.append((held, made.draft_length(batch_size, 0), made.in_trial))
    assert seen == [
        (2, 6, True), (2, 3, False), (2, 6, True), (2, 6, True),  # the second step had another batch size: not counted
        (0, 0, True), (0, 0, True),
        (5, 7, True), (0, 1, False), (0, 1, False),
    ]  # fmt: skip


def test_a_trial_whose_batch_size_does_not_occur_is_skipped() -> None:
    made = planner(policy(trials=(Trial(6, 6, 0, 2), Trial(2, 7, 0, 1))))
    k = [made.draft_length(2, 0) for _ in range(TRIAL_PATIENCE_STEPS + 2)]
    assert k == [3] * TRIAL_PATIENCE_STEPS + [7, 3]


def test_a_new_policy_begins_its_trials_at_the_first() -> None:
    trials = (Trial(0, 6, 0, 2), Trial(0, 7, 0, 1))
    made = planner(policy(trials=trials))
    assert [made.draft_length(1, 0) for _ in range(2)] == [6, 6]
    made.adopt(policy(version=2, trials=trials))
    assert [made.draft_length(1, 0) for _ in range(4)] == [6, 6, 7, 3]


def test_a_trial_verifies_exactly_its_tokens() -> None:
    confidences = np.array([[0.9, 0.8, 0.7], [0.95, 0.2, 0.1]], np.float32)
    for num_tokens, wanted in ((2, [0, 0]), (3, [0, 1]), (5, [2, 1]), (8, [3, 3]), (99, [3, 3]), (0, [3, 3]), (1, [0, 0])):
        made = planner(policy(trials=(Trial(2, 3, num_tokens, 1),)))
        assert made.trial_tokens == 0
        made.draft_length(2, 0)
        assert made.trial_tokens == num_tokens
        assert made.verify_lengths(confidences).tolist() == wanted
    batch = planner(policy(granularity=Granularity.BATCH, trials=(Trial(2, 3, 5, 1),)))
    batch.draft_length(2, 0)
    assert batch.verify_lengths(confidences).tolist() == [3, 3]


def test_a_tile_is_filled_with_the_likeliest_tokens_and_not_exceeded() -> None:
    confidences = np.array([[0.9, 0.9, 0.9], [0.9, 0.1, 0.1]], np.float32)
    stairs = np.ones(65, np.float32)
    stairs[7:] = 3.0  # tokens 1..6 cost the same, the seventh costs three times as much
    made = planner(policy(verify_s=stairs))
    made.draft_length(2, 0)
    assert made.verify_lengths(confidences).tolist() == [3, 1]
    stairs[7:] = 1.0
    assert made.verify_lengths(confidences).tolist() == [3, 3]
    assert np.array_equal(planner(policy(verify_all=True)).verify_lengths(confidences), [3, 3])


@pytest.mark.parametrize(
    ("fixed_s", "context_s_per_token", "kv_tokens", "wanted"),
    [(0.0, 0.0, 0, 0), (50.0, 0.0, 0, 3), (0.0, 0.01, 0, 0), (0.0, 0.01, 5000, 3)],
)
def test_fixed_time_makes_a_boundary_worth_crossing(
    fixed_s: float, context_s_per_token: float, kv_tokens: int, wanted: int
) -> None:
    steep = np.where(np.arange(65) < 2, 1.0, 4.0).astype(np.float32)
    costs = np.full((8, 9), fixed_s, np.float32)
    made = planner(policy(fixed_s=costs, context_s_per_token=context_s_per_token, verify_s=steep))
    made.draft_length(1, kv_tokens)
    assert made.verify_lengths(np.full((1, 3), 0.9, np.float32)).tolist() == [wanted]


@pytest.mark.parametrize("shape", [(3, 0), (60, 1), (9, 7)])
def test_a_step_beyond_the_tables_verifies_every_token(shape: tuple[int, int]) -> None:
    made = planner(policy())
    made.draft_length(shape[0], 0)
    lengths = made.verify_lengths(np.full(shape, 0.5, np.float32))
    assert lengths.dtype == np.uint8
    assert lengths.tolist() == [shape[1]] * shape[0]


@given(st.integers(1, 8), st.integers(0, 7), st.integers(0, 2**32 - 1))
def test_lengths_are_in_range_for_any_confidences(b: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    made = planner(policy(verify_s=rng.uniform(1e-4, 1e-2, 65).astype(np.float32)))
    made.draft_length(b, 0)
    confidences = np.maximum(rng.random((b, k)), 1e-30).astype(np.float32)
    confidences[rng.random((b, k)) < 0.2] = 1.0
    lengths = made.verify_lengths(confidences)
    assert lengths.dtype == np.uint8
    assert lengths.shape == (b,)
    assert (lengths <= k).all()


ALLOWED = np.array([[k in ((1, 3, 7) if b < 3 else (0, 1)) for k in range(8)] for b in range(9)])


def test_a_k_that_is_not_allowed_at_a_batch_size_is_replaced_and_noted() -> None:
    made = Planner(LAUNCH_K, 7, ALLOWED)
    made.adopt(policy())
    assert [(made.draft_length(b, kv), made.limited) for b, kv in ((2, 0), (2, 9999), (3, 0), (5, 0), (99, 900_000))] == [
        (3, False), (3, True), (1, True), (1, False), (1, True)
    ]  # fmt: skip


def test_a_trial_runs_only_as_asked() -> None:
    made = Planner(LAUNCH_K, 7, ALLOWED)
    made.adopt(policy(trials=(Trial(0, 7, 0, 2), Trial(0, 9, 0, 1), Trial(0, 0, 0, 1))))
    assert [(made.draft_length(b, 0), made.in_trial) for b in (5, 2, 5, 2)] == [(1, False), (7, True), (1, False), (7, True)]
    # No engine with max_k = 7 runs the second one: it is skipped.
    steps = [made.draft_length(2, 0) for _ in range(TRIAL_PATIENCE_STEPS)]
    assert (set(steps), made.in_trial) == ({3}, False)
    assert made.draft_length(5, 0) == 0
    assert (made.in_trial, made.limited) == (True, False)


def test_it_remembers_the_k_that_ran_and_for_how_long() -> None:
    made = planner(policy())
    made.move(made.draft_length(2, 0))
    seen = []
    for moved_to in (2, 2, 2, 3):
        made.draft_length(2, 0)
        seen.append((made.last_k, made.stayed, made.last_moved))
        made.move(moved_to)
    made.draft_length(2, 0)
    assert [*seen, (made.last_k, made.stayed, made.last_moved)] == [
        (3, 1, False), (2, 1, True), (2, 2, True), (2, 3, True), (3, 1, False)
    ]  # fmt: skip


@pytest.mark.parametrize("b", [1, 3, 8])
@pytest.mark.parametrize("rails", [(0, 2), (2, 7), (1, 3), (3, 3), (0, 0), (9, 32)])
def test_an_engine_that_always_drafts_one_k_verifies_within_the_rails(b: int, rails: tuple[int, int]) -> None:
    """By the table, in trials and pinned; which tokens is the choice of their confidences, as without rails."""
    low, high = (b * min(rail, 7) for rail in rails)
    dear = np.where(np.arange(65) > b, 1.0, 1e-3).astype(np.float32)
    confidences = np.random.default_rng(b).random((b, 7)).astype(np.float32)
    one = np.zeros((9, 8), np.bool_)
    one[:, 7] = True
    for changes, free in (
        ({}, b * 7), ({"verify_s": dear}, 0), ({"verify_all": True}, b * 7), ({"trials": (Trial(0, 7, 0, 1),)}, b * 7),
        ({"trials": (Trial(0, 7, b + 1, 1),)}, 1), ({"trials": (Trial(0, 7, b, 1),)}, 0),
    ):  # fmt: skip
        made = Planner(7, 7, one)
        made.adopt(policy(k_min=rails[0], k_max=rails[1], **changes))
        assert made.draft_length(b, 0) == 7
        lengths = made.verify_lengths(confidences)
        assert lengths.sum() == min(max(free, low), high)
        survival = np.cumprod(confidences, axis=1)
        verified = np.arange(7) < lengths[:, None]
        if 0 < lengths.sum() < b * 7:
            assert survival[verified].min() >= survival[~verified].max()


def test_rails_of_k_do_not_limit_what_is_verified_of_it() -> None:
    made = planner(policy(k_min=3, k_max=3, trials=(Trial(0, 3, 2, 1),)))
    assert made.draft_length(2, 0) == 3
    assert made.verify_lengths(np.full((2, 3), 0.5, np.float32)).tolist() == [0, 0]
