"""K of one step from the requests in it: acceptance history, survival, and the choice."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from adaptive_spec.domain import acceptance_history
from adaptive_spec.domain.acceptance_history import AcceptanceHistory
from adaptive_spec.domain.policy import Granularity, Mode, Policy, Trial
from adaptive_spec.domain.survival import GRID_POINTS, LOGIT_LIMIT, SurvivalMap
from adaptive_spec.engine_side.planner import Planner
from adaptive_spec.engine_side.step_choice import MAX_DWELL_STEPS, best_k, dwell_steps, refined_k, survival

MAX_K = 5
CANDIDATES = (0, 1, 3, 5)
GRID = 1.0 / (1.0 + np.exp(-np.linspace(-LOGIT_LIMIT, LOGIT_LIMIT, GRID_POINTS)))
USUAL = np.cumprod(np.full(MAX_K, 0.7))
IDENTITY = SurvivalMap(np.tile(GRID, (MAX_K, 1)).astype(np.float32), conditional=True)


def _policy(per_draft_s: float = 0.2, per_token_s: float = 0.02) -> Policy:
    fixed = np.tile(np.arange(MAX_K + 1)[:, None] * per_draft_s, (1, 9))
    verify = 1.0 + per_token_s * np.arange(8 * (MAX_K + 1) + 1)
    table = np.full((9, 1), 3, np.uint8)
    return Policy(
        1, Mode.ACTIVE, True, Granularity.BATCH, MAX_K, table, np.zeros(0, np.float32), fixed.astype(np.float32),
        verify.astype(np.float32), 0.0, IDENTITY, True,
    )  # fmt: skip


def _seen(rates: dict[int, float], steps: int = 400, k: int = MAX_K) -> AcceptanceHistory:
    random = np.random.default_rng(0)
    history = AcceptanceHistory(MAX_K, 16)
    for _ in range(steps):
        right = random.random((len(rates), k)) < np.array(list(rates.values()))[:, None]
        history.observe(list(rates), np.cumprod(right, axis=1).sum(axis=1).astype(np.uint8), k)
    return history


def test_history_finds_each_requests_own_rate() -> None:
    rates = {1: 0.95, 2: 0.5, 3: 0.1}
    chance = np.mean([_seen(rates, steps).conditional([1, 2, 3])[:, 0] for steps in range(100, 400, 20)], axis=0)
    # Shrunk towards the population's rate with the weight of PRIOR_STEPS.
    assert chance[0] > 0.75
    assert chance[1] == pytest.approx(0.5, abs=0.12)
    assert chance[2] < 0.3


def test_a_request_whose_draft_is_too_sure_of_itself_is_corrected() -> None:
    """Of two requests with the same confidence of 0.7, one is accepted as often as that says, the other never."""
    random, history = np.random.default_rng(1), AcceptanceHistory(MAX_K, 16)
    calibrated = [0.7, 0.7, math.nan]
    assert history.first_tokens([1, 2, 3], calibrated)[:2] == [0.7, 0.7]
    for _ in range(60):
        history.first_tokens([1, 2, 3], calibrated)
        history.observe([1, 2, 3], np.array([random.random() < 0.7, 0, 1], np.uint8), 1)
    right, wrong, unknown = history.first_tokens([1, 2, 3], calibrated)
    assert right == pytest.approx(0.7, abs=0.1)
    assert wrong < 0.2
    assert math.isnan(unknown)
    assert history.first_tokens([4], [0.7]) == pytest.approx([0.7]), "a new request has no record"
    assert history.first_tokens([1], [1.0])[0] <= 1.0


def test_only_steps_with_a_calibrated_confidence_and_a_verified_token_correct_it() -> None:
    history, calibrated = AcceptanceHistory(MAX_K, 16), [0.7]
    for _ in range(40):
        history.observe([1], np.zeros(1, np.uint8), 3)  # nothing was predicted
        history.first_tokens([1], calibrated)
        history.observe([1], np.zeros(1, np.uint8), 0)  # nothing was verified
        history.first_tokens([1], calibrated)
        history.observe([2], np.zeros(1, np.uint8), 3)  # of another request
    assert history.first_tokens([1], calibrated) == pytest.approx([0.7])


def test_a_draft_that_is_never_right_leaves_a_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate of all requests falls below every float, at the decay of 0.995 after 150 000 steps."""
    monkeypatch.setattr(acceptance_history, "POPULATION_DECAY", 0.1)
    history = AcceptanceHistory(MAX_K, 16)
    for _ in range(400):
        history.observe([1], np.zeros(1, np.uint8), 1)
    assert history.usual[0] == 0.0
    assert history.first_tokens([2], [0.7]) == pytest.approx([0.7])


