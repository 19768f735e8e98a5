"""The policy page: the sidecar publishes policies and a heartbeat; the engine reads both without waiting.

File layout, little-endian (layout version 2):

| offset | type | field |
|---|---|---|
| 0   | 8 bytes | magic `ADSPAGE1` |
| 8   | u32 | layout version |
| 12  | u32 | CRC32 of bytes 0..11 and 16..23 |
| 16  | u64 | capacity: longest payload in bytes |
| 64  | u64 | sequence: policies published, 0 = none yet; the newest payload is in buffer `sequence % 2` |
| 72  | u64 | version of the newest policy |
| 80  | u64 | heartbeat_ns: CLOCK_MONOTONIC of the sidecar's last heartbeat |
| 128 | 2 x 64 bytes | per buffer: u64 sequence, u64 version, u32 payload length, u32 CRC32 of these three and the payload |
| 4096 | 2 x capacity | the two payload buffers |

While the sidecar writes one buffer, the other holds a complete policy, so that a reader always finds one, also after the writer
was killed. A heartbeat is one store of eight bytes and is not part of a checksum. The payload is described at `encode_policy`.
"""

from __future__ import annotations

import itertools
import math
import mmap
import struct
import zlib
from pathlib import Path

import numpy as np

from adaptive_spec.domain.arrays import AnyArray, AnyFloats
from adaptive_spec.domain.policy import Granularity, Mode, Policy, Trial
from adaptive_spec.domain.survival import GRID_POINTS, SurvivalMap
from adaptive_spec.runtime_folder import make_runtime_dir
from adaptive_spec.wire import mapped_file
from adaptive_spec.wire.mapped_file import WEAKLY_ORDERED, fence
from adaptive_spec.wire.slot import MAX_BATCH_LIMIT, MAX_K_LIMIT

MAGIC = b"ADSPAGE1"
LAYOUT_VERSION = 2
HEADER_BYTES = 4096
MAX_CONTEXTS = 256
MAX_TRIALS = 4096
MAX_TOKENS = 2 * MAX_BATCH_LIMIT * (MAX_K_LIMIT + 1)
"""Twice what the largest batch can verify: verify_s may extend to the graph bucket that this batch is padded to."""
MAX_SECONDS = 3600.0
MAX_CAPACITY = 1 << 26

_HEADER = struct.Struct("<8sIIQ")
_LIVE = struct.Struct("<QQQ")
_LIVE_OFFSET = 64
_SEQUENCE_WORD, _VERSION_WORD, _HEARTBEAT_WORD = 8, 9, 10
_KEY = struct.Struct("<QQI")
_BUFFER = struct.Struct("<QQII")
_BUFFER_OFFSET, _BUFFER_STRIDE = 128, 64

_POLICY = struct.Struct("<QBBBBBB2xdddIIIIII")
_TRIAL = struct.Struct("<IIII")
_ALLOWED = struct.Struct("<IQ")
"""An entry of allowed_from: batch size, and the K as bits, K = 0 the lowest."""
# The order is part of the layout: append only, and raise LAYOUT_VERSION for anything else.
_MODES = (Mode.SWEEP, Mode.SHADOW, Mode.ACTIVE, Mode.PAUSED, Mode.PINNED, Mode.FALLBACK)
_GRANULARITIES = (Granularity.BATCH, Granularity.REQUEST)


class PolicyPageError(ValueError):
    """A file that this version cannot use as a policy page: path, field, found value and expected value."""

    def __init__(self, path: Path, field: str, found: object, wanted: object) -> None:
        super().__init__(f"{path}: {field}: must be {wanted}, got {found}")
        self.path, self.field, self.found, self.wanted = path, field, found, wanted


