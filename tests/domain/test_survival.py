"""Survival maps: tables of calibrated probabilities, applied to confidences."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptive_spec.domain.survival import GRID_POINTS, LOGIT_LIMIT, SurvivalMap

GRID = np.linspace(-LOGIT_LIMIT, LOGIT_LIMIT, GRID_POINTS)
IDENTITY = (1.0 / (1.0 + np.exp(-GRID))).astype(np.float32)


@given(
    st.integers(1, 6).flatmap(
        lambda k: st.lists(
            st.lists(st.floats(0.0, 1.0, width=32, exclude_min=True), min_size=k, max_size=k), min_size=1, max_size=5
        )
    ),
    st.integers(0, 2**32 - 1),
    st.booleans(),
)
def test_survival_never_increases_along_a_chain(values: list[list[float]], seed: int, conditional: bool) -> None:
    confidences = np.array(values, np.float32)
    table = np.random.default_rng(seed).random((7, GRID_POINTS)).astype(np.float32)
    survival = SurvivalMap(table, conditional).survival(confidences)
    assert survival.shape == confidences.shape
    assert ((survival >= 0.0) & (survival <= 1.0)).all()
    assert (np.diff(survival, axis=1) <= 0.0).all()


@pytest.mark.parametrize("conditional", [True, False])
def test_the_identity_map_gives_the_cumulative_score(conditional: bool) -> None:
    confidences = np.random.default_rng(3).uniform(0.3, 0.999, (50, 7)).astype(np.float32)
    survival = SurvivalMap(np.tile(IDENTITY, (7, 1)), conditional).survival(confidences)
    np.testing.assert_allclose(survival, np.cumprod(confidences, axis=1), atol=0.006)


def test_each_position_has_its_own_row() -> None:
    table = np.stack([np.full(GRID_POINTS, value, np.float32) for value in (0.5, 0.25, 0.75)])
    confidences = np.full((2, 3), 0.6, np.float32)
    np.testing.assert_allclose(SurvivalMap(table, True).survival(confidences), [[0.5, 0.125, 0.09375]] * 2)
    np.testing.assert_allclose(SurvivalMap(table, False).survival(confidences), [[0.5, 0.25, 0.25]] * 2)


def test_one_first_token_is_as_one_of_many() -> None:
    random = np.random.default_rng(5)
    calibration = SurvivalMap(np.sort(random.random((3, GRID_POINTS))).astype(np.float32), conditional=True)
    confidences = [0.0, 1e-9, 0.5, 1.0, *random.random(200).tolist()]
    together = calibration.survival(np.array(confidences)[:, None])[:, 0]
    np.testing.assert_allclose([calibration.first(c) for c in confidences], together, rtol=1e-12)
