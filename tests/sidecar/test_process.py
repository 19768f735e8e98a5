"""The sidecar as a process, with a synthetic engine."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from adaptive_spec.config.settings import SidecarSettings
from adaptive_spec.engine_side.tap import RING_NAME
from adaptive_spec.errors import BadInput
from adaptive_spec.sidecar.process import Sidecar
from adaptive_spec.wire.ring import RingWriter
from tests.support.numbers_engine import NumbersEngine, engine_info
from tests.support.processes import SidecarProcess, assert_one_line, run_cli, wait_for

REFUSAL = "the settings stay as they were"


class RunningEngine:
    """Runs steps in a thread until `stop`, about 500 per second."""

    def __init__(self, runtime_dir: Path) -> None:
        self.engine = NumbersEngine(runtime_dir)
        self._stop = Event()
        self._going = Lock()
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            with self._going:
                self.engine.step()
            self._stop.wait(0.002)

    def paused(self) -> Lock:
        """A lock that stops the steps while it is held."""
        return self._going

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        self.engine.close()


@pytest.fixture
def runtime_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def profiles(tmp_path: Path) -> Path:
    return tmp_path / "profiles"


@pytest.fixture
def engine(runtime_dir: Path) -> Iterator[RunningEngine]:
    engine = RunningEngine(runtime_dir)
    yield engine
    engine.stop()


def _active(status: dict[str, Any]) -> bool:
    return status["mode"] == "active" and bool(status["boundaries"])


def test_restarts_and_commands(runtime_dir: Path, profiles: Path, engine: RunningEngine) -> None:
    """Sweep, metrics, control, kill -9, warm restart, SIGTERM, and a start from the profile."""
    with SidecarProcess(runtime_dir, profiles, *_config(runtime_dir, "checkpoint_interval_s: 1")) as sidecar:
        status = sidecar.wait_status(_active, "the sweep to end")
        assert status["sidecar_pid"] == sidecar.process.pid
        assert status["engine_pid"] == os.getpid()
        assert status["engine_attached"]
        assert status["boundaries"][:3] == [6, 12, 18]
        assert status["origin"] == "sweep"
        assert status["failures"] == {}
        assert json.loads(sidecar.get("/healthz"))["alive"]
        families = {f.name: f for f in text_string_to_metric_families(sidecar.get("/metrics"))}
        assert families["adaptive_spec_decode_steps"].samples[0].value > 100
        assert families["adaptive_spec_tile_boundary_tokens"].samples[0].labels["model"] == "numbers"
        assert families["process_resident_memory_bytes"].samples[0].value < 200e6

        _control(runtime_dir, sidecar, engine)

        checkpoint = runtime_dir / "checkpoint.npz"
        written = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        wait_for(lambda: checkpoint.exists() and checkpoint.stat().st_mtime_ns > written, "another checkpoint")
        before = sidecar.status()
        sidecar.kill()
    steps = engine.engine.steps
    with SidecarProcess(runtime_dir, profiles) as sidecar:
        status = sidecar.wait_status(_active, "the second sidecar")
        assert status["origin"] == "checkpoint"
        assert status["sweep"]["steps"] == before["sweep"]["steps"], "no second sweep"
        assert status["policy_version"] >= before["policy_version"]
        assert status["decode_steps"] > 0.8 * before["decode_steps"]
        assert engine.engine.steps > steps, "the engine kept stepping"
        assert engine.engine.tap.counters.hook_failures == 0
        log = sidecar.stop()
        assert "continuing from the checkpoint" in log
    assert not (runtime_dir / "sidecar.json").exists()
    folder = profiles / "numbers_cpu_tp1"
    assert {p.name for p in folder.iterdir()} >= {"latency_model.npz", "calibration.npz", "policy.json", "plots"}

    (runtime_dir / "checkpoint.npz").write_bytes(b"nonsense")
    with SidecarProcess(runtime_dir, profiles) as sidecar:
        status = sidecar.wait_status(_active, "the third sidecar")
        assert status["origin"] == "profile"
        log = sidecar.stop()
    assert "checkpoint.npz is damaged" in log
    assert "already profiled, skipping warmup" in log
    assert (runtime_dir / "checkpoint.npz.damaged-1").read_bytes() == b"nonsense"
    for file in (*runtime_dir.iterdir(), *folder.glob("*.*")):
        assert stat.S_IMODE(file.stat().st_mode) & 0o077 == 0, file


def _config(runtime_dir: Path, text: str) -> tuple[str, str]:
    path = runtime_dir.parent / "config.yaml"
    path.write_text(text)
    return "--config", str(path)


def _control(runtime_dir: Path, sidecar: SidecarProcess, engine: RunningEngine) -> None:
    result = run_cli("ctl", "pin", "3", "--runtime-dir", runtime_dir)
    assert (result.returncode, result.stdout) == (0, "pin: done, mode pinned\n"), result.stderr
    tap = engine.engine.tap
    wait_for(lambda: tap.begun.k == 3, "the engine to run the pinned K")
    assert run_cli("ctl", "shadow", "--runtime-dir", runtime_dir).returncode == 0
    wait_for(lambda: tap.begun.k == 2 and tap.begun.policy_version == 0, "the launch K")
    assert_one_line(run_cli("ctl", "pin", "9", "--runtime-dir", runtime_dir), "K 9 is not one of")
    (runtime_dir.parent / "token").write_text("wrong")
    (runtime_dir.parent / "token").chmod(0o600)
    wrong = run_cli("ctl", "resume", "--url", sidecar.url, "--token-file", runtime_dir.parent / "token")
    assert_one_line(wrong, "refused", "token")
    assert sidecar.status()["mode"] == "shadow"
    status = run_cli("ctl", "status", "--runtime-dir", runtime_dir)
    assert "shadow" in status.stdout
    assert json.loads(run_cli("ctl", "status", "--json", "--url", sidecar.url).stdout)["mode"] == "shadow"
    result = run_cli("sweep", "--runtime-dir", runtime_dir)
    assert result.returncode == 0, result.stderr
    assert "sweep finished" in result.stdout
    assert "tile boundaries 6, 12, 18" in result.stdout
    assert sidecar.status()["mode"] == "active"


def test_waits_for_the_engine(runtime_dir: Path, profiles: Path) -> None:
    with SidecarProcess(runtime_dir, profiles) as sidecar:
        status = sidecar.status()
        assert (status["mode"], status["engine_pid"], status["engine_attached"]) == ("fallback", None, False)
        assert json.loads(sidecar.get("/healthz"))["alive"]
        refused = run_cli("ctl", "pause", "--runtime-dir", runtime_dir)
        assert_one_line(refused, "no engine is attached")
        engine = NumbersEngine(runtime_dir)
        sidecar.wait_status(lambda status: status["engine_attached"], "the sidecar to attach")
        engine.close()
        sidecar.stop()
    assert not any(profiles.iterdir()), "no profile without measurements"


def test_bad_ring_and_bad_profile_folder_are_reported_in_one_line(runtime_dir: Path, profiles: Path) -> None:
    runtime_dir.mkdir(mode=0o700)
    path = runtime_dir / RING_NAME
    RingWriter.create(path, engine_info()).close()
    data = bytearray(path.read_bytes())
    data[8] += 1
    path.write_bytes(data)
    result = run_cli("sidecar", "--runtime-dir", runtime_dir, "--profile-dir", profiles, "--port", "0")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].endswith("records.ring: layout version: must be 2, got 3")
    assert "Traceback" not in result.stderr
    result = run_cli("sidecar", "--runtime-dir", runtime_dir, "--profile-dir", path / "x", "--port", "0")
    assert_one_line(result, "profile_dir", "records.ring/x", "Not a directory", "must be a writable folder")


def test_bad_folders_port_and_token_file(tmp_path: Path, runtime_dir: Path, profiles: Path) -> None:
    """Each is refused before the HTTP server starts."""
    good = SidecarSettings(runtime_dir=runtime_dir, profile_dir=profiles, port=0)
    for name, text, mode in (("file", "", 0o600), ("two lines", "one\ntwo", 0o600), ("shared", "token", 0o664)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(mode)
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        bad: list[tuple[dict[str, Any], str]] = [
            ({"profile_dir": tmp_path / "file" / "x"}, "profile_dir: '.*file/x': Not a directory; must be"),
            ({"runtime_dir": tmp_path / "file" / "x"}, "runtime_dir: '.*file/x': Not a directory; must be"),
            ({"runtime_dir": tmp_path / "open"}, "runtime_dir: '.*open': other users can write to it; must be"),
            ({"port": port}, f"port: {port} on host '127.0.0.1': Address already in use"),
            ({"control_token_file": tmp_path / "none"}, "control_token_file: '.*none': No such file"),
            ({"control_token_file": tmp_path / "shared"}, "control_token_file: '.*shared': must not be writable by others"),
            ({"control_token_file": tmp_path / "file"}, "control_token_file: '.*file': must contain a token of printable ASCII"),
            (
                {"control_token_file": tmp_path / "two lines"},
                "control_token_file: '.*two lines': must contain a token of printable",
            ),
        ]
        for change, words in bad:
            with pytest.raises(BadInput, match=words):
                Sidecar(good.model_copy(update=change))


def test_token_is_kept_and_private(runtime_dir: Path, profiles: Path) -> None:
    with SidecarProcess(runtime_dir, profiles) as sidecar:
        assert sidecar.url
        token = (runtime_dir / "control.token").read_text()
        assert len(token) > 30
        assert stat.S_IMODE((runtime_dir / "control.token").stat().st_mode) == 0o600
        assert stat.S_IMODE(runtime_dir.stat().st_mode) == 0o700
        begun = time.monotonic()
        sidecar.stop()
        assert time.monotonic() - begun < 10.0


def test_sighup_takes_what_can_change_and_refuses_the_rest_in_a_line(
    runtime_dir: Path, profiles: Path, engine: RunningEngine
) -> None:
    config = _config(runtime_dir, "controller: {mode: active}")
    with SidecarProcess(runtime_dir, profiles, *config) as sidecar:
        before = sidecar.wait_status(_active, "the sweep to end")
        _config(runtime_dir, "controller: {mode: shadow}\nlog_level: debug\ngrafana: {timeout_s: 9.0}\n")
        sidecar.process.send_signal(signal.SIGHUP)
        status = sidecar.wait_status(lambda status: status["mode"] == "shadow", "the new mode")
        assert status["origin"] == "checkpoint"
        assert status["decode_steps"] >= before["decode_steps"]
        assert status["sweep"]["steps"] == before["sweep"]["steps"]
        for content in ("controller: {mode: purple}", "controller: [", "nonsense: 1"):
            _config(runtime_dir, content)
            refusals = sidecar.log.read_text().count(REFUSAL)
            sidecar.process.send_signal(signal.SIGHUP)
            _wait_for_another(sidecar, refusals)
        log = sidecar.stop()
    lines = [line for line in log.splitlines() if "SIGHUP" in line]
    assert any("grafana: cannot be changed while the sidecar runs; restart it" in line for line in lines)
    assert any("settings read again, changed: log_level, controller" in line for line in lines)
    assert any("controller.mode: must be 'active' or 'shadow', got 'purple'" in line for line in lines)
    assert "Traceback" not in log


def _wait_for_another(sidecar: SidecarProcess, refusals: int) -> None:
    wait_for(lambda: sidecar.log.read_text().count(REFUSAL) > refusals, "a refusal")


def test_at_level_debug_other_packages_say_no_more() -> None:
    """Some write URLs with their secrets at debug."""
    code = (
        "import logging; from adaptive_spec.sidecar.process import set_log_level; logging.basicConfig(); set_log_level('debug')\n"
    )
    code += "logging.getLogger('fsspec.http').debug('secret'); logging.getLogger('adaptive_spec.sidecar').debug('said')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180, check=True)
    assert "said" in result.stderr
    assert "secret" not in result.stderr