def payload_bytes(max_batch: int, max_k: int, contexts: int = 16, trials: int = MAX_TRIALS) -> int:
    """Return the page capacity an engine needs: bytes of its largest policy, with batches padded to up to twice their size."""
    tokens = 2 * max_batch * (max_k + 1) + 1
    floats = contexts - 1 + (max_k + 1) * (max_batch + 1) + tokens + max_k * GRID_POINTS
    return _POLICY.size + _TRIAL.size * trials + _ALLOWED.size * max_batch + 4 * floats + contexts * (max_batch + 1)


def check_policy(policy: Policy) -> None:
    """Raise ValueError (field, what is allowed, value) unless an engine can execute the policy."""
    _range("version", policy.version, 1, 2**63)
    _range("max_k", policy.max_k, 0, MAX_K_LIMIT)
    _shape("k_table", policy.k_table, 2, (1, MAX_BATCH_LIMIT + 1), (1, MAX_CONTEXTS))
    rows, contexts = policy.k_table.shape
    if policy.k_table.dtype.kind not in "iu":
        raise ValueError(f"k_table: must be of type uint8, got {policy.k_table.dtype}")
    _range("k_table's largest K", int(policy.k_table.max()), 0, policy.max_k)
    _range("k_table's smallest K", int(policy.k_table.min()), 0, policy.max_k)
    _shape("context_edges", policy.context_edges, 1, (contexts - 1, contexts - 1))
    _values("context_edges", policy.context_edges, math.inf)
    if (policy.context_edges[1:] <= policy.context_edges[:-1]).any():
        raise ValueError("context_edges: must be ascending")
    _shape("fixed_s", policy.fixed_s, 2, (policy.max_k + 1, policy.max_k + 1), (rows, rows))
    _values("fixed_s", policy.fixed_s, MAX_SECONDS)
    _shape("verify_s", policy.verify_s, 1, (1, MAX_TOKENS + 1))
    _values("verify_s", policy.verify_s, MAX_SECONDS)
    if not 0.0 <= policy.context_s_per_token < MAX_SECONDS:
        raise ValueError(f"context_s_per_token: must be in 0..{MAX_SECONDS:g}, got {policy.context_s_per_token}")
    _shape("survival.table", policy.survival.table, 2, (policy.max_k, MAX_K_LIMIT), (GRID_POINTS, GRID_POINTS))
    _values("survival.table", policy.survival.table, 1.0)
    _range("number of trials", len(policy.trials), 0, MAX_TRIALS)
    for trial in policy.trials:
        _range("trial batch_size", trial.batch_size, 0, MAX_BATCH_LIMIT)
        _range("trial k", trial.k, 0, policy.max_k)
        _range("trial num_tokens", trial.num_tokens, 0, MAX_TOKENS)
        _range("trial steps", trial.steps, 1, 1_000_000)
    for name, value in (("min_gain", policy.min_gain), ("switch_s", policy.switch_s)):
        if not 0.0 <= value < MAX_SECONDS:
            raise ValueError(f"{name}: must be in 0..{MAX_SECONDS:g}, got {value}")
    _check_allowed(policy)


def _check_allowed(policy: Policy) -> None:
    """Raise ValueError unless allowed_from is well formed and allows every entry of the table and every trial."""
    sizes = [batch_size for batch_size, _ in policy.allowed_from]
    if not sizes:
        return
    _range("number of entries of allowed_from", len(sizes), 1, MAX_BATCH_LIMIT)
    if sizes[0] != 1 or any(b <= a for a, b in itertools.pairwise(sizes)) or sizes[-1] > MAX_BATCH_LIMIT:
        raise ValueError(f"allowed_from: must have ascending batch sizes from 1 to {MAX_BATCH_LIMIT} at most, got {sizes}")
    for (batch_size, ks), end in zip(policy.allowed_from, [*sizes[1:], None], strict=True):
        if not ks or list(ks) != sorted(set(ks)) or not 0 <= ks[0] <= ks[-1] <= policy.max_k:
            wanted = f"ascending K in 0..{policy.max_k}"
            raise ValueError(f"allowed_from: batch size {batch_size}: must be {wanted}, got {list(ks)}")
        rows = policy.k_table[batch_size if batch_size > 1 else 0 : end]
        if (wrong := rows[~np.isin(rows, ks)]).size:
            raise ValueError(f"k_table from batch size {batch_size} on: must be of {list(ks)}, got {int(wrong[0])}")
    for trial in policy.trials:
        if trial.batch_size and not policy.allows(trial.batch_size, trial.k):
            raise ValueError(f"trial k: must be allowed at batch size {trial.batch_size}, got {trial.k}")


