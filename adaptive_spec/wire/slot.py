"""The slot: a StepRecord in a fixed number of bytes.

Layout of one slot, little-endian (layout version 2). Slots lie `slot_bytes` apart; a record takes what its rows and k need:

| offset | type | field |
|---|---|---|
| 0  | u64 | number: index of the record in the ring, plus 1 |
| 8  | u64 | step: decode steps since the engine started |
| 16 | u64 | time_ns: CLOCK_MONOTONIC at the end of the step |
| 24 | u64 | kv_tokens: context tokens in the KV cache over all requests |
| 32 | u64 | policy_version the step acted on, 0 = launch K |
| 40 | u32 | num_tokens: tokens in the verify forward, sum of verify_len + 1 |
| 44 | u32 | padded_tokens: the same after padding to a graph bucket |
| 48 | u32 | batch_size: requests in the step |
| 52 | u16 | rows: requests described below: at most batch_size and max_batch; not those that had ended |
| 54 | u8  | k: draft tokens proposed per request |
| 55 | u8  | flags, see `StepFlag` |
| 56 | f32 | draft_s |
| 60 | f32 | verify_s |
| 64 | f32 | draft_extend_s |
| 68 | f32 | step_s: the whole step, overhead included |
| 72 | f32[rows * k] | confidences, [rows, k]: in (0, 1], 0.0 where unknown |
| then | u32[rows] | request_ids |
| then | u8[rows] | verify_len |
| then | u8[rows] | accept_len |
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np

from adaptive_spec.domain.step_record import StepRecord

LAYOUT_VERSION = 2
HEAD = struct.Struct("<QQQQQIIIHBBffff")
"""The scalar part of a slot: number, step, time_ns, kv_tokens, policy_version, num_tokens, padded_tokens, batch_size,
rows, k, flags, draft_s, verify_s, draft_extend_s, step_s."""
MAX_BATCH_LIMIT = 4096
MAX_K_LIMIT = 32


class SlotLayout(NamedTuple):
    """Size of a slot, for one (max_batch, max_k)."""

    max_batch: int
    max_k: int
    slot_bytes: int

    @classmethod
    def of(cls, max_batch: int, max_k: int) -> SlotLayout:
        """Raise ValueError unless 1 <= max_batch <= 4096 and 1 <= max_k <= 32."""
        if not 1 <= max_batch <= MAX_BATCH_LIMIT:
            raise ValueError(f"max_batch: must be in 1..{MAX_BATCH_LIMIT}, got {max_batch}")
        if not 1 <= max_k <= MAX_K_LIMIT:
            raise ValueError(f"max_k: must be in 1..{MAX_K_LIMIT}, got {max_k}")
        return cls(max_batch, max_k, -(-record_bytes(max_batch, max_k) // 8) * 8)


def record_bytes(rows: int, k: int) -> int:
    """Bytes of a record in its slot."""
    return HEAD.size + rows * (4 * k + 6)


def decode_slot(slot: bytes | memoryview, layout: SlotLayout) -> StepRecord | None:
    """Return the record in a slot's bytes, or None when its counts do not fit the layout. Keeps a copy of the record's bytes."""
    (_, step, time_ns, kv, version, num_tokens, padded, batch, rows, k, flags,
     draft, verify, extend, whole) = HEAD.unpack_from(slot, 0)  # fmt: skip
    if rows > min(batch, layout.max_batch) or k > layout.max_k:
        return None
    end = record_bytes(rows, k)
    data = bytes(slot[HEAD.size : end])
    ids = 4 * rows * k
    confidences = np.frombuffer(data, np.float32, rows * k, 0).reshape(rows, k)
    request_ids = np.frombuffer(data, np.uint32, rows, ids)
    verify_len = np.frombuffer(data, np.uint8, rows, ids + 4 * rows)
    accept_len = np.frombuffer(data, np.uint8, rows, ids + 5 * rows)
    return StepRecord(
        step, time_ns, kv, version, num_tokens, padded, batch, k, flags, draft, verify, extend, whole,
        confidences, verify_len, accept_len, request_ids,
    )  # fmt: skip
