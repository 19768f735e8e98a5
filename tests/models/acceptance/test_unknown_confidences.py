"""Acceptance learnt from counts, where the confidences of some or of all draft tokens are unknown."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from adaptive_spec.domain.step_record import UNKNOWN_CONFIDENCE, StepRecord
from adaptive_spec.models.acceptance.online import AcceptanceModel
from adaptive_spec.models.acceptance.position_counts import PositionCounts
from tests.support.simulated_drafts import full_record


def unknown(record: StepRecord, rows: slice = slice(None), positions: slice = slice(None)) -> StepRecord:
    """The record with these confidences unknown."""
    confidences = record.confidences.copy()
    confidences[rows, positions] = UNKNOWN_CONFIDENCE
    return replace(record, confidences=confidences)


def learnt(records: list[StepRecord], k: int = 5, memory: float = np.inf) -> AcceptanceModel:
    model = AcceptanceModel(k, memory)
    for record in records:
        model.observe(record)
    model.learn()
    model.refit()
    return model


def records(count: int, seed: int = 0, rows: int = 16, k: int = 5, accept: float = 0.8) -> list[StepRecord]:
    rng = np.random.default_rng(seed)
    return [full_record(rng, rows, k, accept=accept) for _ in range(count)]


def test_rates_do_not_depend_on_what_is_known() -> None:
    made = records(100)
    whole = learnt(made).conditional_rates()
    for some in (
        [unknown(record) for record in made],
        [unknown(record, rows=slice(0, None, 2)) for record in made],
        [unknown(record, positions=slice(2, 3)) for record in made],
    ):
        model = learnt(some)
        for found, wanted in zip(model.conditional_rates(), whole, strict=True):
            np.testing.assert_allclose(found, wanted)
        assert model.samples == 100 * 16 * 5


def test_without_confidences_survival_is_the_product_of_the_rates() -> None:
    model = learnt([unknown(record) for record in records(100)])
    rates, _ = model.conditional_rates()
    assert rates == pytest.approx(np.full(5, 0.8), abs=0.03)
    survival = model.recent_survival()
    assert len(survival) == 512
    np.testing.assert_allclose(survival, np.tile(np.cumprod(rates), (512, 1)))
    assert model.reliability.ece is None, "there is nothing to be calibrated"
    for confidence in (0.1, 0.5, 0.99):
        found = model.survival.survival(np.full((1, 5), confidence, np.float32))
        np.testing.assert_allclose(found[0], np.cumprod(rates), rtol=1e-5)


def test_only_known_confidences_teach_the_maps() -> None:
    """Every other request without: the same calibration as if these requests had not been there."""
    made = records(60)
    some = learnt([unknown(record, rows=slice(1, None, 2)) for record in made])
    half = learnt([
        replace(record, confidences=record.confidences[::2], verify_len=record.verify_len[::2],
                accept_len=record.accept_len[::2], request_ids=record.request_ids[::2])
        for record in made
    ])  # fmt: skip
    for kind in ("chain", "binned", "linear"):
        np.testing.assert_allclose(some.maps[kind].table, half.maps[kind].table)
    np.testing.assert_allclose(some.reliability.by_prediction, half.reliability.by_prediction)
    assert some.samples == 2 * half.samples


def test_tokens_behind_an_unknown_confidence_are_not_scored() -> None:
    record = unknown(records(1)[0], positions=slice(2, 3))
    model = AcceptanceModel(5, np.inf)
    model.observe(record)
    (score,) = model.learn()
    assert score.tokens == 16 * 2
    assert score.accepted == np.minimum(record.accept_len, 2).sum()
    assert 0.0 < score.unscored < 16 * 3
    assert model.at_risk.verified.sum(1)[2:].tolist() == [0, 0, 0]
    assert model.unscored.verified[:2].tolist() == [0, 0]
    assert model.unscored.verified[2] == (record.accept_len >= 2).sum()


def test_what_is_expected_of_unscored_tokens_comes_true() -> None:
    model = AcceptanceModel(5, 400)
    rng = np.random.default_rng(3)
    expected = accepted = 0.0
    for step in range(300):
        record = unknown(full_record(rng, 16, 5))
        model.observe(record)
        (score,) = model.learn()
        assert (score.tokens, score.expected, score.accepted) == (0, 0.0, 0)
        if step >= 50:
            expected += score.unscored
            accepted += float(record.accept_len.sum())
    assert expected == pytest.approx(accepted, rel=0.02)


def test_recent_drafts_of_unknown_confidence_count_as_usual_ones() -> None:
    """Half the requests sure of themselves, the other half unknown: expected is the mean of both, not that of the sure ones."""
    made = records(100)
    model = learnt([unknown(record, rows=slice(0, 8)) for record in made])
    rates, _ = model.conditional_rates()
    survival = model.recent_survival()
    usual = (np.abs(survival - np.cumprod(rates)) < 1e-12).all(axis=1)
    assert usual.sum() == 256
    known = learnt([unknown(record, rows=slice(0, 0)) for record in made]).recent_survival()
    assert survival.mean(axis=0) == pytest.approx(known.mean(axis=0), abs=0.02)


def test_the_calibration_serves_where_most_confidences_are_known() -> None:
    made = records(40)
    for unknown_rows, by_rates in ((7, False), (9, True)):
        model = learnt([unknown(record, rows=slice(0, unknown_rows)) for record in made])
        low, high = model.survival.survival(np.array([[0.2], [0.9]], np.float32))[:, 0]
        assert low == high if by_rates else high > low + 0.3


def test_known_drafts_give_way_to_unknown_ones() -> None:
    made = records(100)
    model = learnt(made[:50] + [unknown(record) for record in made[50:]])
    rates, _ = model.conditional_rates()
    np.testing.assert_allclose(model.recent_survival(), np.tile(np.cumprod(rates), (512, 1)))


def test_counts_are_kept_with_the_model_and_absent_from_older_files() -> None:
    model = learnt([unknown(record) for record in records(50)])
    state = model.state()
    again = AcceptanceModel(5, np.inf)
    again.restore(state)
    np.testing.assert_allclose(again.conditional_rates()[0], model.conditional_rates()[0])
    older = {name: array for name, array in state.items() if name != "unscored"}
    again.restore(older)
    assert again.conditional_rates()[0] == pytest.approx(np.full(5, 0.5)), "nothing else had labels"
    with pytest.raises(ValueError, match="counts has shape"):
        again.restore({**state, "unscored": np.zeros((3, 4))})
    with pytest.raises(ValueError, match="counts: all values must be in"):
        again.restore({**state, "unscored": np.full((2, 5), np.nan)})


def test_counts_forget_down_to_a_floor() -> None:
    counts = PositionCounts(3)
    accepted = np.arange(3) < np.array([2, 0])[:, None]
    counts.add(np.ones((2, 3), np.bool_), np.repeat(accepted, 1, axis=0))
    assert counts.state().tolist() == [[2, 2, 2], [1, 1, 0]]
    counts.forget(0.25, 1.0)
    assert counts.state().tolist() == [[1, 1, 1], [0.5, 0.5, 0]]
    counts.forget(0.25, 2.0)
    assert counts.verified.tolist() == [1, 1, 1], "below the floor nothing is forgotten"
