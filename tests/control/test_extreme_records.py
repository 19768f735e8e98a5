"""Whatever a record may hold within its bounds: nothing raises, and everything that is shown and published is finite."""

from __future__ import annotations

import dataclasses
import math
from enum import Enum
from typing import Any

import numpy as np
import pytest

from adaptive_spec.config.settings import ControllerSettings
from adaptive_spec.control.controller import Controller
from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.domain.policy import Granularity, Policy
from adaptive_spec.domain.step_record import (
    LARGEST_BATCH_SIZE,
    LARGEST_KV_TOKENS,
    LARGEST_NUMBER,
    LARGEST_TOKENS,
    SHORTEST_S,
    StepRecord,
)
from adaptive_spec.wire.policy_payload import encode_policy, payload_bytes

TIMES_S = (SHORTEST_S, 1e-6, 1e-3, 1.0, 3599.0)
CONFIDENCES = np.array([0.0, 1e-45, 1e-30, 0.5, 1.0], np.float32)


def _record(rng: np.random.Generator, info: EngineInfo, extreme: float) -> StepRecord:
    """An ordinary record; each group of its fields is an extreme with probability `extreme`."""

    def one_of(*values: Any) -> Any:
        return values[int(rng.integers(len(values)))]

    b, k = int(rng.integers(1, info.max_batch + 1)), int(one_of(*info.candidates))
    if rng.random() < extreme:
        b, k = one_of(1, info.max_batch, info.max_batch + 1, LARGEST_BATCH_SIZE), one_of(0, info.max_k)
    rows = min(b, info.max_batch)
    verify_len = rng.integers(0, k + 1, rows).astype(np.uint8)
    accept_len = rng.integers(0, verify_len.astype(np.int64) + 1).astype(np.uint8)
    num_tokens = padded = max(int(verify_len.sum()) + rows, b)
    confidences = rng.beta(5.0, 2.0, (rows, k)).astype(np.float32)
    if rng.random() < extreme:
        confidences = rng.choice(CONFIDENCES, (rows, k))
    if rng.random() < extreme:
        num_tokens = one_of(num_tokens, LARGEST_TOKENS)
        padded = one_of(num_tokens, min(2 * num_tokens, LARGEST_TOKENS), LARGEST_TOKENS)
    times_s = (2e-4 * k, 1e-3 + 1e-5 * padded, 0.0, 2e-3 + 2e-4 * k)
    if rng.random() < extreme:
        times_s = one_of(0.0, *TIMES_S), one_of(*TIMES_S), one_of(0.0, *TIMES_S), one_of(*TIMES_S)
    step, kv, version, flags = int(rng.integers(1000)), 100 * b, 0, 0
    if rng.random() < extreme:
        step, kv, version = one_of(0, LARGEST_NUMBER), one_of(0, LARGEST_KV_TOKENS), one_of(0, 1, LARGEST_NUMBER)
        flags = int(rng.integers(256))
    return StepRecord(
        step, step, kv, version, num_tokens, padded, b, k, flags, *times_s, confidences, verify_len, accept_len,
        rng.integers(0, 2**32, rows).astype(np.uint32),
    )  # fmt: skip


def _assert_finite(value: Any, where: str) -> None:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, float):
        assert math.isfinite(value), where
    elif isinstance(value, dict):
        for name, part in value.items():
            _assert_finite(part, f"{where}.{name}")
    elif isinstance(value, list | tuple):
        for part in value:
            _assert_finite(part, where)
    elif dataclasses.is_dataclass(value) and not isinstance(value, Enum):
        for field in dataclasses.fields(value):
            _assert_finite(getattr(value, field.name), f"{where}.{field.name}")


def _assert_publishable(policy: Policy | None, info: EngineInfo) -> None:
    if policy is not None:
        assert len(encode_policy(policy)) <= payload_bytes(info.max_batch, info.max_k), "it fits the page"


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
            record = _record(rng, info, extreme)
            assert record.invalid_reason() is None
            _assert_publishable(controller.observe(record, now_s), info)
            if i % 12 == 0:
                _assert_publishable(controller.refit(now_s), info)
                snapshot = controller.snapshot(now_s)
                _assert_finite(
                    {f.name: getattr(snapshot, f.name) for f in dataclasses.fields(snapshot) if f.name != "considered"}, ""
                )
        again = Controller(ControllerSettings(), info)
        again.restore(controller.state())
        _assert_publishable(again.refit(now_s), info)


@pytest.mark.parametrize("granularity", list(Granularity))
def test_a_record_with_a_smaller_padding_than_an_earlier_one_breaks_no_refit(granularity: Granularity) -> None:
    """Padding is learnt for each size: a larger size may be padded to less than a smaller one."""
    info = EngineInfo("t", "m", "g", 1, 2, (0, 1, 2), 8, granularity, False, 1)
    controller, rng = Controller(ControllerSettings(), info), np.random.default_rng(1)
    for b, padded_rows in ((2, 16), (8, 8), (4, 4)):
        for step in range(20):
            plain = _record(rng, dataclasses.replace(info, max_batch=b), 0.0)
            full = np.full(b, 2, np.uint8)
            record = dataclasses.replace(
                plain, step=step, batch_size=b, k=2, num_tokens=3 * b, padded_tokens=3 * padded_rows, verify_len=full,
                accept_len=full, confidences=np.full((b, 2), 0.5, np.float32), request_ids=np.arange(b, dtype=np.uint32),
            )  # fmt: skip
            assert record.invalid_reason() is None
            controller.observe(record, 0.1 * step)
        _assert_publishable(controller.refit(10.0), info)
    again = Controller(ControllerSettings(), info)
    again.restore_profile(controller.latency_state(), controller.calibration_state())
    _assert_publishable(again.refit(0.0), info)
    assert again.models.forecast is not None
