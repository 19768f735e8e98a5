"""An engine that runs without speculation: K = 0 throughout, nothing to accept; its times are learnt."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from adaptive_spec.config.settings import ControllerSettings
from adaptive_spec.control.controller import Controller
from adaptive_spec.domain.policy import Granularity
from adaptive_spec.domain.step_record import StepFlag, StepRecord
from tests.support.numbers_engine import engine_info, verify_s


def _record(step: int, batch_size: int) -> StepRecord:
    empty, ids = np.zeros(batch_size, np.uint8), np.arange(batch_size, dtype=np.uint32)
    return StepRecord(
        step, step * 10**7, 100 * batch_size, 0, batch_size, batch_size, batch_size, 0, int(StepFlag.WHOLE), 0.0,
        verify_s(batch_size), 0.0, verify_s(batch_size) + 1e-4, np.zeros((batch_size, 0), np.float32), empty, empty, ids,
    )  # fmt: skip


@pytest.mark.parametrize("granularity", list(Granularity))
def test_its_times_are_learnt(granularity: Granularity) -> None:
    info = replace(engine_info(), launch_k=0, candidates=(0,), granularity=granularity, holds_batch=False)
    controller = Controller(ControllerSettings(mode="shadow"), info)
    now_s = 0.0
    for step in range(1, 600):
        now_s += 0.01
        controller.observe(_record(step, 1 + step % 8), now_s)
        controller.tick(now_s)
    snapshot = controller.snapshot(now_s)
    assert set(snapshot.k_by_batch_size.values()) == {0}
    assert [boundary.tokens for boundary in snapshot.boundaries] == [6]
    assert snapshot.decode_steps == 599
    assert snapshot.accepted_tokens == ()
    forecast = controller.models.forecast
    assert forecast is not None
    for batch_size in (1, 4, 8):
        expected = batch_size / (verify_s(batch_size) + 1e-4)
        assert forecast.goodput[batch_size, 0, 0] == pytest.approx(expected, rel=0.03)
    again = Controller(ControllerSettings(mode="shadow"), info)
    again.restore(controller.state())
    assert again.snapshot(now_s).boundaries == snapshot.boundaries
