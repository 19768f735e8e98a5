"""Whatever a record may hold within its bounds: nothing raises, and everything that is shown and published is finite."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from adaptive_spec.config.settings import ControllerSettings
from adaptive_spec.control.controller import Controller
from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.domain.policy import Granularity
from tests.support.extreme_records import assert_publishable, assert_snapshot_finite, extreme_record


@pytest.mark.parametrize("extreme", [0.05, 1.0])
@pytest.mark.parametrize("candidates", [(0, 1, 2, 3, 4), (2,), (0,)])
@pytest.mark.parametrize("granularity", list(Granularity))
def test_extremes(granularity: Granularity, candidates: tuple[int, ...], extreme: float) -> None:
    rng = np.random.default_rng(int(100 * extreme))
    for max_batch, holds in ((1, False), (8, True), (40, False)):
        info = EngineInfo("t", "m", "g", 1, candidates[-1], candidates, max_batch, granularity, holds, 1).checked()
        controller = Controller(ControllerSettings(), info)
        for i in range(120):
            now_s = 0.02 * i
            record = extreme_record(rng, info, extreme)
            assert record.invalid_reason() is None
            assert_publishable(controller.observe(record, now_s), info)
            if i % 12 == 0:
                assert_publishable(controller.refit(now_s), info)
                assert_snapshot_finite(controller.snapshot(now_s))
        again = Controller(ControllerSettings(), info)
        again.restore(controller.state())
        assert_publishable(again.refit(now_s), info)


@pytest.mark.parametrize("granularity", list(Granularity))
def test_a_record_with_a_smaller_padding_than_an_earlier_one_breaks_no_refit(granularity: Granularity) -> None:
    """Padding is learnt for each size: a larger size may be padded to less than a smaller one."""
    info = EngineInfo("t", "m", "g", 1, 2, (0, 1, 2), 8, granularity, False, 1)
    controller, rng = Controller(ControllerSettings(), info), np.random.default_rng(1)
    for b, padded_rows in ((2, 16), (8, 8), (4, 4)):
        for step in range(20):
            plain = extreme_record(rng, dataclasses.replace(info, max_batch=b), 0.0)
            full = np.full(b, 2, np.uint8)
            record = dataclasses.replace(
                plain, step=step, batch_size=b, k=2, num_tokens=3 * b, padded_tokens=3 * padded_rows, verify_len=full,
                accept_len=full, confidences=np.full((b, 2), 0.5, np.float32), request_ids=np.arange(b, dtype=np.uint32),
            )  # fmt: skip
            assert record.invalid_reason() is None
            controller.observe(record, 0.1 * step)
        assert_publishable(controller.refit(10.0), info)
    again = Controller(ControllerSettings(), info)
    again.restore_profile(controller.latency_state(), controller.calibration_state())
    assert_publishable(again.refit(0.0), info)
    assert again.models.forecast is not None
