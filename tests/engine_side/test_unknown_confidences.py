"""Verify lengths at request granularity where confidences are unknown."""

from __future__ import annotations

import numpy as np

from adaptive_spec.domain.policy import Trial
from adaptive_spec.domain.step_record import UNKNOWN_CONFIDENCE
from adaptive_spec.models.acceptance.calibration_maps import rate_map
from tests.engine_side.test_planner import planner, policy


def test_a_request_of_unknown_confidence_counts_as_the_mean_of_the_others() -> None:
    stairs = np.ones(65, np.float32)
    stairs[10:] = 30.0  # three requests and six draft tokens cost the same
    made = planner(policy(verify_s=stairs))
    made.draft_length(3, 0)
    rows = np.array([[0.95, 0.95, 0.95], [0.5, 0.1, 0.1], [0.9, 0.9, 0.9]], np.float32)
    assert made.verify_lengths(rows).tolist() == [3, 0, 3]
    rows[2, 1] = UNKNOWN_CONFIDENCE  # now 0.73, 0.48, 0.43: its third token comes behind the first one of the second request
    assert made.verify_lengths(rows).tolist() == [3, 1, 2]


def test_where_nothing_is_known_the_rates_decide_and_requests_are_alike() -> None:
    stairs = np.where(np.arange(65) < 5, 1.0, 1.3).astype(np.float32)
    for rate, wanted in ((0.1, [1, 1]), (0.8, [3, 3])):
        made = planner(policy(verify_s=stairs, survival=rate_map(np.full(7, rate))))
        made.draft_length(2, 0)
        assert made.verify_lengths(np.full((2, 3), UNKNOWN_CONFIDENCE, np.float32)).tolist() == wanted


def test_a_trial_without_confidences_takes_first_tokens_first() -> None:
    for num_tokens, wanted in ((3, [0, 0, 0]), (4, [1, 0, 0]), (6, [1, 1, 1]), (8, [2, 2, 1]), (12, [3, 3, 3])):
        made = planner(policy(trials=(Trial(3, 3, num_tokens, 1),)))
        made.draft_length(3, 0)
        assert made.verify_lengths(np.zeros((3, 3), np.float32)).tolist() == wanted
