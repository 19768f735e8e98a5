"""A trace: the StepRecords of a live engine in one archive, for `adaptive-spec replay`.

Arrays: `counts` int64 [n, 10] (step, time_ns, kv_tokens, policy_version, num_tokens, padded_tokens, batch_size, rows, k, flags),
`seconds` float64 [n, 4] (draft, verify, draft_extend, step), and confidences, request_ids, verify_len, accept_len of all steps
one after another. Meta: the engine's information, and the number of records lost.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adaptive_spec.domain.arrays import AnyArray
from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.domain.step_record import StepRecord
from adaptive_spec.errors import BadInput, one_line
from adaptive_spec.storage.archive import load_archive, save_archive

TRACE = "trace"
LARGEST_BYTES = 1 << 30
LARGEST_INFLATED = 4 << 30
LONGEST_REASON = 300
MOST_LOST = 2**62
_COUNTS = 10
_PACKED = {"confidences": np.float32, "request_ids": np.uint32, "verify_len": np.uint8, "accept_len": np.uint8}


@dataclass(frozen=True)
class Trace:
    """Records of one engine in the order they were written. lost: records overwritten before they were read."""

    info: EngineInfo
    records: tuple[StepRecord, ...]
    lost: int


def save_trace(path: Path, trace: Trace) -> None:
    """Write a trace atomically. Raises OSError."""
    records = trace.records
    counts = [
        (
            r.step, r.time_ns, r.kv_tokens, r.policy_version, r.num_tokens, r.padded_tokens, r.batch_size, len(r.verify_len), r.k,
            r.flags,
        )
        for r in records
    ]  # fmt: skip
    arrays: dict[str, AnyArray] = {
        "counts": np.array(counts, dtype=np.int64).reshape(-1, _COUNTS),
        "seconds": np.array([(r.draft_s, r.verify_s, r.draft_extend_s, r.step_s) for r in records]).reshape(-1, 4),
    }
    for name, dtype in _PACKED.items():
        parts = [np.asarray(getattr(r, name), dtype=dtype).ravel() for r in records]
        arrays[name] = np.concatenate(parts) if parts else np.zeros(0, dtype)
    save_archive(path, TRACE, arrays, {"engine": json.loads(trace.info.to_json()), "lost": trace.lost})


def load_trace(path: Path) -> Trace:
    """Read a trace and check every record. Raises BadInput with one line: the file and the reason."""
    try:
        archive = load_archive(path, TRACE, largest_bytes=LARGEST_BYTES, largest_inflated=LARGEST_INFLATED, follow_links=True)
        info = EngineInfo.from_json(json.dumps(archive.meta["engine"]).encode())
        records = _records(archive.arrays, info.max_k)
        lost = archive.meta["lost"]
        if not isinstance(lost, int) or not 0 <= lost <= MOST_LOST:
            raise ValueError(f"lost: must be a whole number in 0..{MOST_LOST}")
        return Trace(info, tuple(records), lost)
    except FileNotFoundError as error:
        raise BadInput(f"TRACE: '{path}': no such file") from error
    except OSError as error:
        raise BadInput(f"TRACE: '{path}': cannot be read: {error.strerror or error}") from error
    except Exception as error:  # whatever it holds: arrays of another number of dimensions or of text, numbers too large
        raise BadInput(f"TRACE: '{path}': must be a trace of adaptive-spec record: {one_line(error)[:LONGEST_REASON]}") from error


def _records(arrays: dict[str, AnyArray], max_k: int) -> Sequence[StepRecord]:
    counts, seconds = arrays["counts"], arrays["seconds"]
    if counts.ndim != 2 or counts.shape[1] != _COUNTS or seconds.shape != (len(counts), 4):
        raise ValueError("the lengths of its tables do not agree")
    records = []
    cell = row = 0
    for numbers, times in zip(counts.tolist(), seconds.tolist(), strict=True):
        step, time_ns, kv, version, num_tokens, padded, batch, rows, k, flags = numbers
        if min(numbers) < 0 or k > max_k:
            raise ValueError(f"step {step} has impossible values (below 0, or a K above {max_k}, the engine's largest)")
        record = StepRecord(
            step, time_ns, kv, version, num_tokens, padded, batch, k, flags, times[0], times[1], times[2], times[3],
            arrays["confidences"][cell : cell + rows * k].reshape(rows, k), arrays["verify_len"][row : row + rows],
            arrays["accept_len"][row : row + rows], arrays["request_ids"][row : row + rows],
        )  # fmt: skip
        if (reason := record.invalid_reason()) is not None:
            raise ValueError(f"step {step} has impossible values ({reason})")
        records.append(record)
        cell, row = cell + rows * k, row + rows
    if cell != len(arrays["confidences"]) or any(row != len(arrays[n]) for n in ("verify_len", "accept_len", "request_ids")):
        raise ValueError("the lengths of its tables do not agree")
    return records
