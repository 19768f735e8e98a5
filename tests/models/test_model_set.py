from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from adaptive_spec.config.settings import ControllerSettings
from adaptive_spec.domain.policy import Granularity
from adaptive_spec.domain.step_record import StepFlag, StepRecord
from adaptive_spec.models.latency.robust_mean import STALE_STEPS
from adaptive_spec.models.model_set import ModelSet
from tests.support.simulated_server import SimulatedServer, engine_info, staircase

INFO = engine_info(Granularity.BATCH)


def records(steps: int) -> list[StepRecord]:
    server = SimulatedServer(INFO, staircase())
    return [server.step() for _ in range(steps)]


def fitted(steps: int = 200) -> ModelSet:
    models = ModelSet(ControllerSettings(), INFO)
    for record in records(steps):
        models.observe(record)
    models.fit()
    return models


def test_an_ordinary_step_is_compared_and_a_trial_is_not() -> None:
    models, record = fitted(), records(1)[0]
    comparison = models.compare(record)
    assert comparison is not None
    assert comparison.predicted_s == pytest.approx(record.step_s, rel=0.1)
    assert comparison.goodput == comparison.launch_goodput > 0.0, "the step ran the launch K"
    assert models.trial_loss_s(record) == 0.0
    for flag in (StepFlag.TRIAL, StepFlag.DISTURBED):
        assert models.compare(dataclasses.replace(record, flags=flag)) is None
    assert ModelSet(ControllerSettings(), INFO).compare(record) is None


def test_a_trial_loses_the_time_its_tokens_would_not_have_taken() -> None:
    models, record = fitted(), dataclasses.replace(records(1)[0], flags=StepFlag.TRIAL)
    assert models.forecast is not None
    best = models.forecast.goodput[record.batch_size].max()
    assert models.trial_loss_s(record) == pytest.approx(record.step_s - record.output_tokens / best)
    slower = dataclasses.replace(record, step_s=record.step_s + 1.0)
    assert models.trial_loss_s(slower) == pytest.approx(models.trial_loss_s(record) + 1.0)


def test_scores_of_learnt_steps_are_found() -> None:
    models = ModelSet(ControllerSettings(), INFO)
    steps = records(20)
    for record in steps:
        models.observe(record)
    findings = models.learn_acceptance()
    assert [score.tokens for score in findings.scores] == [int(r.verify_len.sum()) for r in steps]
    assert models.learn_acceptance().scores == ()


def test_restored_means_are_as_old_as_when_they_were_stored() -> None:
    models = fitted()
    models.steps = 2 * STALE_STEPS
    models.take(models.latency_state(), models.calibration_state())
    before = models.latency_state()["cells.rows"]
    models.observe(records(1)[0])
    after = models.latency_state()["cells.rows"]
    np.testing.assert_allclose(after[:, 3], before[:, 3], rtol=0.05)
    assert after[0, 4] == before[0, 4] + 1, "the mean goes on and does not restart"
