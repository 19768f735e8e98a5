"""Figures of a running server from its record ring, read beside the sidecar by the demonstration and benchmarks."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.domain.step_record import StepFlag, StepRecord
from adaptive_spec.engine_side.tap import RING_NAME
from adaptive_spec.wire.ring import RingReader

POLL_S = 0.02
WINDOW_STEPS = 512


@dataclass
class Steps:
    """Steps of one way of choosing K. by_k: steps by K."""

    steps: int = 0
    trials: int = 0
    k_switches: int = 0
    by_k: dict[int, int] = field(default_factory=dict)

    def add(self, record: StepRecord, switched: bool) -> None:
        self.steps += 1
        self.trials += bool(record.flags & StepFlag.TRIAL)
        self.k_switches += switched
        self.by_k[record.k] = self.by_k.get(record.k, 0) + 1

    def figures(self) -> dict[str, Any]:
        """JSON form; may be called while another thread adds steps."""
        by_k = {str(k): steps for k, steps in sorted(self.by_k.copy().items())}
        return {"steps": self.steps, "trials": self.trials, "k_switches": self.k_switches, "by_k": by_k}


class RingFollower:
    """Follows a ring in a thread. kind: of the current traffic, one of `kinds`; acceptance is counted by kind.

    arm: the way of choosing K now; steps are counted by it, except for "".
    """

    def __init__(self, runtime_dir: Path, kinds: Iterable[str]) -> None:
        self._path = runtime_dir / RING_NAME
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._ring: RingReader | None = None
        self._counts: dict[str, list[list[int]]] = {kind: [] for kind in kinds}
        self._window: deque[tuple[int, float]] = deque(maxlen=WINDOW_STEPS)
        self.kind, self.arm = next(iter(self._counts)), ""
        self._arms: dict[str, Steps] = {}
        self.k = self.batch_size = self.steps = self.output_tokens = self.switches = self.not_as_asked = 0
        self.decode_s = 0.0

    @property
    def info(self) -> EngineInfo:
        """The engine's. Raises ValueError before `start`."""
        if self._ring is None:
            raise ValueError("the ring is not open")
        return self._ring.info

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
            "steps_not_as_asked": self.not_as_asked, "arms": {name: steps.figures() for name, steps in self._arms.copy().items()},
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
        switched = self.steps > 0 and record.k != self.k
        self.switches += switched
        if arm := self.arm:
            self._arms.setdefault(arm, Steps()).add(record, switched)
        self.k, self.batch_size = record.k, record.batch_size
        self.steps += 1
        self.not_as_asked += bool(record.flags & StepFlag.LIMITED)
        self.output_tokens += record.output_tokens
        self.decode_s += record.step_s
        self._window.append((record.output_tokens, record.step_s))
        for position in range(record.k):
            row = self._counts[self.kind][position]
            row[0] += int(np.count_nonzero(record.verify_len > position))
            row[1] += int(np.count_nonzero(record.accept_len > position))
