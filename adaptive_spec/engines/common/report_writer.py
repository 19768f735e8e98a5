"""Writes the engine report of one process when it has changed, at most once a second unless the state changes. Never raises."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path

from adaptive_spec.wire.engine_report import EngineReport, write_report
from adaptive_spec.wire.mapped_file import make_runtime_dir

INTERVAL_S = 1.0
AFTER_ERROR_S = 60.0


@dataclass
class ReportWriter:
    """runtime_dir: where. log: for a report that cannot be written, said at most once a minute."""

    runtime_dir: Path
    log: logging.Logger
    _due_s: float = 0.0
    _written: EngineReport | None = field(default=None)

    @property
    def due(self) -> bool:
        """Whether it is time to look again."""
        return time.monotonic() >= self._due_s

    def write(self, report: EngineReport) -> None:
        self._due_s = time.monotonic() + INTERVAL_S
        if report == self._written:
            return
        try:
            make_runtime_dir(self.runtime_dir)
            write_report(self.runtime_dir, report)
            self._written = report
        except Exception as error:
            self.log.warning("adaptive-spec: the report could not be written: %s", error)
            self._due_s = time.monotonic() + AFTER_ERROR_S
