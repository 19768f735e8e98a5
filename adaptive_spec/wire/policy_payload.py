"""The payload of the policy page: a policy as bytes, checked on both sides before anything acts on it."""

from __future__ import annotations

import itertools
import math
import struct

import numpy as np

from adaptive_spec.domain.arrays import AnyArray, AnyFloats
from adaptive_spec.domain.policy import Granularity, Mode, Policy, Trial, largest_tokens
from adaptive_spec.domain.survival import GRID_POINTS, SurvivalMap
from adaptive_spec.wire.slot import MAX_BATCH_LIMIT, MAX_K_LIMIT

MAX_CONTEXTS = 256
MAX_TRIALS = 4096
MAX_TOKENS = 2 * MAX_BATCH_LIMIT * (MAX_K_LIMIT + 1)
"""Twice what the largest batch can verify: verify_s may extend to the graph bucket that this batch is padded to."""
MAX_SECONDS = 3600.0

_POLICY = struct.Struct("<QBBBBBBBBdddIIIIII")
"""The two bytes before the floats are 0 in policies of writers that know no rails: k_min, and MAX_K_LIMIT - k_max."""
_TRIAL = struct.Struct("<IIII")
_ALLOWED = struct.Struct("<IQ")
"""An entry of allowed_from: batch size, and the K as bits, K = 0 the lowest."""
# The order is part of the layout: append only, and raise LAYOUT_VERSION of the page for anything else.
_MODES = (Mode.SWEEP, Mode.SHADOW, Mode.ACTIVE, Mode.PAUSED, Mode.PINNED, Mode.FALLBACK)
_GRANULARITIES = (Granularity.BATCH, Granularity.REQUEST)


def payload_bytes(max_batch: int, max_k: int, contexts: int = 16, trials: int = MAX_TRIALS) -> int:
    """Return the page capacity an engine needs: bytes of its largest policy, with batches padded to up to twice their size."""
    tokens = largest_tokens(max_batch, max_k) + 1
    floats = contexts - 1 + (max_k + 1) * (max_batch + 1) + tokens + max_k * GRID_POINTS
    return _POLICY.size + _TRIAL.size * trials + _ALLOWED.size * max_batch + 4 * floats + contexts * (max_batch + 1)


def check_policy(policy: Policy) -> None:
    """Raise ValueError (field, what is allowed, value) unless an engine can execute the policy."""
    _range("version", policy.version, 1, 2**63)
    _range("max_k", policy.max_k, 0, MAX_K_LIMIT)
    _range("k_max", policy.k_max, 0, MAX_K_LIMIT)
    _range("k_min", policy.k_min, 0, policy.k_max)
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

    Fixed fields: version, mode, granularity, acting, verify_all, conditional, max_k, k_min, MAX_K_LIMIT - k_max,
    context_s_per_token, min_gain, switch_s, rows and columns of k_table, entries of verify_s, rows of survival, number of trials,
    entries of allowed_from. Arrays are little-endian float32, k_table uint8; an entry of allowed_from is a batch size and its K
    as bits.
    Raises ValueError, see `check_policy`.
    """
    check_policy(policy)
    return _pack(policy)


def _pack(policy: Policy) -> bytes:
    table = policy.survival.table
    head = _POLICY.pack(
        policy.version, _MODES.index(policy.mode), _GRANULARITIES.index(policy.granularity), policy.acting, policy.verify_all,
        policy.survival.conditional, policy.max_k, policy.k_min, MAX_K_LIMIT - policy.k_max,
        policy.context_s_per_token, policy.min_gain, policy.switch_s,
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
    (version, mode, granularity, acting, verify_all, conditional, max_k, k_min, below_limit, context_s, min_gain, switch_s,
     rows, contexts, verify_entries, survival_rows, trials, allowed) = _POLICY.unpack_from(data)  # fmt: skip
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
        k_min, MAX_K_LIMIT - below_limit,
    )  # fmt: skip
    check_policy(policy)
    return policy


def _bits(ks: int) -> tuple[int, ...]:
    """The K of an entry of allowed_from."""
    return tuple(k for k in range(ks.bit_length()) if ks >> k & 1)


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
