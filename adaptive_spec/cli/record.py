"""`adaptive-spec record`: keep a bounded trace of what a live engine does. The engine does not notice: one more reader of its
ring, beside the sidecar or without one.
"""

from __future__ import annotations

import signal
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from types import FrameType

from rich.console import Console

from adaptive_spec.domain.step_record import StepRecord
from adaptive_spec.engine_side.tap import RING_NAME
from adaptive_spec.errors import BadInput
from adaptive_spec.storage.trace import Trace, save_trace
from adaptive_spec.wire.ring import RingLayoutError, RingReader

POLL_S = 0.02
LOOK_S = 1.0


class TraceBuffer:
    """The newest records, bounded by their number and by the bytes of their arrays."""

    def __init__(self, most_steps: int, most_bytes: int) -> None:
        self._most_steps, self._most_bytes = most_steps, most_bytes
        self.records: deque[StepRecord] = deque()
        self.bytes = 0
        self.dropped = 0
        """Records that were kept and had to make room for newer ones."""

    def add(self, record: StepRecord) -> None:
        # Copies: the record's arrays are views of a whole slot of the ring, which may be a hundred times as large.
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
    """Record until `duration_s` is over, Ctrl-C or SIGTERM, or the engine's restart, and write the newest steps to `out`.

    Raises BadInput when there is no engine, when nothing was recorded, and when `out` cannot be written.
    """
    if not out.absolute().parent.is_dir():
        raise BadInput(f"--out: '{out}' is not allowed: its folder does not exist")
    try:
        ring = RingReader.open(runtime_dir / RING_NAME, start="newest")
    except FileNotFoundError as error:
        raise BadInput(f"--runtime-dir: '{runtime_dir}' is not allowed: no engine writes records there") from error
    except RingLayoutError as error:
        raise BadInput(f"--runtime-dir: {error}") from error
    except OSError as error:
        raise BadInput(f"--runtime-dir: '{runtime_dir}' cannot be read: {error.strerror or error}") from error
    buffer = TraceBuffer(most_steps, most_bytes)
    with ring:
        _collect(ring, buffer, duration_s)
        trace = Trace(ring.info, tuple(buffer.records), ring.lost + ring.torn)
    if not trace.records:
        raise BadInput(f"--runtime-dir: '{runtime_dir}': the engine made no step while it was recorded: nothing is written")
    try:
        save_trace(out, trace)
    except OSError as error:
        raise BadInput(f"--out: '{out}' cannot be written: {error.strerror or error}") from error
    return trace


def _collect(ring: RingReader, buffer: TraceBuffer, duration_s: float | None) -> None:
    asked_to_stop = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked_to_stop
        asked_to_stop = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    begun_s = looked_s = time.monotonic()
    try:
        with Console(stderr=True).status("recording, Ctrl-C ends it") as status:
            while not asked_to_stop:
                now_s = time.monotonic()
                for record in ring.poll():
                    buffer.add(record)
                if duration_s is not None and now_s - begun_s >= duration_s:
                    return
                if now_s - looked_s >= LOOK_S:
                    looked_s = now_s
                    status.update(f"recording {ring.info.name}: {len(buffer.records):,} steps kept, Ctrl-C ends it")
                    if ring.replaced():
                        return  # another engine writes there now
                time.sleep(POLL_S)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
