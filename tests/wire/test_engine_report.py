from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from adaptive_spec.wire.engine_report import REPORT_NAME, EngineReport, read_report, write_report

REPORT = EngineReport(os.getpid(), "sglang 0.5.23", "detached", "verify failed 8 times", {"verify": 8}, {"adoptions": 3})


def test_round_trip_is_private_and_leaves_nothing_behind(tmp_path: Path) -> None:
    write_report(tmp_path, REPORT)
    assert read_report(tmp_path) == REPORT
    assert sorted(p.name for p in tmp_path.iterdir()) == [REPORT_NAME, "engine.lock"]
    assert stat.S_IMODE((tmp_path / REPORT_NAME).stat().st_mode) == 0o600


def test_the_report_of_an_ended_engine_is_ignored(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    write_report(tmp_path, EngineReport(child, "sglang", "attached"))
    assert read_report(tmp_path) is None


REST = '"engine": "", "reason": "", "counters": {}'


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{", '{"pid": 1}', "\0" * 100,
        '{"pid": "x", "state": "attached", "failures": {}, ' + REST + "}",
        '{"pid": -5, "state": "attached", "failures": {}, ' + REST + "}",
        '{"pid": 1, "state": "happy", "failures": {}, ' + REST + "}",
        '{"pid": 1, "state": "attached", "failures": [], ' + REST + "}",
    ],
)  # fmt: skip
def test_a_damaged_report_is_ignored(tmp_path: Path, text: str) -> None:
    (tmp_path / REPORT_NAME).write_text(text)
    assert read_report(tmp_path) is None


def test_no_report(tmp_path: Path) -> None:
    assert read_report(tmp_path) is None


def test_a_folder_in_place_of_the_report_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / REPORT_NAME / "inside").mkdir(parents=True)
    write_report(tmp_path, REPORT)
    assert read_report(tmp_path) == REPORT
    assert (tmp_path / f"{REPORT_NAME}.damaged-1" / "inside").is_dir()
