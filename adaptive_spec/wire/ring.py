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
| 72  | u64 | the cursor with all bits inverted: a cursor that was read in pieces is noticed |
| 128 | JSON | EngineInfo |
| 4096 | slots + 1 | record `index` is in slot `index % (slots + 1)`, layout in `slot.py` |

The writer writes a whole record, then the cursor: two calls of pwrite. So record `index` is complete while index < cursor, and
its slot may be written again once cursor = index + slots + 1. A reader reads the cursor, copies slots, reads the cursor again,
and keeps the records that no write can have touched meanwhile. One slot more than `slots` makes `slots` of them readable at any
time. Neither side waits: a slow reader loses records and counts them; of a writer that is killed while it writes a record,
nobody sees that record. `tests/wire/protocol_model.py` searches this protocol exhaustively.

The ring is a file and not multiprocessing.shared_memory, whose resource tracker deletes the segment when a reader exits
(Python issue 82300, fixed in 3.13), and which is mapped: see `shared_file.py`.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections import Counter
from os import pwrite
from pathlib import Path
from typing import Literal

import numpy as np

from adaptive_spec.domain.arrays import Float32s, Lengths, RequestIds
from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.domain.step_record import StepRecord
from adaptive_spec.wire.shared_file import WEAKLY_ORDERED, Closeable, SharedFile, create_file, fence, identity_at, open_file
from adaptive_spec.wire.slot import HEAD, LAYOUT_VERSION, MAX_BATCH_LIMIT, MAX_K_LIMIT, SlotLayout, decode_slot, record_bytes

MAGIC = b"ADSPRING"
HEADER_BYTES = 4096
INFO_OFFSET = 128
MIN_SLOTS = 2
MAX_SLOTS = 1 << 20

_MAGIC_VERSION = struct.Struct("<8sI")
_HEADER = struct.Struct("<8sIIQIIIII")
_WORD = struct.Struct("<Q")
_CURSOR = struct.Struct("<QQ")
_CURSOR_OFFSET = 64
_CURSOR_LIMIT = 1 << 62
_ALL_BITS = (1 << 64) - 1
_CURSOR_READS = 3
POLL_BYTES = 1 << 20
"""Most bytes of slots read at once."""


class RingLayoutError(ValueError):
    """A file that this version cannot read as a ring: path, field, found value and expected value."""

    def __init__(self, path: Path, field: str, found: object, wanted: object) -> None:
        super().__init__(f"{path}: {field}: must be {wanted}, got {found}")
        self.path, self.field, self.found, self.wanted = path, field, found, wanted


class RingWriter:
    """The engine's end. written: records written. failed: writes that failed; a write never raises."""

    def __init__(self, path: Path, file: SharedFile, header: bytes, layout: SlotLayout, slots: int) -> None:
        """Use an open ring. Callers use `create`."""
        self.layout = layout
        self.slots = slots
        self.written = 0
        self.failed = 0
        self._path, self._file, self._header = path, file, header
        self._descriptor = file.descriptor
        self._stride = slots + 1

    @classmethod
    def create(
        cls, path: Path | str, info: EngineInfo, slots: int = 1024, max_k: int | None = None, *, allocate: bool = True
    ) -> RingWriter:
        """Create the ring file in an existing folder; an older ring there is replaced.

        slots: 2..2^20 records. max_k: columns of a slot, by default the engine's largest K. Records with a larger K, or a batch
        beyond the engine's max_batch, are cut. allocate: see `shared_file.create_file`. Raises ValueError for numbers out of
        range, OSError.
        """
        path = Path(path)
        if max_k is None:
            max_k = min(max(info.max_k, 1), MAX_K_LIMIT)
        layout = SlotLayout.of(min(info.max_batch, MAX_BATCH_LIMIT), max_k)
        if not MIN_SLOTS <= slots <= MAX_SLOTS:
            raise ValueError(f"slots: must be in {MIN_SLOTS}..{MAX_SLOTS}, got {slots}")
        try:
            about = info.checked().to_json()
        except ValueError as error:
            raise ValueError(f"engine information: {error}") from error
        if len(about) > HEADER_BYTES - INFO_OFFSET:
            raise ValueError(f"engine information: must be at most {HEADER_BYTES - INFO_OFFSET} bytes, got {len(about)}")
        generation = int.from_bytes(os.urandom(8), "little")

        sizes = (slots, layout.slot_bytes, layout.max_batch, layout.max_k, len(about))
        header = bytearray(INFO_OFFSET + len(about))
        header[INFO_OFFSET:] = about
        _HEADER.pack_into(header, 0, MAGIC, LAYOUT_VERSION, 0, generation, *sizes)
        _HEADER.pack_into(header, 0, MAGIC, LAYOUT_VERSION, _checksum(header, len(about)), generation, *sizes)
        _CURSOR.pack_into(header, _CURSOR_OFFSET, 0, _ALL_BITS)
        file = create_file(path, HEADER_BYTES + (slots + 1) * layout.slot_bytes, {0: bytes(header)}, allocate=allocate)
        return cls(path, file, bytes(header), layout, slots)

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
            layout, index = self.layout, self.written
            rows = len(verify_len)
            if rows > layout.max_batch or k > layout.max_k:
                rows, k = min(rows, layout.max_batch), min(k, layout.max_k)
                confidences = np.ascontiguousarray(confidences[:rows, :k])
                verify_len, accept_len = np.minimum(verify_len[:rows], k), np.minimum(accept_len[:rows], k)
                request_ids = request_ids[:rows]
            head = HEAD.pack(
                index + 1, step, time_ns, kv_tokens, policy_version, num_tokens, padded_tokens, batch_size,
                rows, k, flags, draft_s, verify_s, draft_extend_s, step_s,
            )  # fmt: skip
            # numpy's stubs declare the buffer protocol from Python 3.12 on.
            record = b"".join((head, confidences, request_ids, verify_len, accept_len))  # type: ignore[arg-type]
            length = len(record)
            if length != record_bytes(rows, k):
                raise ValueError("the arrays do not have one row per request")
            descriptor = self._descriptor
            if pwrite(descriptor, record, HEADER_BYTES + index % self._stride * layout.slot_bytes) != length:
                raise OSError("a part of the record was written")
            if WEAKLY_ORDERED:
                fence()
            if pwrite(descriptor, _CURSOR.pack(index + 1, _ALL_BITS - index - 1), _CURSOR_OFFSET) != _CURSOR.size:
                raise OSError("a part of the cursor was written")
            self.written = index + 1
        except Exception:
            self.failed += 1  # the cursor has not moved; the next write uses the same slot

    def in_place(self) -> bool:
        """Whether readers who open the path find this ring, whole and as it was written. Raises nothing."""
        try:
            header = self._file.read(len(self._header), 0)
            _CURSOR.pack_into(known := bytearray(self._header), _CURSOR_OFFSET, self.written, _ALL_BITS - self.written)
            return header == known and self._file.is_whole_at(self._path)
        except (OSError, ValueError):
            return False

    def close(self) -> None:
        """Close. The file stays for its readers. Later writes count as failed."""
        self._descriptor = -1
        self._file.close()


