from __future__ import annotations

import numpy as np
import pytest

from adaptive_spec.models.acceptance.draft_imputation import DONOR_STEPS, DONORS, MIN_DONORS, NEWEST_ROWS, ROWS, RecentDrafts


def drafts(rng: np.random.Generator, rows: int, k: int, sure: float) -> np.ndarray:
    """Confidences whose positions resemble the one before: a confident draft stays confident."""
    level = np.clip(rng.normal(sure, 0.2, (rows, 1)), 0.05, 0.95)
    return np.clip(level + rng.normal(0.0, 0.03, (rows, k)), 0.01, 1.0).astype(np.float32)


def test_missing_positions_are_imputed_from_pairs_with_a_similar_first_value() -> None:
    rng = np.random.default_rng(0)
    recent = RecentDrafts(4)
    deep = drafts(rng, DONORS, 4, 0.5)
    recent.remember(deep, np.full(DONORS, 4), step=1)
    shallow = drafts(rng, ROWS, 4, 0.8)
    recent.remember(shallow[:, :2], np.full(ROWS, 2), step=2)
    rows = recent.rows(2)
    assert rows.shape == (ROWS, 4)
    assert not np.isnan(rows).any()
    assert rows[:, 2].mean() == pytest.approx(shallow[:, 2].mean(), abs=0.03), "not the 0.5 the deep ones were on average"
    assert rows[:, 3].std() == pytest.approx(shallow[:, 3].std(), rel=0.3), "the spread between requests stays"
    np.testing.assert_allclose(rows[:, :2], shallow[::-1, :2])


def test_too_few_donors_impute_nothing() -> None:
    rng = np.random.default_rng(1)
    recent = RecentDrafts(3)
    recent.remember(drafts(rng, MIN_DONORS - 1, 3, 0.5), np.full(MIN_DONORS - 1, 3), step=1)
    recent.remember(drafts(rng, 8, 1, 0.5), np.full(8, 1), step=2)
    rows = recent.rows(2)
    assert np.isnan(rows[:8, 1:]).all()
    assert not np.isnan(rows[8:]).any()


def test_old_donors_are_used_only_where_newer_ones_are_too_few() -> None:
    rng = np.random.default_rng(3)
    recent = RecentDrafts(2)
    recent.remember(
        np.column_stack((rng.uniform(0.4, 0.6, DONORS), np.full(DONORS, 0.1))).astype(np.float32), np.full(DONORS, 2), 1
    )
    new = np.column_stack((rng.uniform(0.4, 0.6, 2 * MIN_DONORS), np.full(2 * MIN_DONORS, 0.9))).astype(np.float32)
    recent.remember(new, np.full(len(new), 2), DONOR_STEPS)
    recent.remember(np.full((ROWS, 1), 0.5, dtype=np.float32), np.full(ROWS, 1), DONOR_STEPS)
    assert 0.1 < recent.rows(DONOR_STEPS)[:, 1].mean() < 0.9
    assert recent.rows(DONOR_STEPS + 2)[:, 1].mean() == pytest.approx(0.9)
    recent.drop_old_donors(3 * DONOR_STEPS)
    assert np.isnan(recent.rows(3 * DONOR_STEPS)[:, 1]).all()


def test_old_drafts_are_left_out_unless_there_are_few() -> None:
    recent = RecentDrafts(1)
    for step in range(1000):
        recent.remember(np.array([[0.5]], dtype=np.float32), np.array([1]), step)
    assert len(recent.rows(999)) == 100
    assert len(recent.rows(50_000)) == NEWEST_ROWS


def test_state_round_trip_and_refusal() -> None:
    recent, twin = RecentDrafts(3), RecentDrafts(3)
    recent.remember(drafts(np.random.default_rng(2), 100, 2, 0.6), np.full(100, 2), step=7)
    twin.restore(recent.state())
    np.testing.assert_array_equal(twin.rows(0), recent.rows(7))
    state = recent.state()
    state["recent"][-1, 0] = 1.5
    with pytest.raises(ValueError, match="recent must hold"):
        twin.restore(state)
    with pytest.raises(ValueError, match="decks has shape"):
        RecentDrafts(4).restore({**recent.state(), "recent": np.full((ROWS, 4), np.nan)})
