"""Figures of a running server from its record ring, read beside the sidecar by the demonstration and benchmarks."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from adaptive_spec.domain.step_record import StepRecord
from adaptive_spec.engine_side.tap import RING_NAME
from adaptive_spec.wire.ring import RingReader

POLL_S = 0.02
WINDOW_STEPS = 512


class RingFollower:
    """Follows a ring in a thread. kind: of the current traffic, one of `kinds`; acceptance is counted by kind."""

    def __init__(self, runtime_dir: Path, kinds: Iterable[str]) -> None:
        self._path = runtime_dir / RING_NAME
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._ring: RingReader | None = None
        self._counts: dict[str, list[list[int]]] = {kind: [] for kind in kinds}
        self._window: deque[tuple[int, float]] = deque(maxlen=WINDOW_STEPS)
        self.kind = next(iter(self._counts))
        self.k = self.batch_size = self.steps = self.output_tokens = self.switches = 0
        self.decode_s = 0.0

    @property
    def candidates(self) -> tuple[int, ...]:
        return self._ring.info.candidates if self._ring is not None else ()

    def start(self) -> None:
        """Open the engine's ring and start the thread. Raises OSError and ValueError for a missing or damaged ring."""
        self._ring = RingReader.open(self._path)
        self._counts = {kind: [[0, 0] for _ in range(self._ring.info.max_k)] for kind in self._counts}
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def figures(self) -> dict[str, Any]:
        """The engine's part of the demonstration's status file."""
        info = self._ring.info if self._ring is not None else None
        window = list(self._window)
        seconds = sum(s for _, s in window)
        return {
            "pid": info.pid if info else None, "model": info.model if info else "", "gpu": info.gpu if info else "",
            "k": self.k, "batch_size": self.batch_size, "decode_steps": self.steps, "output_tokens": self.output_tokens,
            "decode_s": round(self.decode_s, 6), "k_switches": self.switches,
            "goodput_tokens_per_s": sum(n for n, _ in window) / seconds if seconds else 0.0,
            "acceptance": {kind: [round(a / v, 4) if v else None for v, a in rows] for kind, rows in self._counts.items()},
        }  # fmt: skip

    def _follow(self) -> None:
        ring = self._ring
        assert ring is not None  # `start` opened it
        while True:
            last = self._stop.is_set()
            records = ring.poll(256)
            for record in records:
                self._add(record)
            if last and not records:
                ring.close()
                return
            if not records:
                self._stop.wait(POLL_S)

    def _add(self, record: StepRecord) -> None:
        self.switches += self.steps > 0 and record.k != self.k
        self.k, self.batch_size = record.k, record.batch_size
        self.steps += 1
        self.output_tokens += record.output_tokens
        self.decode_s += record.step_s
        self._window.append((record.output_tokens, record.step_s))
        for position in range(record.k):
            row = self._counts[self.kind][position]
            row[0] += int(np.count_nonzero(record.verify_len > position))
            row[1] += int(np.count_nonzero(record.accept_len > position))
