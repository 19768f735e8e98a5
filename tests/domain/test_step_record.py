"""StepRecord: what it counts, and which values are refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from numpy.typing import NDArray

from adaptive_spec.domain.step_record import UNKNOWN_CONFIDENCE, StepRecord


def a_record(**changes: object) -> StepRecord:
    plain = StepRecord(
        step=1, time_ns=2, kv_tokens=30, policy_version=0, num_tokens=7, padded_tokens=8, batch_size=2, k=3, flags=0,
        draft_s=0.001, verify_s=0.002, draft_extend_s=0.0, step_s=0.004,
        confidences=np.full((2, 3), 0.5, np.float32), verify_len=np.array([3, 2], np.uint8),
        accept_len=np.array([1, 2], np.uint8), request_ids=np.array([8, 9], np.uint32),
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]  # a test names the fields it changes


def spoilt(value: float) -> NDArray[np.float32]:
    confidences = np.full((2, 3), 0.5, np.float32)
    confidences[1, 2] = value
    return confidences


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("counts", {"batch_size": 1}),
        ("counts", {"padded_tokens": 6}),
        ("counts", {"num_tokens": 1}),
        ("counts", {"batch_size": 2**32 - 1, "num_tokens": 2**32 - 1, "padded_tokens": 2**32 - 1}),
        ("counts", {"batch_size": 2**14 + 1, "num_tokens": 2**15, "padded_tokens": 2**15}),
        ("counts", {"padded_tokens": 2**20 + 1}),
        ("counts", {"kv_tokens": 2**40 + 1}),
        ("numbers", {"step": 2**63}),
        ("numbers", {"time_ns": 2**63}),
        ("numbers", {"policy_version": 2**64 - 1}),
        ("times", {"draft_s": -0.1}),
        ("times", {"draft_s": 3600.0}),
        ("times", {"step_s": 0.0}),
        ("times", {"step_s": 1e-10}),
        ("times", {"verify_s": 1e-45}),
        ("times", {"verify_s": 0.0}),
        ("times", {"draft_extend_s": float("nan")}),
        ("times", {"step_s": float("inf")}),
        ("lengths", {"accept_len": np.array([1, 3], np.uint8)}),
        ("lengths", {"verify_len": np.array([4, 2], np.uint8)}),
        ("confidences", {"confidences": spoilt(-0.1)}),
        ("confidences", {"confidences": spoilt(1.0001)}),
        ("confidences", {"confidences": spoilt(float("nan"))}),
    ],
)
def test_impossible_values_are_named(reason: str, changes: dict[str, object]) -> None:
    assert a_record().invalid_reason() is None
    assert a_record(confidences=spoilt(UNKNOWN_CONFIDENCE)).invalid_reason() is None
    assert a_record(**changes).invalid_reason() == reason


def test_a_record_without_draft_tokens_is_valid() -> None:
    zeros = np.zeros(2, np.uint8)
    record = a_record(k=0, confidences=np.zeros((2, 0), np.float32), verify_len=zeros, accept_len=zeros, num_tokens=2)
    assert record.invalid_reason() is None
    assert record.output_tokens == 2


def test_output_counts_one_bonus_token_a_request() -> None:
    assert a_record().output_tokens == 1 + 2 + 2
