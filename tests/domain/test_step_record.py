"""The slot on the wire, against the layout table of the module and nothing else."""

from __future__ import annotations

import dataclasses
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptive_spec.domain.step_record import UNKNOWN_CONFIDENCE, StepRecord
from adaptive_spec.wire.slot import HEAD, MAX_BATCH_LIMIT, MAX_K_LIMIT, SlotLayout, decode_slot

LAYOUT = SlotLayout.of(6, 5)


@st.composite
def records(draw: st.DrawFn, max_batch: int = 6, max_k: int = 5) -> StepRecord:
    """Records that fit the layout and say nothing impossible."""
    rows, k = draw(st.integers(1, max_batch)), draw(st.integers(0, max_k))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    verify_len = rng.integers(0, k + 1, rows).astype(np.uint8)
    accept_len = rng.integers(0, verify_len.astype(np.int64) + 1).astype(np.uint8)
    num_tokens = int(verify_len.sum()) + rows
    u64 = st.integers(0, 2**64 - 1)
    seconds = st.floats(0.0, 3599.0, width=32)
    return StepRecord(
        draw(u64), draw(u64), draw(u64), draw(u64), num_tokens, num_tokens + draw(st.integers(0, 300)), rows, k,
        draw(st.integers(0, 255)), draw(seconds), draw(st.floats(2.0**-20, 3599.0, width=32)), draw(seconds), draw(seconds),
        (1.0 - rng.random((rows, k))).astype(np.float32), verify_len, accept_len,
        rng.integers(0, 2**32, rows).astype(np.uint32),
    )  # fmt: skip


def slot_of(record: StepRecord, layout: SlotLayout) -> bytes:
    """The record by the table of the docstring, offsets written out."""
    rows, slot = len(record.verify_len), bytearray(layout.slot_bytes)
    struct.pack_into("<QQQQQ", slot, 0, 2, record.step, record.time_ns, record.kv_tokens, record.policy_version)
    struct.pack_into("<III", slot, 40, record.num_tokens, record.padded_tokens, record.batch_size)
    struct.pack_into("<HBB", slot, 52, rows, record.k, record.flags)
    struct.pack_into("<ffff", slot, 56, record.draft_s, record.verify_s, record.draft_extend_s, record.step_s)
    ids = 72 + 4 * layout.max_batch * layout.max_k
    lengths = ids + 4 * layout.max_batch
    for at, array in (
        (72, record.confidences),
        (ids, record.request_ids),
        (lengths, record.verify_len),
        (lengths + layout.max_batch, record.accept_len),
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


@given(st.binary(min_size=LAYOUT.slot_bytes, max_size=LAYOUT.slot_bytes))
def test_any_bytes_decode_to_something_that_fits_or_to_nothing(slot: bytes) -> None:
    record = decode_slot(slot, LAYOUT)
    _, *_, rows, k, _, _, _, _, _ = HEAD.unpack_from(slot)
    assert (record is None) == (rows > LAYOUT.max_batch or k > LAYOUT.max_k)
    if record is not None:
        assert record.confidences.shape == (rows, k)
        record.invalid_reason()


def a_record(**changes: object) -> StepRecord:
    plain = StepRecord(
        step=1, time_ns=2, kv_tokens=30, policy_version=0, num_tokens=7, padded_tokens=8, batch_size=2, k=3, flags=0,
        draft_s=0.001, verify_s=0.002, draft_extend_s=0.0, step_s=0.004,
        confidences=np.full((2, 3), 0.5, np.float32), verify_len=np.array([3, 2], np.uint8),
        accept_len=np.array([1, 2], np.uint8), request_ids=np.array([8, 9], np.uint32),
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]  # a test names the fields it changes


def spoilt(value: float) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    confidences = np.full((2, 3), 0.5, np.float32)
    confidences[1, 2] = value
    return confidences


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("counts", {"batch_size": 1}),
        ("counts", {"padded_tokens": 6}),
        ("counts", {"num_tokens": 1}),
        ("times", {"draft_s": -0.1}),
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
def test_the_impossible_is_named(reason: str, changes: dict[str, object]) -> None:
    assert a_record().invalid_reason() is None
    assert a_record(confidences=spoilt(UNKNOWN_CONFIDENCE)).invalid_reason() is None
    assert a_record(**changes).invalid_reason() == reason


def test_without_draft_tokens_there_are_no_confidences_to_doubt() -> None:
    zeros = np.zeros(2, np.uint8)
    record = a_record(k=0, confidences=np.zeros((2, 0), np.float32), verify_len=zeros, accept_len=zeros, num_tokens=2)
    assert record.invalid_reason() is None
    assert record.output_tokens == 2


def test_output_counts_one_bonus_token_a_request() -> None:
    assert a_record().output_tokens == 1 + 2 + 2


@given(st.integers(1, MAX_BATCH_LIMIT), st.integers(1, MAX_K_LIMIT))
def test_slots_are_aligned_and_hold_their_arrays(max_batch: int, max_k: int) -> None:
    layout = SlotLayout.of(max_batch, max_k)
    assert layout.slot_bytes % 8 == 0
    assert layout.confidences % 4 == layout.request_ids % 4 == 0
    ends = [layout.confidences + 4 * max_batch * max_k, layout.request_ids + 4 * max_batch, layout.verify_len + max_batch]
    assert ends == [layout.request_ids, layout.verify_len, layout.accept_len]
    assert 0 <= layout.slot_bytes - (layout.accept_len + max_batch) < 8


@pytest.mark.parametrize(("max_batch", "max_k"), [(0, 1), (MAX_BATCH_LIMIT + 1, 1), (1, 0), (1, MAX_K_LIMIT + 1)])
def test_a_layout_out_of_range_is_refused(max_batch: int, max_k: int) -> None:
    with pytest.raises(ValueError, match=r"max_(batch|k) \d+ is not in 1\.\."):
        SlotLayout.of(max_batch, max_k)