class RingReader(Closeable):
    """A reader's end. Each record from `start` on is counted once, as delivered, lost, torn or invalid:

        position - start = delivered + lost + torn + invalid

    lost: overwritten before it was read. torn: overwritten while it was read. invalid: complete, with impossible values
    (`reasons` counts which). generation: of the ring file. position: index of the next record to read.
    """

    def __init__(self, path: Path, file: SharedFile) -> None:
        """Use an open file. Callers use `open`. Raises RingLayoutError, OSError."""
        self.path = path
        self.info, self.generation, self.layout, self.slots = _read_header(path, file)
        self.delivered = self.lost = self.torn = self.invalid = 0
        self.reasons: Counter[str] = Counter()
        self.start = self.position = 0
        self._file = file
        self._cursor = 0

    @classmethod
    def open(cls, path: Path | str, start: Literal["oldest", "newest"] | int = "oldest") -> RingReader:
        """Open a ring. start: at the "oldest" record in it, behind the "newest" (future records only), or at a position.

        Raises RingLayoutError for a foreign, truncated or damaged file or another layout version, FileNotFoundError when
        there is no file, OSError when it cannot be read.
        """
        path = Path(path)
        try:
            file = open_file(path)
        except ValueError as error:
            raise RingLayoutError(path, "file", error, "a ring") from error
        try:
            reader = cls(path, file)
        except BaseException:
            file.close()
            raise
        cursor = reader.cursor
        reader.seek(start if isinstance(start, int) else cursor if start == "newest" else cursor - reader.slots)
        return reader

    def seek(self, position: int) -> None:
        """Begin at a position before anything is read; one that was overwritten counts as lost."""
        self.start = self.position = min(max(position, 0), self.cursor)

    @property
    def cursor(self) -> int:
        """Records written to this ring so far, as far as can be read: never less than before. Raises nothing."""
        for _ in range(_CURSOR_READS):
            try:
                cursor, inverted = _CURSOR.unpack(self._file.read(_CURSOR.size, _CURSOR_OFFSET))
            except (OSError, ValueError):
                break
            if cursor ^ inverted == _ALL_BITS:
                self._cursor = max(self._cursor, cursor if cursor < _CURSOR_LIMIT else 0)
                break
        return self._cursor

    def poll(self, limit: int = 4096, stop: int | None = None) -> list[StepRecord]:
        """Return copies of the records written since the last poll, oldest first, at most `limit`. Raises nothing.

        stop: records from this index on are left for later polls.
        """
        cursor = self.cursor
        if self.position >= cursor:
            return []
        missed = cursor - self.slots - self.position
        if missed > 0:
            self.lost += missed
            self.position += missed
        end = min(cursor, self.position + limit, cursor if stop is None else stop)
        records: list[StepRecord] = []
        while self.position < end:
            records += self._read(self.position, end)
        self.delivered += len(records)
        return records

    def replaced(self) -> bool:
        """Return whether the path holds another ring now: the engine was restarted. False when there is no file."""
        identity = identity_at(self.path)
        if identity is None:
            return False
        try:
            return identity != self._file.identity or _HEADER.unpack(self._file.read(_HEADER.size, 0))[3] != self.generation
        except (OSError, ValueError):
            return False  # damaged: the engine makes another one

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _read(self, first: int, end: int) -> list[StepRecord]:
        """Copy slots that lie side by side, from record `first` on, and move the position behind them.

        A record is counted as torn when it may have been overwritten during the copy, and as invalid when it is complete and
        cannot be a record.
        """
        layout = self.layout
        slot = first % (self.slots + 1)
        count = min(end - first, self.slots + 1 - slot, max(POLL_BYTES // layout.slot_bytes, 1))
        data = self._copy(HEADER_BYTES + slot * layout.slot_bytes, count * layout.slot_bytes)
        # Record `index` may be overwritten as soon as the cursor is index + slots + 1.
        torn = min(max(self.cursor - self.slots - first, 0), count)
        self.torn += torn
        self.position = first + count
        records = []
        for number in range(torn, count):
            at = number * layout.slot_bytes
            record, reason = self._record(data[at : at + layout.slot_bytes], first + number)
            if record is not None:
                records.append(record)
            else:
                self.invalid += 1
                self.reasons[reason] += 1
        return records

    def _copy(self, offset: int, length: int) -> memoryview:
        """Copy a part of the file; shorter where the file is."""
        if WEAKLY_ORDERED:
            fence()
        try:
            data = os.pread(self._file.descriptor, length, offset)
        except OSError:
            data = b""
        if WEAKLY_ORDERED:
            fence()
        return memoryview(data)

    def _record(self, slot: memoryview, index: int) -> tuple[StepRecord | None, str]:
        """Return a record and "", or None and why it cannot be one."""
        if len(slot) < self.layout.slot_bytes:
            return None, "size"
        if _WORD.unpack_from(slot)[0] != index + 1:
            return None, "number"
        record = decode_slot(slot, self.layout)
        reason = "layout" if record is None else record.invalid_reason()
        return (record, "") if reason is None else (None, reason)


def _checksum(header: bytes | bytearray, info_bytes: int) -> int:
    part = zlib.crc32(header[16:_CURSOR_OFFSET], zlib.crc32(header[:12]))
    return zlib.crc32(header[INFO_OFFSET : INFO_OFFSET + info_bytes], part)


def _read_header(path: Path, file: SharedFile) -> tuple[EngineInfo, int, SlotLayout, int]:
    """Return (info, generation, layout, slots) of an open file. Raises RingLayoutError, OSError."""
    if file.size < HEADER_BYTES:
        raise RingLayoutError(path, "size", f"{file.size} bytes", f"at least {HEADER_BYTES}")
    try:
        header = file.read(HEADER_BYTES, 0)
    except ValueError as error:
        raise RingLayoutError(path, "size", error, f"at least {HEADER_BYTES} bytes") from error
    magic, version, checksum, generation, slots, slot_bytes, max_batch, max_k, info_bytes = _HEADER.unpack_from(header)
    if magic != MAGIC:
        raise RingLayoutError(path, "magic", magic, MAGIC)
    if version != LAYOUT_VERSION:
        raise RingLayoutError(path, "layout version", version, LAYOUT_VERSION)
    if info_bytes > HEADER_BYTES - INFO_OFFSET:
        raise RingLayoutError(path, "engine information", f"{info_bytes} bytes", f"at most {HEADER_BYTES - INFO_OFFSET}")
    if checksum != (wanted := _checksum(header, info_bytes)):
        raise RingLayoutError(path, "header checksum", f"{checksum:#010x}", f"{wanted:#010x}")
    try:
        layout = SlotLayout.of(max_batch, max_k)
        info = EngineInfo.from_json(header[INFO_OFFSET : INFO_OFFSET + info_bytes])
    except ValueError as error:
        raise RingLayoutError(path, "header", error, "a header written by this version") from error
    if slot_bytes != layout.slot_bytes:
        raise RingLayoutError(path, "slot_bytes", slot_bytes, layout.slot_bytes)
    if not MIN_SLOTS <= slots <= MAX_SLOTS:
        raise RingLayoutError(path, "slots", slots, f"{MIN_SLOTS}..{MAX_SLOTS}")
    if file.size != (size := HEADER_BYTES + (slots + 1) * slot_bytes):
        raise RingLayoutError(path, "size", f"{file.size} bytes", size)
    return info, generation, layout, slots
