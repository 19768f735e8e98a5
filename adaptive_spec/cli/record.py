"""`adaptive-spec record`: writes a bounded trace of the steps of a live engine.

It only reads the engine's ring, so it changes nothing for the engine and works with or without a sidecar.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from adaptive_spec.cli.output_files import check_folder_of
from adaptive_spec.cli.processes import stop_signals
from adaptive_spec.domain.step_record import StepRecord
from adaptive_spec.engine_side.tap import RING_NAME
from adaptive_spec.errors import BadInput
from adaptive_spec.storage.trace import Trace, save_trace
from adaptive_spec.wire.ring import RingLayoutError, RingReader

POLL_S = 0.02
UPDATE_S = 1.0


class TraceBuffer:
    """The newest records, bounded by count and by the bytes of their arrays."""

    def __init__(self, most_steps: int, most_bytes: int) -> None:
        self._most_steps, self._most_bytes = most_steps, most_bytes
        self.records: deque[StepRecord] = deque()
        self.bytes = 0
        self.dropped = 0
        """Records removed to make room for newer ones."""

    def add(self, record: StepRecord) -> None:
        # Copied, because the arrays are views of a whole ring slot, which may be a hundred times as large.
        kept = replace(
            record, confidences=record.confidences.copy(), verify_len=record.verify_len.copy(),
            accept_len=record.accept_len.copy(), request_ids=record.request_ids.copy(),
        )  # fmt: skip
        self.records.append(kept)
        self.bytes += _bytes(kept)
        while len(self.records) > self._most_steps or (self.bytes > self._most_bytes and len(self.records) > 1):
            self.bytes -= _bytes(self.records.popleft())
            self.dropped += 1


def _bytes(record: StepRecord) -> int:
    arrays = record.confidences.nbytes + record.verify_len.nbytes + record.accept_len.nbytes + record.request_ids.nbytes
    return arrays + 200


def record_trace(runtime_dir: Path, out: Path, most_steps: int, most_bytes: int, duration_s: float | None) -> Trace:
    """Record for `duration_s`, or until Ctrl-C, SIGTERM or a restart of the engine; write the newest steps to `out`.

    Raises BadInput when there is no engine, when nothing was recorded, and when `out` cannot be written.
    """
    check_folder_of(out, "--out")
    try:
        ring = RingReader.open(runtime_dir / RING_NAME, start="newest")
    except FileNotFoundError as error:
        raise BadInput(f"--runtime-dir: '{runtime_dir}': no engine writes records there") from error
    except RingLayoutError as error:
        raise BadInput(f"--runtime-dir: {error}") from error
    except OSError as error:
        raise BadInput(f"--runtime-dir: '{runtime_dir}': {error.strerror or error}") from error
    buffer = TraceBuffer(most_steps, most_bytes)
    with ring:
        _collect(ring, buffer, duration_s)
        trace = Trace(ring.info, tuple(buffer.records), ring.lost + ring.torn)
    if not trace.records:
        raise BadInput(f"--runtime-dir: '{runtime_dir}': the engine ran no decode step during the recording, nothing written")
    try:
        save_trace(out, trace)
    except OSError as error:
        raise BadInput(f"--out: '{out}': cannot be written: {error.strerror or error}") from error
    return trace


def _collect(ring: RingReader, buffer: TraceBuffer, duration_s: float | None) -> None:
    started_s = updated_s = time.monotonic()
    with (
        stop_signals() as stopping,
        Console(stderr=True, markup=False, emoji=False).status("recording, Ctrl-C to stop") as status,
    ):
        while not stopping:
            now_s = time.monotonic()
            for record in ring.poll():
                buffer.add(record)
            if duration_s is not None and now_s - started_s >= duration_s:
                return
            if now_s - updated_s >= UPDATE_S:
                updated_s = now_s
                status.update(f"recording {ring.info.name}: {len(buffer.records):,} steps kept, Ctrl-C to stop")
                if ring.replaced():
                    return  # another engine writes there now
            time.sleep(POLL_S)
