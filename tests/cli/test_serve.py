"""`serve` and `doctor` where SGLang is installed, without loading a model."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path

import pytest

from adaptive_spec.engines.sglang.cpu_kit import KIT_VARIABLE, CpuKit
from tests.engines.sglang.server import SglangServer
from tests.support.processes import assert_one_line, run_cli

pytestmark = pytest.mark.server


def _run(kit: CpuKit, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        kit.command("adaptive-spec", *map(str, arguments)), capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip


def test_bad_input_is_refused_before_a_model_is_loaded(kit: CpuKit, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("controller: {mode: maybe}\n")
    assert_one_line(_run(kit, "serve"), "no SGLang server flags")
    flags = ("--", "--model-path", "none")
    assert_one_line(_run(kit, "serve", "--config", tmp_path / "config.yaml", *flags), "controller.mode", "maybe")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert_one_line(_run(kit, "serve", "--port", port, *flags), "--port", port, "already in use")


def test_the_servers_exit_status_is_ours(kit: CpuKit, tmp_path: Path) -> None:
    arguments = ("serve", "--port", "0", "--runtime-dir", tmp_path / "run", "--profile-dir", tmp_path / "profiles")
    result = _run(kit, *arguments, "--", "--no-such-flag")
    assert result.returncode == 2, "argparse's own"
    assert "--model-path" in result.stderr, "what argparse misses first"
    assert not (tmp_path / "run" / "sidecar.json").exists(), "the sidecar has ended too"


def test_a_sidecar_that_cannot_start_is_reported_once(kit: CpuKit, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = _run(kit, "serve", "--port", "0", "--runtime-dir", tmp_path / "file" / "run", "--", "--model-path", "none")
    assert result.returncode == 2
    assert "runtime_dir" in result.stderr
    assert "Traceback" not in result.stderr


def test_doctor_looks_at_every_hook(kit: CpuKit, tmp_path: Path) -> None:
    result = _run(
        kit, "doctor", "--json", "--port", "0", "--runtime-dir", tmp_path, SGLANG_PLUGINS="", ADAPTIVE_SPEC_MODE="shadow"
    )
    assert result.returncode == 0, result.stderr
    found = {finding["subject"]: finding for finding in json.loads(result.stdout)}
    assert found["sglang"]["text"] == "0.5.23, supported"
    groups = "observe, counts and K, stage times, confidences, ranks"
    assert found["sglang hooks"]["state"] == found["sglang dspark hooks"]["state"] == "ok"
    assert found["sglang hooks"]["text"] == f"all that is needed was found: {groups}"
    assert found["sglang entry point"]["state"] == "ok"
    assert found["sglang plugin"]["text"] == "mode shadow"
    result = _run(
        kit, "doctor", "--json", "--port", "0", "--runtime-dir", tmp_path, SGLANG_PLUGINS="other", ADAPTIVE_SPEC_MODE="x"
    )
    found = {finding["subject"]: finding for finding in json.loads(result.stdout)}
    assert found["sglang entry point"]["state"] == "note"
    assert "ADAPTIVE_SPEC_MODE: must be one of off, shadow, active, got 'x'" in found["sglang plugin"]["text"]
    assert result.returncode == 1


@pytest.mark.nightly
def test_the_demonstration_on_a_real_server(kit: CpuKit, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = ["demo", "--engine", "sglang", "--duration", "16", "--port", "0", "--json", str(out)]
    result = subprocess.run([*_this_python(), *command], capture_output=True, text=True, timeout=240, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    document = json.loads(out.read_text())
    assert document["engine"] == "sglang"
    assert document["lossless"] is True
    assert document["lossless_checked"] > 20
    assert document["decode_steps"] > 200
    assert document["policy_swaps"] >= 1
    assert document["acceptance"]["predictable"][0] > document["acceptance"]["erratic"][0] + 0.2
    assert document["goodput_tokens_per_s"] > 0.0
    assert 15.0 < document["duration_s"] < 60.0


def _this_python() -> list[str]:
    import sys

    return [sys.executable, "-m", "adaptive_spec.cli"]


def test_without_the_kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KIT_VARIABLE, str(tmp_path))
    assert_one_line(run_cli("demo", "--engine", "sglang"), "CPU kit", str(tmp_path), KIT_VARIABLE)


def test_a_server_that_dies_takes_the_sidecar_along(kit: CpuKit, tmp_path: Path) -> None:
    with SglangServer(tmp_path) as server:
        sidecar, engine = (
            int(server.sidecar["pid"]),
            int(server.wait_status(lambda s: s["engine_pid"], "an engine")["engine_pid"]),
        )
        os.kill(engine, 9)
        status = server.process.wait(90)
        assert status != 0
        with pytest.raises(ProcessLookupError):
            os.kill(sidecar, 0)
