"""The record ring: one engine writes StepRecords and overwrites the oldest; any number of readers copy them.

File layout, little-endian, layout version of `slot.py`:

| offset | type | field |
|---|---|---|
| 0   | 8 bytes | magic `ADSPRING` |
| 8   | u32 | layout version |
| 12  | u32 | CRC32 of bytes 0..11, 16..63 and the engine information |
| 16  | u64 | generation: a new random number for each ring |
| 24  | u32 | slots |
| 28  | u32 | slot_bytes |
| 32  | u32 | max_batch |
| 36  | u32 | max_k |
| 40  | u32 | length of the engine information |
| 64  | u64 | cursor: records written since the ring was created; on a cache line of its own |
| 128 | JSON | EngineInfo |
| 4096 | slots | record `index` is in slot `index % slots`, layout in `slot.py` |

Each slot is a sequence lock: the writer makes its sequence odd, fills it, then sets it to 2 * (index + 1). A reader accepts a
copy only if it read exactly that number before and after copying. Neither side waits: a slow reader loses records and counts
them; a writer killed while it fills a slot leaves an odd sequence, which no reader accepts.

The ring is a mapped file and not multiprocessing.shared_memory, whose resource tracker deletes the segment when a reader exits
(Python issue 82300, fixed in 3.13).
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np

from adaptive_spec.domain.arrays import Float32s, Lengths, RequestIds
from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.domain.step_record import StepRecord
from adaptive_spec.wire import mapped_file
from adaptive_spec.wire.mapped_file import WEAKLY_ORDERED, fence
from adaptive_spec.wire.slot import HEAD, LAYOUT_VERSION, MAX_BATCH_LIMIT, MAX_K_LIMIT, SlotLayout, decode_slot

MAGIC = b"ADSPRING"
HEADER_BYTES = 4096
INFO_OFFSET = 128
MIN_SLOTS = 2
MAX_SLOTS = 1 << 20

_MAGIC_VERSION = struct.Struct("<8sI")
_HEADER = struct.Struct("<8sIIQIIIII")
_CURSOR_WORD = 8
_WORD = struct.Struct("<Q")
_CURSOR_OFFSET = 8 * _CURSOR_WORD
_CURSOR_LIMIT = 1 << 62


class RingLayoutError(ValueError):
    """A file that this version cannot read as a ring: path, field, found value and expected value."""

    def __init__(self, path: Path, field: str, found: object, wanted: object) -> None:
        super().__init__(f"{path}: {field}: must be {wanted}, got {found}")
        self.path, self.field, self.found, self.wanted = path, field, found, wanted


class RingWriter:
    """The engine's end. written: records written. failed: writes that failed; a write never raises."""

    def __init__(self, mapping: mmap.mmap, layout: SlotLayout, slots: int) -> None:
        """Use a mapped ring. Callers use `create`."""
        self.layout = layout
        self.slots = slots
        self.written = 0
        self.failed = 0
        self._map = mapping
        self._words = memoryview(mapping).cast("Q")

    @classmethod
    def create(cls, path: Path | str, info: EngineInfo, slots: int = 1024, max_k: int | None = None) -> RingWriter:
        """Create the ring file in an existing folder; an older ring there is replaced.

        slots: 2..2^20 records. max_k: columns of a slot, by default the engine's largest K. Records with a larger K, or a batch
        beyond the engine's max_batch, are cut. Raises ValueError for numbers out of range, OSError.
        """
        path = Path(path)
        if max_k is None:
            max_k = min(max(info.max_k, 1), MAX_K_LIMIT)
        layout = SlotLayout.of(min(info.max_batch, MAX_BATCH_LIMIT), max_k)
        if not MIN_SLOTS <= slots <= MAX_SLOTS:
            raise ValueError(f"slots: must be in {MIN_SLOTS}..{MAX_SLOTS}, got {slots}")
        about = info.to_json()
        if len(about) > HEADER_BYTES - INFO_OFFSET:
            raise ValueError(f"engine information: must be at most {HEADER_BYTES - INFO_OFFSET} bytes, got {len(about)}")
        generation = int.from_bytes(os.urandom(8), "little")

        def fill(mapping: mmap.mmap) -> None:
            sizes = (slots, layout.slot_bytes, layout.max_batch, layout.max_k, len(about))
            _HEADER.pack_into(mapping, 0, MAGIC, LAYOUT_VERSION, 0, generation, *sizes)
            mapping[INFO_OFFSET : INFO_OFFSET + len(about)] = about
            _HEADER.pack_into(mapping, 0, MAGIC, LAYOUT_VERSION, _checksum(mapping, len(about)), generation, *sizes)

        mapping, _ = mapped_file.create_mapped(path, HEADER_BYTES + slots * layout.slot_bytes, fill)
        return cls(mapping, layout, slots)

    def write(self, record: StepRecord) -> None:
        """Write one record. Never raises: a failed write is counted in `failed`."""
        self.write_fields(
            record.step, record.time_ns, record.kv_tokens, record.policy_version, record.num_tokens, record.padded_tokens,
            record.batch_size, record.k, record.flags, record.draft_s, record.verify_s, record.draft_extend_s, record.step_s,
            record.confidences, record.verify_len, record.accept_len, record.request_ids,
        )  # fmt: skip

    def write_fields(
        self, step: int, time_ns: int, kv_tokens: int, policy_version: int, num_tokens: int, padded_tokens: int,
        batch_size: int, k: int, flags: int, draft_s: float, verify_s: float, draft_extend_s: float, step_s: float,
        confidences: Float32s, verify_len: Lengths, accept_len: Lengths,
        request_ids: RequestIds,
    ) -> None:  # fmt: skip
        """Write a record from the fields of a StepRecord: same names, same units. Never raises.

        The arrays must be C-contiguous, of the types named, with one row per request; with a wrong length the write fails.
        """
        try:
            mapping, words, layout, index = self._map, self._words, self.layout, self.written
            rows = len(verify_len)
            if rows > layout.max_batch or k > layout.max_k:
                rows, k = min(rows, layout.max_batch), min(k, layout.max_k)
                confidences = np.ascontiguousarray(confidences[:rows, :k])
                verify_len, accept_len = np.minimum(verify_len[:rows], k), np.minimum(accept_len[:rows], k)
                request_ids = request_ids[:rows]
            base = HEADER_BYTES + index % self.slots * layout.slot_bytes
            sequence = 2 * index + 1
            words[base >> 3] = sequence
            if WEAKLY_ORDERED:
                fence()
            HEAD.pack_into(
                mapping, base, sequence, step, time_ns, kv_tokens, policy_version, num_tokens, padded_tokens, batch_size,
                rows, k, flags, draft_s, verify_s, draft_extend_s, step_s,
            )  # fmt: skip
            # The ignores: numpy's stubs declare the buffer protocol from Python 3.12 on. array.data would satisfy mypy, and
            # would make the write a tenth slower.
            at = base + layout.confidences
            mapping[at : at + 4 * rows * k] = confidences  # type: ignore[call-overload]
            at = base + layout.request_ids
            mapping[at : at + 4 * rows] = request_ids  # type: ignore[call-overload]
            at = base + layout.verify_len
            mapping[at : at + rows] = verify_len  # type: ignore[call-overload]
            at = base + layout.accept_len
            mapping[at : at + rows] = accept_len  # type: ignore[call-overload]
            if WEAKLY_ORDERED:
                fence()
            words[base >> 3] = sequence + 1
            if WEAKLY_ORDERED:
                fence()
            words[_CURSOR_WORD] = self.written = index + 1
        except Exception:
            self.failed += 1  # the slot's sequence stays odd; the next write uses the same slot

    def close(self) -> None:
        """Unmap. The file stays for its readers. Later writes count as failed."""
        self._words.release()
        self._map.close()


