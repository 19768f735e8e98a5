"""The engine report is kept: one that was lost is written again, also when nothing in it changes."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from adaptive_spec.engines.common.report_writer import ReportWriter
from adaptive_spec.wire.engine_report import REPORT_NAME, EngineReport, read_report, report_file

REPORT = EngineReport(os.getpid(), "vllm 0", "refused", "another engine uses this folder")


@pytest.mark.parametrize(
    "damage",
    [
        Path.unlink,
        lambda path: os.truncate(path, 3),
        lambda path: path.write_text("{}"),
        lambda path: path.chmod(0),
        lambda path: (path.unlink(), path.mkdir()),
    ],
)
def test_a_lost_report_is_written_again(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    writer = ReportWriter(tmp_path, logging.getLogger("test"))
    writer.write(REPORT)
    damage(tmp_path / REPORT_NAME)
    lost = report_file(tmp_path)
    writer.write(REPORT)
    assert read_report(tmp_path) == REPORT
    assert report_file(tmp_path) != lost


def test_a_report_that_is_in_place_is_not_written_again(tmp_path: Path) -> None:
    writer = ReportWriter(tmp_path, logging.getLogger("test"))
    writer.write(REPORT)
    before = report_file(tmp_path)
    writer.write(REPORT)
    assert before is not None
    assert report_file(tmp_path) == before
