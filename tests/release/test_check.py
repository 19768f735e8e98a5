"""What `make release-check` checks. The checks themselves need minutes and a package index; they run before a release."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from release.check import CHECKS, WHEEL_FILES, CheckFailed, Workplace, check_release, require_wheel_files, run

ROOT = Path(__file__).parents[2]


def test_checklist_lists_the_checks_in_order() -> None:
    page = (ROOT / "docs" / "release-checklist.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == list(CHECKS)


def test_files_of_the_wheel_are_in_the_checkout() -> None:
    for name in WHEEL_FILES:
        path = name.removeprefix("adaptive_spec/") if "/dashboards/" in name else name
        assert (ROOT / path).is_file(), name


def test_a_wheel_without_a_file_or_with_a_foreign_one_is_refused() -> None:
    require_wheel_files({*WHEEL_FILES, "adaptive_spec-0.1.0.dist-info/METADATA"})
    with pytest.raises(CheckFailed, match=r"py\.typed"):
        require_wheel_files(set(WHEEL_FILES[1:]))
    with pytest.raises(CheckFailed, match=r"tests/conftest\.py"):
        require_wheel_files({*WHEEL_FILES, "tests/conftest.py"})


def test_a_command_that_fails_is_named_with_what_it_printed(tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match=r"exit status 3\nno reason"):
        run([sys.executable, "-c", "import sys; print('no reason'); sys.exit(3)"], tmp_path)


def test_the_checkout_cannot_be_imported_by_a_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert "None" in run([sys.executable, "-c", "import os; print(os.environ.get('PYTHONPATH'))"], tmp_path)


def test_the_first_failure_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(_: Workplace) -> str:
        raise CheckFailed("broken")

    for name in list(CHECKS):
        monkeypatch.setitem(CHECKS, name, fails if name == "metadata" else lambda _: "fine")
    assert not check_release(tmp_path / "work")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["ok", "build"], ["failed", "metadata"]]
