from __future__ import annotations

import numpy as np
import pytest

from adaptive_spec.offline.fit_pairs import fit_pairs


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_fit_pairs_recovers_a_curve_and_reports_honest_scores(power: float) -> None:
    rng = np.random.default_rng(7)
    score = rng.uniform(0.01, 1.0, 8000)
    fit = fit_pairs(score, rng.random(8000) < score**power)
    at = np.array([0.2, 0.5, 0.8, 0.95])
    np.testing.assert_allclose(fit.predict(at), at**power, atol=0.06)
    truth = score**power
    floor = float(-(truth * np.log(truth) + (1 - truth) * np.log(np.maximum(1 - truth, 1e-12))).mean())
    assert floor - 0.01 < fit.log_loss < floor + 0.03
    assert fit.samples == 8000


def test_fit_pairs_of_a_single_pair() -> None:
    fit = fit_pairs(np.array([0.5]), np.array([True]))
    assert 0.0 < fit.predict(np.array([0.5]))[0] < 1.0
