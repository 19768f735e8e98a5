from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from adaptive_spec.cli.doctor import Finding, examine
from adaptive_spec.engine_side.tap import PAGE_NAME, RING_NAME
from adaptive_spec.wire.policy_page import PolicyPage
from adaptive_spec.wire.ring import RingWriter
from tests.support.numbers_engine import NumbersEngine, engine_info
from tests.support.processes import run_cli


def _find(runtime_dir: Path, tmp_path: Path, port: int = 0) -> dict[str, Finding]:
    return {f.subject: f for f in examine(runtime_dir, tmp_path / "profiles", "127.0.0.1", port)}


def test_an_empty_machine(tmp_path: Path) -> None:
    findings = _find(tmp_path / "run", tmp_path)
    assert {f.state for f in findings.values()} <= {"ok", "note"}
    assert findings["python"].state == findings["libraries"].state == findings["runtime folder"].state == "ok"
    assert "no engine" in findings["ring"].text
    assert "no sidecar" in findings["policy page"].text
    assert not (tmp_path / "run").exists(), "doctor creates no files"


def test_ring_and_page(tmp_path: Path) -> None:
    engine = NumbersEngine(tmp_path)
    for _ in range(3):
        engine.step()
    PolicyPage.create_or_open(tmp_path / PAGE_NAME, 1000).close()
    findings = _find(tmp_path, tmp_path)
    assert "numbers on cpu" in findings["ring"].text
    assert "alive, 3 records, last record" in findings["ring"].text
    assert findings["policy page"].state == "note"
    assert "no heartbeat" in findings["policy page"].text
    engine.close()


@pytest.mark.parametrize(("name", "subject"), [(RING_NAME, "ring"), (PAGE_NAME, "policy page")])
def test_foreign_files_are_broken(tmp_path: Path, name: str, subject: str) -> None:
    (tmp_path / name).write_bytes(b"x" * 10_000)
    (tmp_path / name).chmod(0o600)
    finding = _find(tmp_path, tmp_path)[subject]
    assert finding.state == "broken"
    assert "magic" in finding.text


def test_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        finding = _find(tmp_path, tmp_path, taken.getsockname()[1])["port"]
    assert finding.state == "note"
    assert "Address already in use" in finding.text


def test_unwritable_runtime_folder_is_broken(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert _find(tmp_path / "file" / "run", tmp_path)["runtime folder"].state == "broken"


def test_command(tmp_path: Path) -> None:
    result = run_cli("doctor", "--json", "--port", "0", "--runtime-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    subjects = {finding["subject"] for finding in json.loads(result.stdout)}
    assert {"python", "torch", "sglang", "ring", "policy page", "port", "profile folder"} <= subjects
    path = tmp_path / RING_NAME
    RingWriter.create(path, engine_info()).close()
    path.write_bytes(path.read_bytes()[:5000])
    result = run_cli("doctor", "--port", "0", "--runtime-dir", tmp_path)
    assert result.returncode == 1
    assert "got 5000 bytes" in " ".join(result.stdout.split())