class RingReader(mapped_file.Closeable):
    """A reader's end. Each record from `start` on is counted once, as delivered, lost, torn or invalid:

        position - start = delivered + lost + torn + invalid

    lost: overwritten before it was read. torn: overwritten while it was read. invalid: complete, with impossible values
    (`reasons` counts which). generation: of the ring file. position: index of the next record to read.
    """

    def __init__(self, path: Path, mapping: mmap.mmap, identity: mapped_file.Identity) -> None:
        """Use a mapped file. Callers use `open`. Raises RingLayoutError."""
        self.path = path
        self.info, self.generation, self.layout, self.slots = _read_header(path, mapping)
        self.delivered = self.lost = self.torn = self.invalid = 0
        self.reasons: Counter[str] = Counter()
        self.start = self.position = 0
        self._map = mapping
        self._identity = identity

    @classmethod
    def open(cls, path: Path | str, start: Literal["oldest", "newest"] | int = "oldest") -> RingReader:
        """Open a ring. start: at the "oldest" record in it, behind the "newest" (future records only), or at a position.

        Raises RingLayoutError for a foreign, truncated or damaged file or another layout version, FileNotFoundError when
        there is no file, OSError when it cannot be read.
        """
        path = Path(path)
        try:
            mapping, identity = mapped_file.open_mapped(path)
        except ValueError as error:
            raise RingLayoutError(path, "file", error, "a ring") from error
        try:
            reader = cls(path, mapping, identity)
        except RingLayoutError:
            mapping.close()
            raise
        cursor = reader.cursor
        begin = start if isinstance(start, int) else cursor if start == "newest" else cursor - reader.slots
        reader.start = reader.position = min(max(begin, 0), cursor)
        return reader

    @property
    def cursor(self) -> int:
        """Records written to this ring so far."""
        cursor: int = _WORD.unpack_from(self._map, _CURSOR_OFFSET)[0]
        return cursor

    def poll(self, limit: int = 4096) -> list[StepRecord]:
        """Return copies of the records written since the last poll, oldest first, at most `limit`."""
        cursor = self.cursor
        if not self.position < cursor < _CURSOR_LIMIT:
            return []
        missed = cursor - self.slots - self.position
        if missed > 0:
            self.lost += missed
            self.position += missed
        end = min(cursor, self.position + limit)
        records = [record for index in range(self.position, end) if (record := self._read(index)) is not None]
        self.position = end
        self.delivered += len(records)
        return records

    def replaced(self) -> bool:
        """Return whether the path holds another ring now: the engine was restarted. False when there is no file."""
        identity = mapped_file.identity_at(self.path)
        return identity is not None and (identity != self._identity or _HEADER.unpack_from(self._map)[3] != self.generation)

    def close(self) -> None:
        """Unmap."""
        self._map.close()

    def _read(self, index: int) -> StepRecord | None:
        """Copy one slot and decode the copy. Return None, and count why, when it cannot be accepted."""
        base = HEADER_BYTES + index % self.slots * self.layout.slot_bytes
        before, slot, after = self._copy(base)
        whole = 2 * index + 2
        if before != whole or after != whole:
            # Odd, or changed during the copy: the writer was writing it. Otherwise it holds a later, complete record.
            if before & 1 or before == whole:
                self.torn += 1
            else:
                self.lost += 1
            return None
        record = decode_slot(slot, self.layout)
        reason = "layout" if record is None else record.invalid_reason()
        if reason is not None:
            self.invalid += 1
            self.reasons[reason] += 1
            return None
        return record

    def _copy(self, base: int) -> tuple[int, bytes, int]:
        """Copy the slot at `base`: its sequence before, its bytes, its sequence after."""
        (before,) = _WORD.unpack_from(self._map, base)
        if WEAKLY_ORDERED:
            fence()
        slot = self._map[base : base + self.layout.slot_bytes]
        if WEAKLY_ORDERED:
            fence()
        (after,) = _WORD.unpack_from(self._map, base)
        return before, slot, after


