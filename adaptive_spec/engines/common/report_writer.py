"""Writes the engine report of one process when it has changed, at most once a second unless the state changes. Never raises.

A report that was deleted or damaged is written again: one of a refusal never changes.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path

from adaptive_spec.wire.engine_report import EngineReport, ReportFile, report_file, write_report

INTERVAL_S = 1.0
AFTER_ERROR_S = 60.0


@dataclass
class ReportWriter:
    """runtime_dir: where. log: says once why a report cannot be written."""

    runtime_dir: Path
    log: logging.Logger
    _due_s: float = 0.0
    _written: EngineReport | None = field(default=None)
    _file: ReportFile | None = field(default=None)
    _error: str = ""

    @property
    def due(self) -> bool:
        """Whether it is time to look again."""
        return time.monotonic() >= self._due_s

    def write(self, report: EngineReport) -> None:
        self._due_s = time.monotonic() + INTERVAL_S
        if report == self._written and self._file == report_file(self.runtime_dir):
            return
        try:
            self._file = write_report(self.runtime_dir, report)
            self._written = report
        except Exception as error:
            if str(error) != self._error:
                self._error = str(error)
                self.log.warning("adaptive-spec: the report could not be written: %s", error)
            self._due_s = time.monotonic() + AFTER_ERROR_S
