"""The matrix of releases: order, table, exit status, and the cache of wheels. Nothing is downloaded here."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest

from adaptive_spec.engines.static_contract import Need
from tests.engines import release_matrix
from tests.engines.release_matrix import MATRICES, Matrix, cached_wheel, main, order, row_of, table

NEEDS = (Need("observe", "engine.worker.Worker"), Need("steer", "engine.worker.Worker.step", ("self", "batch"), hook="step"))
MATRIX = Matrix("engine", ("observe", "steer"), NEEDS, {"1.10": ("observe", "steer")}, ("1.9",))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(MATRICES, "engine", MATRIX)
    return tmp_path


def wheel(cache: Path, release: str, method: str = "def step(self, batch): ...") -> None:
    with zipfile.ZipFile(cache / f"engine-{release}-py3-none-any.whl", "w") as file:
        file.writestr("engine/__init__.py", "")
        file.writestr("engine/worker.py", f"class Worker:\n    {method}\n")


def run(cache: Path, *arguments: str) -> int:
    return main(["engine", "--offline", "--cache", str(cache), *arguments])


def test_releases_are_in_order() -> None:
    assert sorted(["0.5.10", "0.5.9", "0.5.10.post1"], key=order) == ["0.5.9", "0.5.10", "0.5.10.post1"]
    assert MATRIX.releases == ["1.9", "1.10"]


def test_all_supported_releases_meet_their_groups(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wheel(cache, "1.9", "pass")
    wheel(cache, "1.10")
    assert run(cache) == 0, "1.9 is not supported, so it fails nothing"
    assert capsys.readouterr().out.splitlines() == [
        "release  supported  observe  steer",
        "1.9      no         ok       1 missing",
        "1.10     yes        ok       ok",
        "1.9, steer: engine.worker.Worker.step: not there",
    ]


def test_a_supported_release_that_fails_is_the_exit_status(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wheel(cache, "1.9")
    wheel(cache, "1.10", "def step(self, rows): ...")
    assert run(cache) == 1
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == "1.10, steer: engine.worker.Worker.step: parameter 2 is rows, not batch"
    assert said.err == "engine 1.10 is supported and fails: steer\n"


def test_no_wheel_of_a_supported_release(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wheel(cache, "1.9")
    assert run(cache) == 2
    assert "1.10     yes        no wheel  no wheel" in capsys.readouterr().out


def test_a_version_can_be_asked_for(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wheel(cache, "2.0")
    assert run(cache, "2.0") == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["2.0      no         ok       ok"]


def test_a_damaged_wheel_is_not_a_wheel(cache: Path) -> None:
    (cache / "engine-1.10-py3-none-any.whl").write_bytes(b"half a download")
    assert cached_wheel("engine", "1.10", cache) is None


def test_a_wheel_is_not_taken_for_another_release(cache: Path) -> None:
    wheel(cache, "1.10.post1")
    assert cached_wheel("engine", "1.10", cache) is None


def test_newer_releases_come_from_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "engine (1.12)\nAvailable versions: 1.12, 1.11rc1, 1.10.post1, 1.10, 1.9\n"
    monkeypatch.setattr(release_matrix, "_pip", lambda *a: subprocess.CompletedProcess(a, 0, said, ""))
    assert release_matrix.newer_releases("engine", ["1.9", "1.10"]) == ["1.10.post1", "1.12"]
    monkeypatch.setattr(release_matrix, "_pip", lambda *a: subprocess.CompletedProcess(a, 1, "", "no network"))
    assert release_matrix.newer_releases("engine", ["1.10"]) == []


def test_a_row_without_a_wheel_fails_what_is_required() -> None:
    row = row_of(MATRIX, "1.10", None)
    assert row.failed == ["observe", "steer"]
    assert "no wheel" in table(MATRIX.groups, [row])