def encode_policy(policy: Policy) -> bytes:
    """Return the payload of a policy: fixed fields, trials, allowed_from, context_edges, fixed_s, verify_s, survival, k_table.

    Fixed fields: version, mode, granularity, acting, verify_all, conditional, max_k, context_s_per_token, min_gain, switch_s,
    rows and columns of k_table, entries of verify_s, rows of survival, number of trials, entries of allowed_from. Arrays are
    little-endian float32, k_table uint8; an entry of allowed_from is a batch size and its K as bits.
    Raises ValueError, see `check_policy`.
    """
    check_policy(policy)
    return _pack(policy)


def _pack(policy: Policy) -> bytes:
    table = policy.survival.table
    head = _POLICY.pack(
        policy.version, _MODES.index(policy.mode), _GRANULARITIES.index(policy.granularity), policy.acting, policy.verify_all,
        policy.survival.conditional, policy.max_k, policy.context_s_per_token, policy.min_gain, policy.switch_s,
        *policy.k_table.shape, len(policy.verify_s), len(table), len(policy.trials), len(policy.allowed_from),
    )  # fmt: skip
    floats = (policy.context_edges, policy.fixed_s, policy.verify_s, table)
    parts = [head, *(_TRIAL.pack(*trial) for trial in policy.trials)]
    parts += [_ALLOWED.pack(batch_size, sum(1 << k for k in ks)) for batch_size, ks in policy.allowed_from]
    parts += [np.ascontiguousarray(array, "<f4").tobytes() for array in floats]
    return b"".join([*parts, np.ascontiguousarray(policy.k_table, np.uint8).tobytes()])


def decode_policy(data: bytes) -> Policy:
    """Return the policy in a payload; its arrays are read-only views of `data`. Raises ValueError for invalid bytes."""
    if len(data) < _POLICY.size:
        raise ValueError(f"policy: must be at least {_POLICY.size} bytes, got {len(data)}")
    (version, mode, granularity, acting, verify_all, conditional, max_k, context_s, min_gain, switch_s, rows, contexts,
     verify_entries, survival_rows, trials, allowed) = _POLICY.unpack_from(data)  # fmt: skip
    # Before anything is allocated: each count is within its limit, and together they give exactly the payload's length.
    _range("mode", mode, 0, len(_MODES) - 1)
    _range("granularity", granularity, 0, len(_GRANULARITIES) - 1)
    for name, flag in (("acting", acting), ("verify_all", verify_all), ("conditional", conditional)):
        _range(name, flag, 0, 1)
    _range("max_k", max_k, 0, MAX_K_LIMIT)
    _range("rows of k_table", rows, 1, MAX_BATCH_LIMIT + 1)
    _range("columns of k_table", contexts, 1, MAX_CONTEXTS)
    counts = (contexts - 1, (max_k + 1) * rows, verify_entries, survival_rows * GRID_POINTS)
    trials_end = _POLICY.size + _TRIAL.size * trials
    allowed_end = trials_end + _ALLOWED.size * allowed
    wanted = allowed_end + 4 * sum(counts) + rows * contexts
    if len(data) != wanted:
        raise ValueError(f"policy: must be {wanted} bytes by its own counts, got {len(data)}")
    at = allowed_end
    arrays = []
    for count in counts:
        arrays.append(np.frombuffer(data, "<f4", count, at))
        at += 4 * count
    edges, fixed_s, verify_s, table = arrays
    policy = Policy(
        version, _MODES[mode], bool(acting), _GRANULARITIES[granularity], max_k,
        np.frombuffer(data, np.uint8, rows * contexts, at).reshape(rows, contexts), edges, fixed_s.reshape(max_k + 1, rows),
        verify_s, context_s, SurvivalMap(table.reshape(survival_rows, GRID_POINTS), bool(conditional)), bool(verify_all),
        tuple(map(Trial._make, _TRIAL.iter_unpack(data[_POLICY.size : trials_end]))),
        tuple((size, _bits(ks)) for size, ks in _ALLOWED.iter_unpack(data[trials_end:allowed_end])), min_gain, switch_s,
    )  # fmt: skip
    check_policy(policy)
    return policy


