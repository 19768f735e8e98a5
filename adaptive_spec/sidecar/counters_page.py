"""The counters page: what is counted, on disk whenever it is shown, so that a killed sidecar never shows less afterwards.

File layout, little-endian:

| offset | type | field |
|---|---|---|
| 0    | 8 bytes | magic `ADSPCNTR` |
| 8    | u32 | layout version |
| 4096 | slot | slot 0 |
| 4096 + SLOT_BYTES | slot | slot 1 |

A slot is u64 number, u32 length, u32 CRC32 of number, length and content, then the content as JSON. The two slots are written in
turn, each with the next number: of a process that is killed while it writes one, the other is whole. The valid slot with the
larger number counts. All blocks are taken at creation: a disk that becomes full later changes nothing.

Counters and ring position are written together. Records up to that position are counted; a sidecar that starts from an older
checkpoint learns those behind the checkpoint again without counting them.
"""

from __future__ import annotations

import json
import logging
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.wire.shared_file import ForeignFileError, SharedFile, create_file, open_file, said_aside

COUNTERS_NAME = "counters.page"
MAGIC, LAYOUT_VERSION = b"ADSPCNTR", 1
SLOTS_OFFSET = 4096
SLOT_BYTES = 1 << 17
"""The counters of an engine with 32 draft positions take 9 KB as JSON."""

_FILE = struct.Struct("<8sI")
_SLOT = struct.Struct("<QII")
_CHECKED = struct.Struct("<QI")
_POSITION_LIMIT = 1 << 62

log = logging.getLogger(__name__)


class KeptCounters(NamedTuple):
    """labels: constant labels of the metrics. generation, position: of the ring, and how many of its records are counted.

    waiting: of these, steps whose expected accepted tokens are not counted yet. counters: `Counters.state()`.
    """

    labels: tuple[str, str, int]
    generation: int
    position: int
    waiting: int
    counters: Mapping[str, Any]


def labels_of(info: EngineInfo) -> tuple[str, str, int]:
    """Return the constant labels of an engine's metrics: what a counter's series goes by."""
    return info.model, info.gpu, info.tp


class CountersPage:
    """The page of one folder. Only the sidecar that holds the folder's role opens it."""

    def __init__(self, path: Path) -> None:
        """Nothing is opened before the first call."""
        self._path = path
        self._file: SharedFile | None = None
        self._number = 0

    def load(self) -> KeptCounters | None:
        """Return what was saved last; None when there is nothing. A damaged or foreign file is set aside. Raises OSError."""
        try:
            file = open_file(self._path, writable=True)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self._set_aside(error)
            return None
        try:
            number, kept = _newest(file)
        except ValueError as error:
            file.close()
            self._set_aside(error)
            return None
        self.close()
        self._file, self._number = file, number
        return kept

    def save(self, kept: KeptCounters) -> None:
        """Write. A page that was deleted is made again. Raises OSError, and ValueError for more than a slot holds."""
        content = json.dumps({**kept._asdict(), "generation": str(kept.generation)}).encode()
        if len(content) > SLOT_BYTES - _SLOT.size:
            raise ValueError(f"counters: must be at most {SLOT_BYTES - _SLOT.size} bytes, got {len(content)}")
        if self._file is None or not self._file.is_whole_at(self._path):
            file = create_file(self._path, SLOTS_OFFSET + 2 * SLOT_BYTES, {0: _FILE.pack(MAGIC, LAYOUT_VERSION)})
            self.close()
            self._file = file
        number = self._number + 1
        slot = _SLOT.pack(number, len(content), _checksum(number, content)) + content
        self._file.write(slot, SLOTS_OFFSET + number % 2 * SLOT_BYTES)
        self._number = number

    def close(self) -> None:
        """Close. The file stays."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _set_aside(self, reason: Exception) -> None:
        why = "foreign" if isinstance(reason, ForeignFileError) else "damaged"
        log.warning("%s cannot be used: %s; %s", self._path, reason, said_aside(self._path, why))


def _newest(file: SharedFile) -> tuple[int, KeptCounters]:
    """Return number and content of the newest whole slot. Raises ValueError when there is none."""
    magic, version = _FILE.unpack(file.read(_FILE.size, 0))
    if (magic, version) != (MAGIC, LAYOUT_VERSION):
        raise (ForeignFileError if any(magic) else ValueError)(f"it is no counters page of layout version {LAYOUT_VERSION}")
    found = []
    for slot in range(2):
        offset = SLOTS_OFFSET + slot * SLOT_BYTES
        number, length, checksum = _SLOT.unpack(file.read(_SLOT.size, offset))
        if 0 < length <= SLOT_BYTES - _SLOT.size:
            content = file.read(length, offset + _SLOT.size)
            if checksum == _checksum(number, content):
                found.append((number, content))
    if not found:
        raise ValueError("it is damaged: no slot has its checksum")
    number, content = max(found)
    return number, _parsed(content)


def _parsed(content: bytes) -> KeptCounters:
    """Raise ValueError when it cannot be the content of a slot."""
    try:
        fields = json.loads(content)
        model, gpu, tp = fields["labels"]
        kept = KeptCounters(
            (str(model), str(gpu), int(tp)), int(fields["generation"]), int(fields["position"]), int(fields["waiting"]),
            fields["counters"],
        )  # fmt: skip
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"it is damaged: {error}") from error
    if not (0 <= kept.position < _POSITION_LIMIT and kept.waiting >= 0 and isinstance(kept.counters, dict)):
        raise ValueError("it is damaged: a number is out of range")
    return kept


def _checksum(number: int, content: bytes) -> int:
    return zlib.crc32(content, zlib.crc32(_CHECKED.pack(number, len(content))))
