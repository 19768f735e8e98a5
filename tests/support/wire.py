"""What the tests of the wire write and expect, without the weight of the test libraries: child processes import it too."""

from __future__ import annotations

import os
from dataclasses import fields

import numpy as np

from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.domain.policy import Granularity, Mode, Policy, Trial
from adaptive_spec.domain.step_record import StepRecord
from adaptive_spec.domain.survival import GRID_POINTS, SurvivalMap
from adaptive_spec.wire.policy_page import encode_policy


def engine(max_batch: int = 64, candidates: tuple[int, ...] = tuple(range(8))) -> EngineInfo:
    return EngineInfo("embedded", "m", "cpu", 1, 4, candidates, max_batch, Granularity.REQUEST, True, os.getpid())


def record_of(index: int, rows: int = 64, k: int = 7) -> StepRecord:
    """A record whose every field and array entry follows from its index: any mixture of two is seen."""
    verify_len = np.full(rows, index % (k + 1), np.uint8)
    tokens = int(verify_len.sum()) + rows
    value = (index % 1009 + 1) / 1010
    return StepRecord(
        index, 3 * index, 5 * index, 7 * index, tokens, tokens, rows, k, 0, value, value, value, value,
        np.full((rows, k), value, np.float32), verify_len, verify_len, np.full(rows, index % 2**32, np.uint32),
    )  # fmt: skip


def same(a: StepRecord, b: StepRecord) -> bool:
    for field in fields(StepRecord):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if isinstance(left, np.ndarray):
            if left.shape != right.shape or left.tobytes() != right.tobytes():
                return False
        elif left != (float(np.float32(right)) if isinstance(right, float) else right):
            return False
    return True


def policy_of(version: int, k: int = 3, trials: tuple[Trial, ...] = (), mode: Mode = Mode.ACTIVE, acting: bool = True) -> Policy:
    """A policy for `engine()` whose times follow from its version: any mixture of two is seen."""
    return Policy(
        version, mode, acting, Granularity.REQUEST, 7, np.full((65, 1), k, np.uint8), np.zeros(0, np.float32),
        np.full((8, 65), version % 997, np.float32), np.full(513, version % 991, np.float32), 1e-9 * version,
        SurvivalMap(np.full((7, GRID_POINTS), 0.5, np.float32), True), False, trials,
    )  # fmt: skip


def whole(policy: Policy) -> bool:
    """Whether nothing in the policy belongs to another one."""
    again = policy_of(policy.version, int(policy.k_table[0, 0]), policy.trials, policy.mode, policy.acting)
    return encode_policy(policy) == encode_policy(again)