def _bits(ks: int) -> tuple[int, ...]:
    """The K of an entry of allowed_from."""
    return tuple(k for k in range(ks.bit_length()) if ks >> k & 1)


class PolicyPage(mapped_file.Closeable):
    """The sidecar's end. A lock on the file admits one sidecar at a time.

    policy: the newest policy on the page, also one that an earlier sidecar published. Each published version is higher than the
    one before.
    """

    def __init__(self, mapping: mmap.mmap, capacity: int, sequence: int, policy: Policy | None) -> None:
        """Use a mapped page. Callers use `create_or_open`."""
        self.capacity = capacity
        self.policy = policy
        self._sequence = sequence
        self._map = mapping
        self._words = memoryview(mapping).cast("Q")

    @property
    def last_version(self) -> int:
        """Version of the newest policy on the page, 0 when there is none."""
        return self.policy.version if self.policy is not None else 0

    @classmethod
    def create_or_open(cls, path: Path | str, capacity: int) -> PolicyPage:
        """Open the page at `path`, or create it and its folder (0700).

        capacity: longest payload in bytes, see `payload_bytes`. A page that is too small is replaced by a larger one with
        the same policy; a damaged or foreign one is renamed to `NAME.damaged-N`. Raises ValueError for a capacity outside
        1..2^26, BlockingIOError when another sidecar holds the page, another OSError when it cannot be created.
        """
        _range("capacity", capacity, 1, MAX_CAPACITY)
        path = Path(path)
        make_runtime_dir(path.parent)
        try:
            page = cls._open(path)
        except FileNotFoundError:
            return cls._create(path, capacity)
        except BlockingIOError as error:
            raise BlockingIOError(error.errno, f"{path}: another sidecar is writing this policy page") from error
        except ValueError:
            mapped_file.set_aside(path)
            return cls._create(path, capacity)
        if page.capacity >= capacity:
            return page
        larger = cls._create(path, capacity, page)
        page.close()
        return larger

    @classmethod
    def _open(cls, path: Path) -> PolicyPage:
        mapping, _ = mapped_file.open_mapped(path, writable=True, lock=True)
        try:
            capacity = _read_header(path, mapping)
            sequence = _LIVE.unpack_from(mapping, _LIVE_OFFSET)[0]
            policy = _read_policy(mapping, capacity, sequence) if sequence else None
            return cls(mapping, capacity, sequence, policy)
        except ValueError:
            mapping.close()
            raise

    @classmethod
    def _create(cls, path: Path, capacity: int, old: PolicyPage | None = None) -> PolicyPage:
        capacity = -(-capacity // 64) * 64

        def fill(mapping: mmap.mmap) -> None:
            _HEADER.pack_into(mapping, 0, MAGIC, LAYOUT_VERSION, _header_checksum(MAGIC, LAYOUT_VERSION, capacity), capacity)
            if old is not None and old.policy is not None:
                _write_buffer(mapping, capacity, old._sequence, old.policy.version, _pack(old.policy))
            if old is not None:
                mapping[_LIVE_OFFSET : _LIVE_OFFSET + _LIVE.size] = old._map[_LIVE_OFFSET : _LIVE_OFFSET + _LIVE.size]

        mapping, _ = mapped_file.create_mapped(path, HEADER_BYTES + 2 * capacity, fill, lock=True)
        return cls(mapping, capacity, old._sequence if old else 0, old.policy if old else None)

    def publish(self, policy: Policy) -> None:
        """Publish a policy. Raises ValueError when it is not executable, too long for the page, or not a newer version."""
        payload = encode_policy(policy)
        if len(payload) > self.capacity:
            raise ValueError(f"policy {policy.version}: must be at most {self.capacity} bytes, got {len(payload)}")
        if policy.version <= self.last_version:
            raise ValueError(f"policy version: must be above the published {self.last_version}, got {policy.version}")
        sequence = self._sequence + 1
        _write_buffer(self._map, self.capacity, sequence, policy.version, payload)
        if WEAKLY_ORDERED:
            fence()
        self._words[_VERSION_WORD] = policy.version
        self._words[_SEQUENCE_WORD] = self._sequence = sequence
        self.policy = policy

    def heartbeat(self, now_ns: int) -> None:
        """Write the heartbeat. now_ns: CLOCK_MONOTONIC, the same for all processes of a host."""
        self._words[_HEARTBEAT_WORD] = now_ns

    def close(self) -> None:
        """Unmap and release the lock. The file stays."""
        self._words.release()
        self._map.close()


class PolicyPageReader(mapped_file.Closeable):
    """The engine's end. policy: the last valid policy. failures: policies and polls that failed."""

    def __init__(self, mapping: mmap.mmap, capacity: int, identity: mapped_file.Identity, max_age_s: float) -> None:
        """Use a mapped page. Callers use `open`."""
        self.identity = identity
        self.failures = 0
        self.policy: Policy | None = None
        self._map = mapping
        self._capacity = capacity
        self._max_age_ns = int(max_age_s * 1e9)
        self._seen = 0
        self._version = 0

    @classmethod
    def open(cls, path: Path | str, max_age_s: float = 30.0, last_good: Policy | None = None) -> PolicyPageReader:
        """Open a page.

        max_age_s: age of the heartbeat, seconds, up to which its policy is fresh. last_good: policy in use until this page has
        one (a new sidecar writes its heartbeat before its first policy). Raises PolicyPageError for a foreign or damaged file,
        FileNotFoundError when there is no file, OSError when it cannot be read.
        """
        path = Path(path)
        try:
            mapping, identity = mapped_file.open_mapped(path)
        except ValueError as error:
            raise PolicyPageError(path, "file", error, "a policy page") from error
        try:
            reader = cls(mapping, _read_header(path, mapping), identity, max_age_s)
        except PolicyPageError:
            mapping.close()
            raise
        reader.policy = last_good
        return reader

    def poll(self, now_ns: int) -> Policy | None:
        """Return the policy to execute, the same object until a newer one is published. Never raises.

        None when there is no policy, or the heartbeat is more than max_age_s from now_ns (CLOCK_MONOTONIC).
        """
        try:
            sequence, _, heartbeat_ns = _LIVE.unpack_from(self._map, _LIVE_OFFSET)
            if sequence != self._seen:
                self._read(sequence)
            # A heartbeat in the future was written before this host was rebooted: not fresh either.
            return self.policy if -self._max_age_ns <= now_ns - heartbeat_ns <= self._max_age_ns else None
        except Exception:
            self.failures += 1
            return None

    def close(self) -> None:
        """Unmap."""
        self._map.close()

    def _read(self, sequence: int) -> None:
        """Adopt the policy of this sequence if it is valid and newer; else keep the last one and count a failure.

        A damaged policy is read once: the next attempt is made when the sequence changes.
        """
        self._seen = sequence
        try:
            policy = _read_policy(self._map, self._capacity, sequence)
            if policy.version <= self._version:
                raise ValueError(f"policy version: must be above {self._version}, got {policy.version}")
        except ValueError:
            # If two policies were published during the copy, the sequence has changed and the next poll reads the newest.
            if _LIVE.unpack_from(self._map, _LIVE_OFFSET)[0] == sequence:
                self.failures += 1
            return
        self.policy, self._version = policy, policy.version


def _write_buffer(mapping: mmap.mmap, capacity: int, sequence: int, version: int, payload: bytes) -> None:
    """Fill the buffer of a sequence. Readers do not use it before the sequence is published."""
    at = HEADER_BYTES + sequence % 2 * capacity
    mapping[at : at + len(payload)] = payload
    checksum = zlib.crc32(payload, zlib.crc32(_KEY.pack(sequence, version, len(payload))))
    _BUFFER.pack_into(mapping, _BUFFER_OFFSET + sequence % 2 * _BUFFER_STRIDE, sequence, version, len(payload), checksum)


def _read_policy(mapping: mmap.mmap, capacity: int, sequence: int) -> Policy:
    """Return the policy of a sequence. Raises ValueError unless it is complete and exactly as published."""
    if WEAKLY_ORDERED:
        fence()
    found, version, length, checksum = _BUFFER.unpack_from(mapping, _BUFFER_OFFSET + sequence % 2 * _BUFFER_STRIDE)
    if found != sequence or length > capacity:
        raise ValueError(f"buffer: must hold sequence {sequence} of at most {capacity} bytes, got {found} of {length} bytes")
    at = HEADER_BYTES + sequence % 2 * capacity
    payload = mapping[at : at + length]
    if checksum != zlib.crc32(payload, zlib.crc32(_KEY.pack(found, version, length))):
        raise ValueError("payload checksum: does not match")
    policy = decode_policy(payload)
    if policy.version != version:
        raise ValueError(f"policy version: must be the buffer's {version}, got {policy.version}")
    return policy


def _header_checksum(magic: bytes, version: int, capacity: int) -> int:
    return zlib.crc32(struct.pack("<8sIQ", magic, version, capacity))


def _read_header(path: Path, mapping: mmap.mmap) -> int:
    """Return the capacity of a mapped page. Raises PolicyPageError."""
    if len(mapping) < HEADER_BYTES:
        raise PolicyPageError(path, "size", f"{len(mapping)} bytes", f"at least {HEADER_BYTES}")
    magic, version, checksum, capacity = _HEADER.unpack_from(mapping)
    if magic != MAGIC:
        raise PolicyPageError(path, "magic", magic, MAGIC)
    if version != LAYOUT_VERSION:
        raise PolicyPageError(path, "layout version", version, LAYOUT_VERSION)
    if checksum != (wanted := _header_checksum(magic, version, capacity)):
        raise PolicyPageError(path, "header checksum", f"{checksum:#010x}", f"{wanted:#010x}")
    if not 1 <= capacity <= MAX_CAPACITY:
        raise PolicyPageError(path, "capacity", capacity, f"1..{MAX_CAPACITY}")
    if len(mapping) != (size := HEADER_BYTES + 2 * capacity):
        raise PolicyPageError(path, "size", f"{len(mapping)} bytes", size)
    return int(capacity)


def _range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name}: must be in {low}..{high}, got {value}")


def _shape(name: str, array: AnyArray, dimensions: int, *sizes: tuple[int, int]) -> None:
    if array.ndim != dimensions or not all(low <= size <= high for size, (low, high) in zip(array.shape, sizes, strict=True)):
        wanted = ", ".join(f"{low}" if low == high else f"{low}..{high}" for low, high in sizes)
        raise ValueError(f"{name}: must have shape [{wanted}], got {list(array.shape)}")


def _values(name: str, array: AnyFloats, high: float) -> None:
    if array.size and not (array.min() >= 0.0 and array.max() <= high and array.max() < math.inf):
        raise ValueError(f"{name}: all values must be in 0..{high:g}")
