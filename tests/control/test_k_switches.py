from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from adaptive_spec.control.k_switches import switch_reason
from adaptive_spec.domain.policy import Granularity
from adaptive_spec.domain.step_record import StepFlag, StepRecord
from tests.support.simulated_server import engine_info

INFO = replace(engine_info(Granularity.BATCH), allowed_from=((1, (1, 5)), (8, (0, 1))))


def step(number: int, k: int, flags: int = 0, batch_size: int = 4, version: int = 9) -> StepRecord:
    lengths = np.zeros(batch_size, np.uint8)
    return StepRecord(
        number, 0, 0, version, batch_size, batch_size, batch_size, k, flags, 0.0, 1.0, 0.0, 1.0, np.zeros((0, 0), np.float32),
        lengths, lengths, np.zeros(batch_size, np.uint32),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        (None, step(1, 5), None),
        (step(1, 5), step(2, 5), None),
        (step(9, 5), step(1, 1), None),
        (step(1, 5), step(2, 1), "table"),
        (step(1, 5), step(2, 1, StepFlag.STEP_CHOICE), "step_choice"),
        (step(1, 5, StepFlag.STEP_CHOICE), step(2, 1), "step_choice"),
        (step(1, 5), step(2, 1, StepFlag.TRIAL), "trial"),
        (step(1, 5, StepFlag.TRIAL), step(2, 1), "trial"),
        (step(1, 5), step(2, 3, StepFlag.FALLBACK, version=0), "fallback"),
        (step(1, 5), step(2, 1, batch_size=8), "allowed"),
        (step(1, 5), step(2, 1, StepFlag.STEP_CHOICE, batch_size=8), "allowed"),
        (step(1, 1), step(2, 0, batch_size=8), "table"),
        (step(1, 5), step(2, 1, StepFlag.LIMITED), "allowed"),
        (step(1, 5, version=0), step(2, 1, version=0), "fallback"),
    ],
)
def test_reason_of_a_change(before: StepRecord | None, after: StepRecord, reason: str | None) -> None:
    assert switch_reason(before, after, INFO) == reason
