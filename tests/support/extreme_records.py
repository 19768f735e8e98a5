"""Records whose fields are extremes within their bounds, and what must hold of all that is made of them."""

from __future__ import annotations

import dataclasses
import math
from enum import Enum
from typing import Any

import numpy as np

from adaptive_spec.control.snapshot import Snapshot
from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.domain.policy import Policy
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


def extreme_record(rng: np.random.Generator, info: EngineInfo, extreme: float) -> StepRecord:
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


def assert_publishable(policy: Policy | None, info: EngineInfo) -> None:
    if policy is not None:
        assert len(encode_policy(policy)) <= payload_bytes(info.max_batch, info.max_k), "it fits the page"


def assert_snapshot_finite(snapshot: Snapshot) -> None:
    fields = [field.name for field in dataclasses.fields(snapshot) if field.name != "considered"]
    _assert_finite({name: getattr(snapshot, name) for name in fields}, "")
