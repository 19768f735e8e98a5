from __future__ import annotations

import numpy as np

from adaptive_spec.models.acceptance.calibration_maps import (
    GRID_SCORE,
    ScoreHistogram,
    binned_map,
    chain_map,
    fit_logistic,
    linear_map,
)


def test_every_map_is_a_probability_and_rises_with_the_score() -> None:
    rng = np.random.default_rng(8)
    histogram = ScoreHistogram(3)
    index = rng.integers(0, 81, 3000)
    histogram.add(rng.integers(0, 3, 3000), index, rng.random(3000) < GRID_SCORE[index])
    for candidate in (linear_map(histogram), binned_map(histogram), chain_map(histogram)):
        assert candidate.table.shape == (3, 81)
        assert ((candidate.table > 0) & (candidate.table < 1)).all()
        assert (np.diff(candidate.table, axis=1) >= -1e-6).all()


def test_logistic_regression_without_data_is_its_prior() -> None:
    prior = np.array([[0.3, 0.9]])
    empty = np.zeros((1, 81))
    np.testing.assert_allclose(fit_logistic(empty, empty, prior, 8.0), prior)