def test_two_requests_of_one_number_are_told_apart_in_their_step() -> None:
    """Numbers are checksums of names, so two requests of a batch may share one."""
    history = AcceptanceHistory(MAX_K, 16)
    assert history.first_tokens([1, 1, 2], [0.2, 0.9, 0.5]) == pytest.approx([0.2, 0.9, 0.5])
    for _ in range(100):
        history.first_tokens([1, 1, 2], [0.2, 0.9, 0.5])
        history.observe([1, 1, 2], np.array([0, 1, 0], np.uint8), 3)
    first, second, third = history.first_tokens([1, 1, 2], [0.2, 0.9, 0.5])
    assert first / second == pytest.approx(0.2 / 0.9, rel=0.05), "one record for both"
    assert third < 0.25


def test_a_dropped_requests_record_is_not_the_next_ones() -> None:
    history, calibrated = AcceptanceHistory(MAX_K, 1), [0.7]
    for _ in range(40):
        history.first_tokens([1], calibrated)
        history.observe([1], np.zeros(1, np.uint8), 3)
    history.observe([2], np.ones(1, np.uint8), 1)
    assert history.first_tokens([2], calibrated) == pytest.approx([0.7])


def test_asking_for_rates_changes_nothing() -> None:
    """Also not which request is the oldest: an unknown one is not remembered for having been asked about."""
    asked, untouched = _seen({1: 0.95, 2: 0.1}, steps=20), _seen({1: 0.95, 2: 0.1}, steps=20)
    before = asked.conditional([1, 2, 99])
    for _ in range(20):
        asked.conditional([99, 2, 1])
    np.testing.assert_array_equal(asked.conditional([1, 2, 99]), before)
    np.testing.assert_array_equal(untouched.conditional([1, 2, 99]), before)
    assert len(asked) == 2


def test_a_request_that_is_not_the_first_gets_its_own_row() -> None:
    chance = _seen({7: 0.95, 8: 0.1}).conditional([8, 99, 7])[:, 0]
    assert chance[2] > chance[1] > chance[0]


def test_unknown_request_is_the_population() -> None:
    history = _seen({1: 0.9, 2: 0.9})
    assert history.conditional([99])[0, 0] == pytest.approx(0.9, abs=0.06)


def test_positions_behind_the_first_error_say_nothing() -> None:
    history = AcceptanceHistory(MAX_K, 4)
    before = history.conditional([1])[0]
    for _ in range(50):
        history.observe([1], np.array([1], np.uint8), 5)
    after = history.conditional([1])[0]
    assert after[0] > 0.9
    assert after[1] < 0.2
    assert after[2:] == pytest.approx(before[2:])


def test_memory_is_bounded_and_the_oldest_goes_first() -> None:
    history = AcceptanceHistory(MAX_K, 4)
    for request in range(100):
        history.observe([request, 7_000], np.array([5, 0], np.uint8), 5)
    assert len(history) == 4
    assert history.conditional([7_000])[0, 0] < 0.2, "used in every step, so never dropped"


def test_high_predicted_acceptance_drafts_longer_and_low_shorter() -> None:
    policy = _policy()
    history = _seen({1: 0.7, 2: 0.7})
    chances = history.conditional([1, 2])

    def k_for(*first: float) -> int:
        return best_k(survival(chances, np.array(first), IDENTITY), USUAL, policy, 3, 100, 2, CANDIDATES)

    assert k_for(0.02, 0.03) == 0
    assert k_for(0.99, 0.99) == 3, "sure first tokens alone do not make the fifth likely"
    # The same first tokens, from requests with a better history.
    reliable = _seen({1: 0.97, 2: 0.97}).conditional([1, 2])
    assert best_k(survival(reliable, None, IDENTITY), USUAL, policy, 3, 100, 2, CANDIDATES) == 5


def _goodput(policy: Policy, tokens_out: float, b: int, k: int) -> float:
    return tokens_out / (float(policy.fixed_s[k, b]) + float(policy.verify_s[b * (k + 1)]))


def _random_chances(random: np.random.Generator, b: int) -> NDArray[np.float64]:
    return np.cumprod(random.random((b, MAX_K)) ** 0.3, axis=1, dtype=np.float64)


def test_the_choice_has_the_highest_goodput_where_the_tables_k_is_best_for_usual_requests() -> None:
    random = np.random.default_rng(1)
    policy = _policy()
    moved = 0
    for _ in range(200):
        b = int(random.integers(1, 9))
        chances, usual = _random_chances(random, b), _random_chances(random, 1)[0]
        worth = {k: _goodput(policy, b * (1 + float(usual[:k].sum())), b, k) for k in CANDIDATES}
        table_k = max(worth, key=worth.__getitem__)
        goodput = {k: _goodput(policy, b + float(chances[:, :k].sum()), b, k) for k in CANDIDATES}
        chosen = best_k(chances, usual, policy, table_k, 100, b, CANDIDATES, min_gain=0.0)
        assert goodput[chosen] == pytest.approx(max(goodput.values()))
        moved += chosen != table_k
        assert best_k(chances, usual, policy, table_k, 100, b, CANDIDATES, min_gain=10.0) == table_k
    assert moved > 20


