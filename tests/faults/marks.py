"""Records that carry a checksum of themselves, so that a reader can tell one that is not as it was written.

The lowest MARK_BITS of `time_ns` are the checksum of all other fields: they move the time by at most a millisecond.
"""

from __future__ import annotations

import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from adaptive_spec.domain.arrays import Float32s, Lengths, RequestIds
from adaptive_spec.domain.step_record import StepRecord
from adaptive_spec.engine_side.tap import RING_NAME, BegunStep, EngineTap
from adaptive_spec.wire.ring import RingLayoutError, RingReader

MARK_BITS = 20
_MASK = (1 << MARK_BITS) - 1


def _checksum(numbers: tuple[int, ...], seconds: tuple[float, ...], *arrays: Any) -> int:
    part = zlib.crc32(np.array(seconds, np.float32).tobytes(), zlib.crc32(np.array(numbers, np.uint64).tobytes()))
    for array in arrays:
        part = zlib.crc32(array.tobytes(), part)
    return part & _MASK


def is_as_written(record: StepRecord) -> bool:
    """Whether a record of a `MarkingTap` has the checksum of its content."""
    numbers = (
        record.step, record.kv_tokens, record.policy_version, record.num_tokens, record.padded_tokens, record.batch_size,
        record.k, record.flags,
    )  # fmt: skip
    seconds = record.draft_s, record.verify_s, record.draft_extend_s, record.step_s
    arrays = record.confidences, record.verify_len, record.accept_len, record.request_ids
    return record.time_ns & _MASK == _checksum(numbers, seconds, *arrays)


class MarkingTap(EngineTap):
    """A tap whose records have their checksum in `time_ns`."""

    def end_step(
        self, now_ns: int, num_tokens: int, padded_tokens: int, draft_s: float, verify_s: float, draft_extend_s: float,
        step_s: float, confidences: Float32s, verify_len: Lengths, accept_len: Lengths,
        request_ids: RequestIds, flags: int = 0, begun: BegunStep | None = None,
    ) -> None:  # fmt: skip
        step = begun or self.begun
        numbers = (
            step.step, step.kv_tokens, step.policy_version, num_tokens, padded_tokens, step.batch_size,
            confidences.shape[1], flags | step.flags,
        )  # fmt: skip
        arrays = confidences, verify_len, accept_len, request_ids
        mark = _checksum(numbers, (draft_s, verify_s, draft_extend_s, step_s), *arrays)
        super().end_step(
            now_ns & ~_MASK | mark, num_tokens, padded_tokens, draft_s, verify_s, draft_extend_s, step_s,
            confidences, verify_len, accept_len, request_ids, flags, step,
        )  # fmt: skip


class RecordsWatch:
    """Reads every record of a runtime folder beside the sidecar, through all rings that engines make there.

    read: records that were accepted. not_as_written: those of them whose checksum is another one.
    """

    def __init__(self, runtime_dir: Path) -> None:
        self.read = self.not_as_written = 0
        self._path = runtime_dir / RING_NAME
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stop reading."""
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        ring: RingReader | None = None
        while not self._stop.wait(0.05):
            if ring is None or ring.replaced():
                try:
                    other = RingReader.open(self._path)
                except (OSError, RingLayoutError):  # in the middle of being made again
                    other = None
                if other is not None:
                    if ring is not None:
                        self._check(ring)
                        ring.close()
                    ring = other
            if ring is not None:
                self._check(ring)
        if ring is not None:
            ring.close()

    def _check(self, ring: RingReader) -> None:
        records = ring.poll(1 << 14)
        self.read += len(records)
        self.not_as_written += sum(not is_as_written(record) for record in records)
