"""The policy page: the sidecar publishes policies and a heartbeat; the engine reads both without waiting.

File layout, little-endian (layout version 2):

| offset | type | field |
|---|---|---|
| 0   | 8 bytes | magic `ADSPAGE1` |
| 8   | u32 | layout version |
| 12  | u32 | CRC32 of bytes 0..11 and 16..23 |
| 16  | u64 | capacity: longest payload in bytes |
| 24  | u64 | engine: `EngineInfo.digest` of the engine that the policies are for, 0 = any |
| 32  | u32 | CRC32 of bytes 24..31, 0 with engine 0 |
| 64  | u64 | sequence: policies published, 0 = none yet; the newest payload is in buffer `sequence % 2` |
| 72  | u64 | version of the newest policy |
| 80  | u64 | heartbeat_ns: CLOCK_MONOTONIC of the sidecar's last heartbeat |
| 128 | 2 x 64 bytes | per buffer: u64 sequence, u64 version, u32 payload length, u32 CRC32 of these three and the payload |
| 4096 | 2 x capacity | the two payload buffers |

While the sidecar writes one buffer, the other holds a complete policy, so that a reader always finds one, also after the writer
was killed. A heartbeat is one write of eight bytes and is not part of a checksum. `policy_payload.py` has the payload.
The order of a publication: buffer, its header, then version and sequence. `tests/wire/protocol_model.py` searches it.
"""

from __future__ import annotations

import errno
import logging
import os
import struct
import zlib
from os import pread
from pathlib import Path

from adaptive_spec.domain.policy import Policy
from adaptive_spec.runtime_folder import make_runtime_dir
from adaptive_spec.wire.policy_payload import check_policy, decode_policy, encode_policy, payload_bytes
from adaptive_spec.wire.shared_file import (
    WEAKLY_ORDERED,
    Closeable,
    ForeignFileError,
    Identity,
    SharedFile,
    create_file,
    fence,
    open_file,
    set_aside,
)

__all__ = [
    "PolicyPage", "PolicyPageError", "PolicyPageReader", "check_policy", "decode_policy", "encode_policy", "payload_bytes",
]  # fmt: skip

MAGIC = b"ADSPAGE1"
LAYOUT_VERSION = 2
HEADER_BYTES = 4096
MAX_CAPACITY = 1 << 26

_HEADER = struct.Struct("<8sIIQ")
_LIVE = struct.Struct("<QQQ")
_LIVE_OFFSET = 64
_LIVE_BYTES = _LIVE.size
_HEARTBEAT_OFFSET = 80
_WORD = struct.Struct("<Q")
_PUBLISHED = struct.Struct("<QQ")
_ENGINE = struct.Struct("<QI")
_ENGINE_OFFSET = 24
OPEN_ATTEMPTS = 10
"""Of opening or making a page while other processes do the same."""
_KEY = struct.Struct("<QQI")
_BUFFER = struct.Struct("<QQII")
_BUFFER_OFFSET, _BUFFER_STRIDE = 128, 64
NO_FILE_OF_OURS = (errno.ELOOP, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ENXIO)
"""Errors of opening a link, a folder, a file whose mode does not let its owner read it or lets others use it, and a socket."""

log = logging.getLogger(__name__)


class PolicyPageError(ValueError):
    """A file that this version cannot use as a policy page: path, field, found value and expected value."""

    def __init__(self, path: Path, field: str, found: object, wanted: object) -> None:
        super().__init__(f"{path}: {field}: must be {wanted}, got {found}")
        self.path, self.field, self.found, self.wanted = path, field, found, wanted


class ForeignPageError(PolicyPageError, ForeignFileError):
    """A page of another program or another layout version."""