@pytest.mark.parametrize("table_k", CANDIDATES)
def test_a_usual_batch_stays_on_the_tables_k_whatever_it_is(table_k: int) -> None:
    random = np.random.default_rng(2)
    for _ in range(50):
        usual = _random_chances(random, 1)[0]
        assert best_k(np.tile(usual, (4, 1)), usual, _policy(), table_k, 100, 4, CANDIDATES) == table_k


def test_padded_requests_cost_time() -> None:
    usual = np.cumprod(np.full(MAX_K, 0.8))
    sure = np.ones((3, MAX_K))
    policy = _policy(0.0, 0.02)
    cliff = policy.verify_s.copy()
    cliff[4 * 4 :] *= 3.0  # behind 3 requests at K = 3 padded to 4
    policy = replace(policy, verify_s=cliff)
    assert best_k(sure, usual, policy, 1, 0, 3, CANDIDATES) == 3
    assert best_k(sure, usual, policy, 1, 0, 4, CANDIDATES) == 1


@pytest.mark.parametrize("first", [np.array([0.0, 1.5]), np.array([np.nan, -1.0])])
def test_confidences_outside_their_range_are_unknown(first: NDArray[np.float64]) -> None:
    chances = _seen({1: 0.7}).conditional([1, 1])
    assert np.array_equal(survival(chances, first, IDENTITY), survival(chances, None, IDENTITY))


def test_a_k_without_a_prediction_is_never_chosen() -> None:
    sure = np.ones((8, MAX_K))
    assert best_k(sure, USUAL, _policy(0.0, 0.0), 3, 0, 8, (0, 1, 3, 5, 7)) == 5


def _refined(policy: Policy | None, candidates: tuple[int, ...] = CANDIDATES) -> int:
    """K for two requests of high acceptance, where the table says 3."""
    planner = Planner(3, MAX_K)
    planner.adopt(policy)
    table_k = planner.draft_length(2, 100)
    return refined_k(_seen({1: 0.97, 2: 0.97, 3: 0.3, 4: 0.3}), planner, [1, 2], None, table_k, 100, 2, candidates)


def test_an_active_policy_leaves_the_choice_to_the_step() -> None:
    assert _refined(_policy()) == 5


def test_after_a_change_of_all_traffic_the_choice_corrects_the_table_until_a_new_one_comes() -> None:
    """What is usual is what the table was made for: else the choice would give up as the new traffic became usual."""
    history, planner = _seen({1: 0.3}), Planner(3, MAX_K)
    short = replace(_policy(), k_table=np.full((9, 1), 1, np.uint8))

    def chosen(request: int) -> int:
        return refined_k(history, planner, [request], None, planner.draft_length(1, 100), 100, 1, CANDIDATES)

    planner.adopt(short)
    assert chosen(1) == 1
    for step in range(3000):
        history.observe([2], np.full(1, MAX_K, np.uint8), MAX_K)
        if step % 100 == 0:
            planner.adopt(replace(short, version=2 + step))  # a new version, the same table
    assert chosen(2) == MAX_K
    planner.adopt(replace(short, version=10_000, k_table=np.full((9, 1), 3, np.uint8)))
    assert chosen(2) == 3, "the new table was made for this traffic"


