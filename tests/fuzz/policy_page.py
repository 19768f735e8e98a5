"""The policy page, read by the engine and by the next sidecar."""

from __future__ import annotations

import struct
import zlib

import numpy as np

from adaptive_spec.domain.policy import Granularity, Mode, Policy, Trial
from adaptive_spec.domain.survival import GRID_POINTS, SurvivalMap
from adaptive_spec.engine_side.planner import Planner
from adaptive_spec.wire.policy_page import HEADER_BYTES, LAYOUT_VERSION, MAGIC, PolicyPage, PolicyPageError, PolicyPageReader
from adaptive_spec.wire.policy_payload import check_policy, decode_policy, encode_policy
from tests.fuzz.target import FileTarget

FRONT = 256
"""Bytes at the beginning of the file that have a meaning; the rest of its header is zero."""
NOW_NS = 1 << 40
MAX_K, LAUNCH_K = 2, 1


def policy(version: int, granularity: Granularity = Granularity.REQUEST) -> Policy:
    """A small policy, for batches of at most 2 requests."""
    return Policy(
        version, Mode.ACTIVE, True, granularity, MAX_K, np.array([[1, 2], [1, 2], [0, 2]], np.uint8),
        np.array([100.0], np.float32), np.full((3, 3), 1e-3, np.float32), np.linspace(1e-3, 2e-3, 7, dtype=np.float32), 1e-9,
        SurvivalMap(np.full((2, GRID_POINTS), 0.5, np.float32), True), False, (Trial(1, 2, 2, 4),), ((1, (0, 1, 2)), (2, (0, 2))),
    )  # fmt: skip


class PolicyPages(FileTarget):
    """The first byte: bit 0 whether the checksums are made right, bit 1 whether the rest is a payload alone, bit 2 whether
    a sidecar takes the page over.

    Otherwise the rest is the file without the zeros between FRONT and HEADER_BYTES.
    """

    name = "page"
    longest = 4096

    def seeds(self) -> dict[str, bytes]:
        self.path.unlink(missing_ok=True)
        payload = encode_policy(policy(1))
        with PolicyPage.create_or_open(self.path, len(payload)) as page:
            page.publish(policy(1))
            page.publish(policy(2, Granularity.BATCH))
            page.heartbeat(NOW_NS)
        whole = self.path.read_bytes()
        self.path.unlink()
        compact = whole[:FRONT] + whole[HEADER_BYTES:]
        return {
            "page": b"\0" + compact,
            "taken_over": b"\5" + compact,
            "repaired": b"\1" + compact,
            "payload": b"\2" + payload,
            "front": b"\1" + compact[:FRONT],
        }

    def run(self, data: bytes) -> str:
        kind, rest = (data[0] if data else 0), data[1:]
        if kind & 2:
            return self._payload(rest)
        content = rest[:FRONT].ljust(FRONT, b"\0") + bytes(HEADER_BYTES - FRONT) + rest[FRONT:] if len(rest) > 64 else rest
        if kind & 1:
            content = repaired(content)
        answer = self._read(content)
        if kind & 4:
            self._taken_over()
        return answer

    def _payload(self, payload: bytes) -> str:
        try:
            read = decode_policy(payload)
        except ValueError as error:
            return str(error)
        written = encode_policy(read)
        assert len(written) == len(payload)
        assert encode_policy(decode_policy(written)) == written
        _executed(read)
        return ""

    def _read(self, content: bytes) -> str:
        self.write(content)
        try:
            with PolicyPageReader.open(self.path) as reader:
                read = reader.poll(NOW_NS)
                if read is not None:
                    check_policy(read)
                    _executed(read)
                assert reader.poll(NOW_NS) is read
        except PolicyPageError as error:
            return str(error)
        return ""

    def _taken_over(self) -> None:
        # The next sidecar takes the page over or sets it aside; afterwards the engine can read it.
        with PolicyPage.create_or_open(self.path, 4096) as page:
            if page.last_version < 2**63 - 1:
                page.publish(policy(page.last_version + 1))
                page.heartbeat(NOW_NS)
                with PolicyPageReader.open(self.path) as reader:
                    found = reader.poll(NOW_NS)
                    assert found is not None
                    assert found.version == page.last_version
        for path in self.folder.glob("*.damaged-*"):
            path.unlink()


def _executed(read: Policy) -> None:
    """Whatever the policy says: K and verify_len are within what the engine can run."""
    planner = Planner(LAUNCH_K, MAX_K)
    planner.adopt(read)
    for batch_size, kv_tokens in ((1, 0), (2, 150), (9, 10**9)):
        k = planner.draft_length(batch_size, kv_tokens)
        assert 0 <= k <= MAX_K
        lengths = planner.verify_lengths(np.full((batch_size, k), 0.5, np.float32))
        assert lengths.shape == (batch_size,)
        assert not lengths.size or lengths.max() <= k


def repaired(content: bytes) -> bytes:
    """The file with every checksum, magic number and length right, so that what stands behind them is reached."""
    if len(content) < HEADER_BYTES + 2:
        return content
    page = bytearray(content[: len(content) - (len(content) - HEADER_BYTES) % 2])
    capacity = (len(page) - HEADER_BYTES) // 2
    struct.pack_into("<8sI", page, 0, MAGIC, LAYOUT_VERSION)
    struct.pack_into("<Q", page, 16, capacity)
    struct.pack_into("<I", page, 12, zlib.crc32(page[16:24], zlib.crc32(page[:12])))
    engine = bytes(page[24:32])
    struct.pack_into("<I", page, 32, zlib.crc32(engine) if any(engine) else 0)
    for number in (0, 1):
        at, start = 128 + 64 * number, HEADER_BYTES + number * capacity
        sequence, version, length = struct.unpack_from("<QQI", page, at)
        length = min(length, capacity)
        struct.pack_into("<QQI", page, at, sequence, version, length)
        struct.pack_into("<I", page, at + 20, zlib.crc32(page[start : start + length], zlib.crc32(page[at : at + 20])))
    return bytes(page)