class PolicyPage(Closeable):
    """The sidecar's end. A lock on the file admits one writer at a time.

    policy: the newest policy on the page, also one that an earlier sidecar published. Each published version is higher than the
    one before, also on a page that was made anew.
    """

    def __init__(self, path: Path, file: SharedFile, capacity: int, engine: int, sequence: int, policy: Policy | None) -> None:
        """Use an open page. Callers use `create_or_open`."""
        self.capacity = capacity
        self.policy = policy
        self._path, self._file, self._engine = path, file, engine
        self._sequence = sequence
        self._heartbeat_ns = 0
        self._before = 0

    @property
    def last_version(self) -> int:
        """Version of the newest policy that was published, 0 when there was none."""
        return self.policy.version if self.policy is not None else self._before

    @classmethod
    def create_or_open(cls, path: Path | str, capacity: int, engine: int = 0) -> PolicyPage:
        """Open the page at `path`, or create it and its folder (0700).

        capacity: longest payload in bytes, see `payload_bytes`. engine: `EngineInfo.digest` of the engine that may act on it, 0
        for any. A page that is too small is replaced by a larger one with the same policy, one for another engine by an empty
        one; a damaged one, or what is no file, is renamed to `NAME.damaged-N`, one of another program or layout version to
        `NAME.foreign-N`. Raises ValueError for a capacity outside 1..2^26,
        BlockingIOError when another sidecar holds the page, another OSError when it cannot be created.
        """
        if not 1 <= capacity <= MAX_CAPACITY:
            raise ValueError(f"capacity: must be in 1..{MAX_CAPACITY}, got {capacity}")
        path = Path(path)
        make_runtime_dir(path.parent)
        for _ in range(OPEN_ATTEMPTS):
            try:
                page = cls._open(path)
                break
            except FileNotFoundError:
                pass
            except BlockingIOError as error:
                raise BlockingIOError(error.errno, f"{path}: another sidecar is writing this policy page") from error
            try:
                return cls._create(path, capacity, engine, replace=False)
            except FileExistsError:
                continue  # another process was faster: its page is opened, and found to be locked
        else:
            raise BlockingIOError(errno.EAGAIN, f"{path}: another sidecar is writing this policy page")
        if page.capacity >= capacity and page._engine == engine:
            return page
        kept = page.policy if page._engine == engine else None
        try:
            other = cls._create(path, max(capacity, page.capacity), engine, page, kept)
        finally:
            page.close()
        return other

    @classmethod
    def _open(cls, path: Path) -> PolicyPage:
        """Open and lock a page. A damaged one is renamed while it is locked: FileNotFoundError, like one that is not there."""
        try:
            file = open_file(path, writable=True, lock=True)
        except ValueError as error:
            raise _moved(path, error) from None
        except OSError as error:
            if error.errno not in NO_FILE_OF_OURS:
                raise
            raise _moved(path, error) from None
        try:
            capacity, engine = _read_header(path, file)
            sequence, _, heartbeat_ns = _LIVE.unpack(file.read(_LIVE.size, _LIVE_OFFSET))
            page = cls(
                path, file, capacity, engine, sequence, _read_policy(file.descriptor, capacity, sequence) if sequence else None
            )
        except ValueError as error:
            try:
                raise _moved(path, error) from None
            finally:
                file.close()
        page._heartbeat_ns = heartbeat_ns
        return page

    @classmethod
    def _create(
        cls, path: Path, capacity: int, engine: int, old: PolicyPage | None = None, policy: Policy | None = None, *,
        replace: bool = True,
    ) -> PolicyPage:  # fmt: skip
        """Make a page, with the policy and the heartbeat of an older one. Raises OSError, FileExistsError with replace=False."""
        capacity = -(-capacity // 64) * 64
        header = _HEADER.pack(MAGIC, LAYOUT_VERSION, _header_checksum(MAGIC, LAYOUT_VERSION, capacity), capacity)
        parts = {0: header + _ENGINE.pack(engine, _engine_checksum(engine))}
        heartbeat_ns = old._heartbeat_ns if old is not None else 0
        sequence = version = 0
        if policy is not None:
            sequence, version = 1, policy.version
            parts |= _buffer(capacity, sequence, version, encode_policy(policy))
        parts[_LIVE_OFFSET] = _LIVE.pack(sequence, version, heartbeat_ns)
        file = create_file(path, HEADER_BYTES + 2 * capacity, parts, lock=True, replace=replace)
        page = cls(path, file, capacity, engine, sequence, policy)
        page._heartbeat_ns, page._before = heartbeat_ns, old.last_version if old is not None else 0
        return page

    def publish(self, policy: Policy) -> None:
        """Publish a policy.

        Raises ValueError when it is not executable, too long for the page, or not a newer version; OSError when it cannot be
        written, see `in_place`. Readers then keep the one before.
        """
        payload = encode_policy(policy)
        if len(payload) > self.capacity:
            raise ValueError(f"policy {policy.version}: must be at most {self.capacity} bytes, got {len(payload)}")
        if policy.version <= self.last_version:
            raise ValueError(f"policy version: must be above the published {self.last_version}, got {policy.version}")
        sequence = self._sequence + 1
        for offset, data in _buffer(self.capacity, sequence, policy.version, payload).items():
            self._file.write(data, offset)
        if WEAKLY_ORDERED:
            fence()
        self._file.write(_PUBLISHED.pack(sequence, policy.version), _LIVE_OFFSET)
        self._sequence, self.policy = sequence, policy

    def heartbeat(self, now_ns: int) -> None:
        """Write the heartbeat. now_ns: CLOCK_MONOTONIC, the same for all processes of a host. Raises OSError."""
        self._heartbeat_ns = now_ns
        self._file.write(_WORD.pack(now_ns), _HEARTBEAT_OFFSET)

    def in_place(self) -> bool:
        """Whether readers who open the path find this page, whole and as it was written. Raises nothing."""
        try:
            if not self._file.is_whole_at(self._path) or _read_header(self._path, self._file) != (self.capacity, self._engine):
                return False
            version = self.policy.version if self.policy is not None else 0
            live = self._file.read(_LIVE.size, _LIVE_OFFSET)
            if live != _LIVE.pack(self._sequence, version, self._heartbeat_ns):
                return False
            return not self._sequence or _read_policy(self._file.descriptor, self.capacity, self._sequence).version == version
        except (OSError, ValueError):
            return False

    def renew(self) -> None:
        """Make the page anew, with its policy, and its folder, after `in_place` was false. Raises OSError."""
        make_runtime_dir(self._path.parent)
        new = PolicyPage._create(self._path, self.capacity, self._engine, self, self.policy)
        old, self._file = self._file, new._file
        self._sequence = new._sequence
        old.close()

    def close(self) -> None:
        """Close and release the lock. The file stays."""
        self._file.close()


class PolicyPageReader(Closeable):
    """The engine's end. policy: the last valid policy. failures: policies and polls that failed."""

    def __init__(self, file: SharedFile, capacity: int, max_age_s: float) -> None:
        """Use an open page. Callers use `open`."""
        self.identity: Identity = file.identity
        self.failures = 0
        self.policy: Policy | None = None
        self._file = file
        self._descriptor = file.descriptor
        self._capacity = capacity
        self._max_age_ns = int(max_age_s * 1e9)
        self._heartbeat_ns = -(1 << 63)
        self._seen = 0
        self._version = 0

    @classmethod
    def open(
        cls, path: Path | str, max_age_s: float = 30.0, last_good: Policy | None = None, engine: int | None = None
    ) -> PolicyPageReader:
        """Open a page.

        max_age_s: age of the heartbeat, seconds, up to which its policy is fresh. last_good: policy in use until this page has
        one (a new sidecar writes its heartbeat before its first policy). engine: `EngineInfo.digest` of this engine; None: not
        checked. Raises PolicyPageError for a foreign or damaged file and for a page of another engine, FileNotFoundError when
        there is no file, OSError when it cannot be read.
        """
        path = Path(path)
        try:
            file = open_file(path)
        except ValueError as error:
            raise PolicyPageError(path, "file", error, "a policy page") from error
        try:
            capacity, stated = _read_header(path, file)
            if engine is not None and stated not in (0, engine):
                raise PolicyPageError(path, "engine", f"{stated:#018x}", f"{engine:#018x}, which is this engine's")
        except BaseException:
            file.close()
            raise
        reader = cls(file, capacity, max_age_s)
        reader.policy = last_good
        return reader

    def poll(self, now_ns: int) -> Policy | None:
        """Return the policy to execute, the same object until a newer one is published. Never raises.

        None when there is no policy, or the heartbeat is more than max_age_s from now_ns (CLOCK_MONOTONIC). In a file that was
        truncated there is none: a failure, and the last one counts, so that the sidecar has time to make the page again.
        """
        try:
            live = pread(self._descriptor, _LIVE_BYTES, _LIVE_OFFSET)
            if len(live) == _LIVE_BYTES:
                sequence, _, self._heartbeat_ns = _LIVE.unpack(live)
                if sequence != self._seen:
                    self._read(sequence)
            else:
                self.failures += 1
            # A heartbeat in the future was written before this host was rebooted: not fresh either.
            return self.policy if -self._max_age_ns <= now_ns - self._heartbeat_ns <= self._max_age_ns else None
        except Exception:
            self.failures += 1
            return None

    def close(self) -> None:
        """Close the file."""
        self._descriptor = -1
        self._file.close()

    def _read(self, sequence: int) -> None:
        """Adopt the policy of this sequence if it is valid and newer; else keep the last one and count a failure.

        A damaged policy is read once: the next attempt is made when the sequence changes.
        """
        self._seen = sequence
        try:
            policy = _read_policy(self._descriptor, self._capacity, sequence)
            if policy.version <= self._version:
                raise ValueError(f"policy version: must be above {self._version}, got {policy.version}")
        except ValueError:
            # If two policies were published during the copy, the sequence has changed and the next poll reads the newest.
            if pread(self._descriptor, _WORD.size, _LIVE_OFFSET) == _WORD.pack(sequence):
                self.failures += 1
            return
        self.policy, self._version = policy, policy.version


def _moved(path: Path, error: Exception) -> FileNotFoundError:
    """Rename what cannot be used as a page, and say so; returns the error of a page that is not there. Raises OSError."""
    aside = set_aside(path, "foreign" if isinstance(error, ForeignFileError) else "damaged")
    reason = error.strerror if isinstance(error, OSError) else error
    log.warning("policy page %s cannot be used: %s; set aside as %s", path, reason, aside.name)
    return FileNotFoundError(errno.ENOENT, "was set aside", str(path))


def _buffer(capacity: int, sequence: int, version: int, payload: bytes) -> dict[int, bytes]:
    """The buffer of a sequence and its header, by offset. Readers do not use it before the sequence is published."""
    checksum = zlib.crc32(payload, zlib.crc32(_KEY.pack(sequence, version, len(payload))))
    return {
        HEADER_BYTES + sequence % 2 * capacity: payload,
        _BUFFER_OFFSET + sequence % 2 * _BUFFER_STRIDE: _BUFFER.pack(sequence, version, len(payload), checksum),
    }


def _read_policy(descriptor: int, capacity: int, sequence: int) -> Policy:
    """Return the policy of a sequence. Raises ValueError unless it is complete and exactly as published, OSError."""
    if WEAKLY_ORDERED:
        fence()
    header = os.pread(descriptor, _BUFFER.size, _BUFFER_OFFSET + sequence % 2 * _BUFFER_STRIDE)
    if len(header) < _BUFFER.size:
        raise ValueError("file: is too short")
    found, version, length, checksum = _BUFFER.unpack(header)
    if found != sequence or length > capacity:
        raise ValueError(f"buffer: must hold sequence {sequence} of at most {capacity} bytes, got {found} of {length} bytes")
    payload = os.pread(descriptor, length, HEADER_BYTES + sequence % 2 * capacity)
    if len(payload) < length or checksum != zlib.crc32(payload, zlib.crc32(_KEY.pack(found, version, length))):
        raise ValueError("payload checksum: does not match")
    policy = decode_policy(payload)
    if policy.version != version:
        raise ValueError(f"policy version: must be the buffer's {version}, got {policy.version}")
    return policy


def _header_checksum(magic: bytes, version: int, capacity: int) -> int:
    return zlib.crc32(struct.pack("<8sIQ", magic, version, capacity))


def _engine_checksum(engine: int) -> int:
    return zlib.crc32(_WORD.pack(engine)) if engine else 0


def _read_header(path: Path, file: SharedFile) -> tuple[int, int]:
    """Return (capacity, engine) of an open page. Raises PolicyPageError, OSError."""
    if file.size < HEADER_BYTES:
        raise PolicyPageError(path, "size", f"{file.size} bytes", f"at least {HEADER_BYTES}")
    try:
        header = file.read(_ENGINE_OFFSET + _ENGINE.size, 0)
    except ValueError as error:
        raise PolicyPageError(path, "size", error, f"at least {HEADER_BYTES} bytes") from error
    magic, version, checksum, capacity = _HEADER.unpack_from(header)
    engine, engine_checksum = _ENGINE.unpack_from(header, _ENGINE_OFFSET)
    if magic != MAGIC:
        raise (ForeignPageError if any(magic) else PolicyPageError)(path, "magic", magic, MAGIC)
    if version != LAYOUT_VERSION:
        raise ForeignPageError(path, "layout version", version, LAYOUT_VERSION)
    if checksum != (wanted := _header_checksum(magic, version, capacity)):
        raise PolicyPageError(path, "header checksum", f"{checksum:#010x}", f"{wanted:#010x}")
    if not 1 <= capacity <= MAX_CAPACITY:
        raise PolicyPageError(path, "capacity", capacity, f"1..{MAX_CAPACITY}")
    if file.size != (size := HEADER_BYTES + 2 * capacity):
        raise PolicyPageError(path, "size", f"{file.size} bytes", size)
    if engine_checksum != _engine_checksum(engine):
        raise PolicyPageError(path, "engine", f"{engine:#018x}", "an engine with its checksum")
    return int(capacity), int(engine)
