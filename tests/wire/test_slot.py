"""The slot on the wire, against the layout table of `wire/slot.py`."""

from __future__ import annotations

import dataclasses
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptive_spec.domain.step_record import StepRecord
from adaptive_spec.wire.slot import HEAD, MAX_BATCH_LIMIT, MAX_K_LIMIT, SlotLayout, decode_slot, record_bytes

LAYOUT = SlotLayout.of(6, 5)


@st.composite
def records(draw: st.DrawFn, max_batch: int = 6, max_k: int = 5) -> StepRecord:
    """Records that fit the layout and say nothing impossible."""
    rows, k = draw(st.integers(1, max_batch)), draw(st.integers(0, max_k))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    verify_len = rng.integers(0, k + 1, rows).astype(np.uint8)
    accept_len = rng.integers(0, verify_len.astype(np.int64) + 1).astype(np.uint8)
    num_tokens = int(verify_len.sum()) + rows
    u63 = st.integers(0, 2**63 - 1)
    seconds = st.floats(0.0, 3599.0, width=32)
    some_seconds = st.floats(2.0**-20, 3599.0, width=32)
    return StepRecord(
        draw(u63), draw(u63), draw(st.integers(0, 2**40)), draw(u63), num_tokens, num_tokens + draw(st.integers(0, 300)), rows, k,
        draw(st.integers(0, 255)), draw(seconds), draw(some_seconds), draw(seconds), draw(some_seconds),
        (1.0 - rng.random((rows, k))).astype(np.float32), verify_len, accept_len,
        rng.integers(0, 2**32, rows).astype(np.uint32),
    )  # fmt: skip


def slot_of(record: StepRecord, layout: SlotLayout) -> bytes:
    """The record by the table of the docstring, offsets written out."""
    rows, slot = len(record.verify_len), bytearray(layout.slot_bytes)
    struct.pack_into("<QQQQQ", slot, 0, 1, record.step, record.time_ns, record.kv_tokens, record.policy_version)
    struct.pack_into("<III", slot, 40, record.num_tokens, record.padded_tokens, record.batch_size)
    struct.pack_into("<HBB", slot, 52, rows, record.k, record.flags)
    struct.pack_into("<ffff", slot, 56, record.draft_s, record.verify_s, record.draft_extend_s, record.step_s)
    ids = 72 + 4 * rows * record.k
    lengths = ids + 4 * rows
    for at, array in (
        (72, record.confidences),
        (ids, record.request_ids),
        (lengths, record.verify_len),
        (lengths + rows, record.accept_len),
    ):
        slot[at : at + array.nbytes] = array.tobytes()
    return bytes(slot)


def assert_same(a: StepRecord, b: StepRecord) -> None:
    """Every field equal, arrays in type, shape and content."""
    for field in dataclasses.fields(StepRecord):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if isinstance(left, np.ndarray):
            assert (left.dtype, left.shape) == (right.dtype, right.shape), field.name
            assert left.tobytes() == right.tobytes(), field.name
        else:
            assert left == right, field.name


@given(records())
def test_a_slot_by_the_table_decodes_to_the_record(record: StepRecord) -> None:
    decoded = decode_slot(slot_of(record, LAYOUT), LAYOUT)
    assert decoded is not None
    assert_same(decoded, record)
    assert decoded.invalid_reason() is None


@given(records(), st.integers(1, 3))
def test_requests_that_had_ended_are_in_the_batch_and_not_described(record: StepRecord, ended: int) -> None:
    """A request is aborted while a step runs: vLLM and SGLang with overlap leave its row out."""
    batch_size, tokens, padded = record.batch_size + ended, record.num_tokens + ended, record.padded_tokens + ended
    record = dataclasses.replace(record, batch_size=batch_size, num_tokens=tokens, padded_tokens=padded)
    decoded = decode_slot(slot_of(record, LAYOUT), LAYOUT)
    assert decoded is not None
    assert_same(decoded, record)
    assert decoded.invalid_reason() is None


@given(st.binary(min_size=LAYOUT.slot_bytes, max_size=LAYOUT.slot_bytes))
def test_any_bytes_decode_to_something_that_fits_or_to_nothing(slot: bytes) -> None:
    record = decode_slot(slot, LAYOUT)
    _, *_, batch_size, rows, k, _, _, _, _, _ = HEAD.unpack_from(slot)
    assert (record is None) == (rows > min(batch_size, LAYOUT.max_batch) or k > LAYOUT.max_k)
    if record is not None:
        assert record.confidences.shape == (rows, k)
        record.invalid_reason()


@given(st.integers(1, MAX_BATCH_LIMIT), st.integers(1, MAX_K_LIMIT))
def test_slots_are_aligned_and_hold_their_arrays(max_batch: int, max_k: int) -> None:
    layout = SlotLayout.of(max_batch, max_k)
    assert layout.slot_bytes % 8 == 0
    assert 0 <= layout.slot_bytes - (72 + 4 * max_batch * max_k + 4 * max_batch + 2 * max_batch) < 8
    assert record_bytes(max_batch, max_k) <= layout.slot_bytes


@pytest.mark.parametrize(("max_batch", "max_k"), [(0, 1), (MAX_BATCH_LIMIT + 1, 1), (1, 0), (1, MAX_K_LIMIT + 1)])
def test_a_layout_out_of_range_is_refused(max_batch: int, max_k: int) -> None:
    with pytest.raises(ValueError, match=r"max_(batch|k): must be in 1\.\.\d+, got \d+"):
        SlotLayout.of(max_batch, max_k)