@pytest.mark.parametrize("rate", [0.7, 0.9])
@pytest.mark.parametrize("table_k", [1, 3])
def test_a_table_from_a_profile_is_kept_by_usual_requests_from_the_first_step_on(rate: float, table_k: int) -> None:
    """The table comes before anything is known of the requests: what was assumed then is no baseline."""
    random, history, planner = np.random.default_rng(7), AcceptanceHistory(MAX_K, 64), Planner(3, MAX_K)
    planner.adopt(replace(_policy(), k_table=np.full((9, 1), table_k, np.uint8)))
    moved = 0
    for step in range(3000):
        ids = [step // 30]
        k = refined_k(history, planner, ids, None, planner.draft_length(1, 100), 100, 1, CANDIDATES)
        right = np.cumprod(random.random(MAX_K) < rate)
        history.observe(ids, np.array([right[:k].sum()], np.uint8), k)
        moved += k != table_k and step > 500
    assert moved < 0.4 * 2500


def test_a_table_that_stays_for_long_holds_for_the_present_traffic() -> None:
    history, planner = _seen({1: 0.3}, steps=1500), Planner(3, MAX_K)
    planner.adopt(replace(_policy(), k_table=np.full((9, 1), 1, np.uint8)))
    before = history.usual_of(planner.tables)[0]
    for _ in range(6000):
        history.observe([2], np.full(1, MAX_K, np.uint8), MAX_K)
        history.usual_of(planner.tables)
    assert before < 0.5
    assert history.usual_of(planner.tables)[0] > 0.95


def test_without_a_policy_the_launch_k_stays() -> None:
    assert _refined(None) == 3


@pytest.mark.parametrize("mode", [mode for mode in Mode if mode is not Mode.ACTIVE])
def test_in_every_other_mode_the_tables_k_stays(mode: Mode) -> None:
    assert _refined(replace(_policy(), mode=mode)) == 3


def test_in_a_trial_its_own_k_stays() -> None:
    assert _refined(replace(_policy(), trials=(Trial(0, 1, 0, 1),))) == 1


def test_with_a_single_candidate_there_is_no_choice() -> None:
    assert _refined(_policy(), (3,)) == 3


def test_only_what_the_policy_allows_at_this_batch_size() -> None:
    limited = replace(_policy(0.0, 0.0), allowed_from=((1, (0, 1, 3, 5)), (4, (1, 3))))
    assert best_k(np.ones((3, MAX_K)), USUAL, limited, 3, 0, 3, CANDIDATES) == 5
    assert best_k(np.ones((4, MAX_K)), USUAL, limited, 3, 0, 4, CANDIDATES) == 3


def test_the_least_gain_that_counts_pays_for_a_change_within_the_dwell() -> None:
    policy = _policy()
    assert dwell_steps(policy, 0.01) == 0
    for switch_s, step_s, steps in ((0.0003, 0.01, 3), (1e-6, 0.01, 1), (1.0, 0.01, MAX_DWELL_STEPS)):
        assert dwell_steps(replace(policy, switch_s=switch_s), step_s) == steps
    assert dwell_steps(replace(policy, switch_s=0.1, min_gain=0.0), 0.01) == MAX_DWELL_STEPS


def test_a_change_must_gain_what_it_costs() -> None:
    policy, chances = _policy(), np.tile(np.cumprod(np.full(MAX_K, 0.9)), (4, 1))
    assert best_k(chances, USUAL, policy, 3, 0, 4, CANDIDATES, running_k=3) == 5
    costly = replace(policy, switch_s=64.0)
    assert best_k(chances, USUAL, costly, 3, 0, 4, CANDIDATES, running_k=3) == 3
    assert best_k(chances, USUAL, costly, 3, 0, 4, CANDIDATES, running_k=5) == 5
    assert best_k(chances, USUAL, costly, 3, 0, 4, CANDIDATES) == 5, "nothing runs yet, so nothing is charged"


def test_a_k_chosen_for_a_step_stays_for_the_dwell() -> None:
    def chosen(switch_s: float) -> list[int]:
        planner = Planner(3, MAX_K)
        planner.adopt(replace(_policy(), switch_s=switch_s))
        histories = {rate: _seen({1: rate, 2: rate}) for rate in (0.95, 0.2)}
        found = []
        for i in range(60):
            history = histories[0.95 if i % 4 < 2 else 0.2]
            table_k = planner.draft_length(2, 0)
            found.append(refined_k(history, planner, [1, 2], np.array([0.99, 0.99] if i % 4 < 2 else [0.02, 0.02]), table_k, 0, 2,
                                   CANDIDATES))  # fmt: skip
        return found

    def changes(found: list[int]) -> int:
        return sum(a != b for a, b in itertools.pairwise(found))

    free, costly = chosen(0.0), chosen(0.2)
    assert changes(free) > 25
    assert changes(costly) <= 60 / dwell_steps(replace(_policy(), switch_s=0.2), 2.0)


def test_positions_that_were_cut_off_fade_towards_all_requests() -> None:
    """A request that is cut to nothing is tried again in time; verified to the full, it is not forgotten."""
    cut, kept = AcceptanceHistory(4, 8), AcceptanceHistory(4, 8)
    for history in (cut, kept):
        for _ in range(30):
            history.observe([1, 2], np.array([4, 0], np.uint8), 4)
    assert cut.conditional([2])[0, 0] < 0.5
    for _ in range(200):
        cut.observe([1, 2], np.array([4, 0], np.uint8), np.array([4, 0], np.uint8))
        kept.observe([1, 2], np.array([4, 0], np.uint8), np.array([4, 4], np.uint8))
    assert cut.conditional([2])[0, 0] > 0.8
    assert kept.conditional([2])[0, 0] < 0.3
