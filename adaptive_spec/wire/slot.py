"""The slot: a StepRecord in a fixed number of bytes.

Layout of one slot, little-endian, `slot_bytes` long, 8-byte aligned (layout version 1):

| offset | type | field |
|---|---|---|
| 0  | u64 | sequence: odd while the slot is being written, 2 * (index + 1) when whole |
| 8  | u64 | step: decode steps since the engine started |
| 16 | u64 | time_ns: CLOCK_MONOTONIC at the end of the step |
| 24 | u64 | kv_tokens: context tokens in the KV cache over all requests |
| 32 | u64 | policy_version the step acted on, 0 = launch K |
| 40 | u32 | num_tokens: tokens in the verify forward, sum of verify_len + 1 |
| 44 | u32 | padded_tokens: the same after padding to a graph bucket |
| 48 | u32 | batch_size: requests in the step |
| 52 | u16 | rows: requests described below: batch_size, at most max_batch |
| 54 | u8  | k: draft tokens proposed per request |
| 55 | u8  | flags, see `StepFlag` |
| 56 | f32 | draft_s |
| 60 | f32 | verify_s |
| 64 | f32 | draft_extend_s |
| 68 | f32 | step_s: the whole step, overhead included |
| 72 | f32[max_batch * max_k] | confidences, [rows, k] packed: in (0, 1], 0.0 where unknown |
| then | u32[max_batch] | request_ids |
| then | u8[max_batch] | verify_len |
| then | u8[max_batch] | accept_len |
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np

from adaptive_spec.domain.step_record import StepRecord

LAYOUT_VERSION = 1
HEAD = struct.Struct("<QQQQQIIIHBBffff")
"""The scalar part of a slot: sequence, step, time_ns, kv_tokens, policy_version, num_tokens, padded_tokens, batch_size,
rows, k, flags, draft_s, verify_s, draft_extend_s, step_s."""
MAX_BATCH_LIMIT = 4096
MAX_K_LIMIT = 32


class SlotLayout(NamedTuple):
    """Offsets of the arrays in a slot, for one (max_batch, max_k)."""

    max_batch: int
    max_k: int
    confidences: int
    request_ids: int
    verify_len: int
    accept_len: int
    slot_bytes: int

    @classmethod
    def of(cls, max_batch: int, max_k: int) -> SlotLayout:
        """Raise ValueError unless 1 <= max_batch <= 4096 and 1 <= max_k <= 32."""
        if not 1 <= max_batch <= MAX_BATCH_LIMIT:
            raise ValueError(f"max_batch: must be in 1..{MAX_BATCH_LIMIT}, got {max_batch}")
        if not 1 <= max_k <= MAX_K_LIMIT:
            raise ValueError(f"max_k: must be in 1..{MAX_K_LIMIT}, got {max_k}")
        confidences = HEAD.size
        request_ids = confidences + 4 * max_batch * max_k
        verify_len = request_ids + 4 * max_batch
        accept_len = verify_len + max_batch
        return cls(max_batch, max_k, confidences, request_ids, verify_len, accept_len, -(-(accept_len + max_batch) // 8) * 8)


def decode_slot(slot: bytes | memoryview, layout: SlotLayout) -> StepRecord | None:
    """Return the record in a slot's bytes, or None when its counts do not fit the layout."""
    (_, step, time_ns, kv, version, num_tokens, padded, batch, rows, k, flags,
     draft, verify, extend, whole) = HEAD.unpack_from(slot, 0)  # fmt: skip
    if rows > layout.max_batch or k > layout.max_k:
        return None
    confidences = np.frombuffer(slot, np.float32, rows * k, layout.confidences).reshape(rows, k)
    request_ids = np.frombuffer(slot, np.uint32, rows, layout.request_ids)
    verify_len = np.frombuffer(slot, np.uint8, rows, layout.verify_len)
    accept_len = np.frombuffer(slot, np.uint8, rows, layout.accept_len)
    return StepRecord(
        step, time_ns, kv, version, num_tokens, padded, batch, k, flags, draft, verify, extend, whole,
        confidences, verify_len, accept_len, request_ids,
    )  # fmt: skip
