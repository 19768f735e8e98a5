"""`adaptive-spec watch` on a sidecar process."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from adaptive_spec.cli.watch import Watch, goodput_trend
from tests.sidecar.test_process import RunningEngine
from tests.support.processes import SidecarProcess, assert_one_line, run_cli, wait_for


@pytest.fixture
def sidecar(tmp_path: Path) -> Iterator[SidecarProcess]:
    engine = RunningEngine(tmp_path / "run")
    with SidecarProcess(tmp_path / "run", tmp_path / "profiles") as sidecar:
        sidecar.wait_status(lambda status: status["engine_attached"], "the sidecar to attach")
        yield sidecar
    engine.stop()


def test_on_a_pipe_it_prints_lines_until_it_is_stopped(sidecar: SidecarProcess, tmp_path: Path) -> None:
    log = tmp_path / "watch.log"
    with log.open("w") as output:
        command = [sys.executable, "-m", "adaptive_spec.cli", "watch", "--runtime-dir", str(sidecar.runtime_dir)]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    wait_for(lambda: "tokens/s" in log.read_text(), "a line")
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    assert "Traceback" not in log.read_text()
    assert "\x1b" not in log.read_text()


def test_without_a_sidecar_it_is_one_line(tmp_path: Path) -> None:
    assert_one_line(run_cli("watch", "--url", "http://127.0.0.1:1"), "no sidecar answers")
    assert_one_line(run_cli("watch", "--runtime-dir", tmp_path), "no sidecar runs there")
    assert_one_line(run_cli("watch", "--url", "ftp://x"), "--url")


def test_the_view_takes_every_state(sidecar: SidecarProcess) -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    shown = Watch(sidecar.url, console)
    waiting = {
        "mode": "fallback",
        "reason": "waiting for an engine",
        "k_by_batch_size": {},
        "boundaries": [],
        "policy_version": 0,
    }
    console.print(shown.view(waiting, 0.0))
    status = sidecar.wait_status(lambda status: status["mode"] == "active" and status["goodput_tokens_per_s"], "a decision")
    shown.seen(status)
    console.print(shown.view(status, 0.0))
    console.print(shown.view(status, 12.0))
    text = console.export_text()
    assert "not measured yet" in text
    assert f"{status['goodput_tokens_per_s']:,.0f} tokens/s" in text
    assert "no answer for 12 s; it was active" in text


def test_the_trend_is_between_nothing_and_its_maximum() -> None:
    (blocks, _), words = goodput_trend([0.0, 50.0, 100.0])
    assert (blocks[0], blocks[2]) == ("▁", "█")
    assert words == "  100 tokens/s"
    assert goodput_trend([])[1] == "not measured yet"
