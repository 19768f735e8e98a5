"""The record ring, read by the sidecar and by `record`."""

from __future__ import annotations

import struct
import zlib

from adaptive_spec.wire.ring import HEADER_BYTES, INFO_OFFSET, MAGIC, RingLayoutError, RingReader, RingWriter
from adaptive_spec.wire.slot import LAYOUT_VERSION
from tests.fuzz.target import FileTarget
from tests.support.wire import engine, record_of

SLOTS = 3
ROWS, K = 2, 2
LENGTH = struct.Struct("<H")


class RecordRings(FileTarget):
    """The first byte: bit 0 whether checksums, cursor and record numbers are made right. Two bytes: how much of the rest is the
    beginning of the file; what follows stands behind the header.
    """

    name = "ring"
    longest = 2048

    def __init__(self) -> None:
        super().__init__()
        self.info = engine(ROWS, tuple(range(K + 1)))

    def seeds(self) -> dict[str, bytes]:
        self.path.unlink(missing_ok=True)
        writer = RingWriter.create(self.path, self.info, SLOTS)
        for index in range(SLOTS + 2):
            writer.write(record_of(index, ROWS, K))
        writer.close()
        whole = self.path.read_bytes()
        self.path.unlink()
        front = whole[:HEADER_BYTES].rstrip(b"\0")
        compact = LENGTH.pack(len(front)) + front + whole[HEADER_BYTES:]
        return {
            "ring": b"\0" + compact, "repaired": b"\1" + compact, "front": b"\1" + compact[: len(front)]
        }  # fmt: skip

    def run(self, data: bytes) -> str:
        kind, rest = (data[0] if data else 0), data[1:]
        if len(rest) < LENGTH.size:
            content = rest
        else:
            front = rest[LENGTH.size :][: LENGTH.unpack_from(rest)[0]]
            content = front[:HEADER_BYTES].ljust(HEADER_BYTES, b"\0") + rest[LENGTH.size + len(front) :]
        if kind & 1:
            content = repaired(content)
        self.write(content)
        try:
            reader = RingReader.open(self.path)
        except RingLayoutError as error:
            return str(error)
        with reader:
            records = reader.poll()
            assert reader.position - reader.start == reader.delivered + reader.lost + reader.torn + reader.invalid
            assert len(records) == reader.delivered <= reader.slots
            assert all(record.invalid_reason() is None for record in records)
            assert sum(reader.reasons.values()) == reader.invalid
            assert reader.poll() == []
            assert not reader.replaced()
            return "" if records else "no record"


def repaired(content: bytes) -> bytes:
    """The file with magic, version, checksum, cursor, record numbers and lengths right: what is behind them is reached."""
    if len(content) < HEADER_BYTES:
        return content
    ring = bytearray(content)
    struct.pack_into("<8sI", ring, 0, MAGIC, LAYOUT_VERSION)
    slots, slot_bytes, _, _, info_bytes = struct.unpack_from("<IIIII", ring, 24)
    info_bytes = min(info_bytes, HEADER_BYTES - INFO_OFFSET)
    struct.pack_into("<I", ring, 40, info_bytes)
    if 0 < slot_bytes <= 1 << 12 and 0 < slots < 64:
        ring = ring[: HEADER_BYTES + (slots + 1) * slot_bytes].ljust(HEADER_BYTES + (slots + 1) * slot_bytes, b"\0")
        cursor = struct.unpack_from("<Q", ring, 64)[0] % (1 << 20)
        struct.pack_into("<QQ", ring, 64, cursor, (1 << 64) - 1 - cursor)
        for index in range(max(cursor - slots, 0), cursor):
            at = HEADER_BYTES + index % (slots + 1) * slot_bytes
            if at + 8 <= len(ring):
                struct.pack_into("<Q", ring, at, index + 1)
    part = zlib.crc32(ring[16:64], zlib.crc32(ring[:12]))
    struct.pack_into("<I", ring, 12, zlib.crc32(ring[INFO_OFFSET : INFO_OFFSET + info_bytes], part))
    return bytes(ring)
