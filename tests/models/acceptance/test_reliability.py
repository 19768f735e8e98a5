from __future__ import annotations

import numpy as np
import pytest

from adaptive_spec.models.acceptance.reliability import BINS, Reliability


def filled(predicted: float, labels: list[bool], score: float = 0.5) -> Reliability:
    reliability, n = Reliability(), len(labels)
    p = np.full(n, predicted)
    hit = np.array(labels)
    reliability.add(p, np.full(n, score), hit, -np.log(np.where(hit, p, 1.0 - p)))
    return reliability


def test_without_data_nothing_is_known() -> None:
    reliability = Reliability()
    assert (reliability.ece, reliability.brier, reliability.log_loss, reliability.curve()) == (None, None, None, ())


def test_scores_of_a_constant_prediction() -> None:
    reliability = filled(0.8, [True, True, False, False])
    assert reliability.ece == pytest.approx(0.3)
    assert reliability.brier == pytest.approx((2 * 0.04 + 2 * 0.64) / 4)
    assert reliability.log_loss == pytest.approx(-(np.log(0.8) + np.log(0.2)) / 2)


def test_errors_in_different_bins_do_not_cancel() -> None:
    reliability = filled(0.9, [True, False])
    low = np.array([0.1, 0.1])
    reliability.add(low, low, np.array([True, False]), np.zeros(2))
    assert reliability.ece == pytest.approx(0.4)


def test_the_curve_is_by_cumulative_score() -> None:
    ((centre, predicted, observed, weight),) = filled(0.8, [True, True, True, False], score=1.0).curve()
    assert centre == pytest.approx(1.0 - 0.5 / BINS), "a score of 1 belongs to the last bin"
    assert (predicted, observed, weight) == (pytest.approx(0.8), 0.75, 4)


def test_forgetting_keeps_the_scores_and_lets_newer_labels_count_more() -> None:
    reliability = filled(0.8, [True, False])
    before = reliability.brier
    reliability.forget(0.01)
    assert reliability.brier == pytest.approx(before)
    assert reliability.curve() == (), "less than one label is left"
    perfect = np.ones(2)
    reliability.add(perfect, perfect, np.array([True, True]), np.zeros(2))
    assert reliability.brier == pytest.approx(0.01 * 0.68 / 2.02)