def _checksum(mapping: mmap.mmap, info_bytes: int) -> int:
    part = zlib.crc32(mapping[16:_CURSOR_OFFSET], zlib.crc32(mapping[:12]))
    return zlib.crc32(mapping[INFO_OFFSET : INFO_OFFSET + info_bytes], part)


def _read_header(path: Path, mapping: mmap.mmap) -> tuple[EngineInfo, int, SlotLayout, int]:
    """Return (info, generation, layout, slots) of a mapped file. Raises RingLayoutError."""
    if len(mapping) < HEADER_BYTES:
        raise RingLayoutError(path, "size", f"{len(mapping)} bytes", f"at least {HEADER_BYTES}")
    magic, version, checksum, generation, slots, slot_bytes, max_batch, max_k, info_bytes = _HEADER.unpack_from(mapping)
    if magic != MAGIC:
        raise RingLayoutError(path, "magic", magic, MAGIC)
    if version != LAYOUT_VERSION:
        raise RingLayoutError(path, "layout version", version, LAYOUT_VERSION)
    if info_bytes > HEADER_BYTES - INFO_OFFSET:
        raise RingLayoutError(path, "engine information", f"{info_bytes} bytes", f"at most {HEADER_BYTES - INFO_OFFSET}")
    if checksum != (wanted := _checksum(mapping, info_bytes)):
        raise RingLayoutError(path, "header checksum", f"{checksum:#010x}", f"{wanted:#010x}")
    try:
        layout = SlotLayout.of(max_batch, max_k)
        info = EngineInfo.from_json(mapping[INFO_OFFSET : INFO_OFFSET + info_bytes])
    except ValueError as error:
        raise RingLayoutError(path, "header", error, "a header written by this version") from error
    if slot_bytes != layout.slot_bytes:
        raise RingLayoutError(path, "slot_bytes", slot_bytes, layout.slot_bytes)
    if not MIN_SLOTS <= slots <= MAX_SLOTS:
        raise RingLayoutError(path, "slots", slots, f"{MIN_SLOTS}..{MAX_SLOTS}")
    if len(mapping) != (size := HEADER_BYTES + slots * slot_bytes):
        raise RingLayoutError(path, "size", f"{len(mapping)} bytes", size)
    return info, generation, layout, slots
