"""Every record that an engine writes, read beside the sidecar."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from adaptive_spec.domain.step_record import StepRecord
from adaptive_spec.engine_side.tap import RING_NAME
from adaptive_spec.wire.ring import RingReader


class RingTrace:
    """Reads the ring of a runtime_dir in a thread. oldest: begin with what the ring still holds."""

    def __init__(self, runtime_dir: Path, oldest: bool = False) -> None:
        self.ring = RingReader.open(runtime_dir / RING_NAME, "oldest" if oldest else "newest")
        self.records: list[StepRecord] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow)
        self._thread.start()

    def _follow(self) -> None:
        while True:
            last = self._stop.is_set()
            self.records.extend(self.ring.poll(256))
            if last:
                return
            self._stop.wait(0.02)

    def end(self) -> list[StepRecord]:
        """Whatever was written until now, complete. Can be asked for again."""
        if not self._stop.is_set():
            time.sleep(0.2)
            self._stop.set()
            self._thread.join()
            assert (self.ring.lost, self.ring.torn, self.ring.invalid) == (0, 0, 0)
            self.ring.close()
        return self.records
