"""One sidecar process for the data-parallel ranks of a server: synthetic engines, each in its rank's folder."""

from __future__ import annotations

import json
import os
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from adaptive_spec.runtime_folder import dp_rank_dir, make_runtime_dir
from tests.sidecar.test_process import RunningEngine
from tests.support.processes import SidecarProcess, assert_one_line, run_cli, wait_for


@pytest.fixture
def runtime_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    make_runtime_dir(folder)
    return folder


@pytest.fixture
def sidecar(runtime_dir: Path) -> Iterator[SidecarProcess]:
    with SidecarProcess(runtime_dir, runtime_dir.parent / "profiles") as sidecar:
        yield sidecar


def _samples(sidecar: SidecarProcess, name: str) -> dict[str | None, float]:
    """A metric without labels of its own, by data-parallel rank."""
    families = {family.name: family for family in text_string_to_metric_families(sidecar.get("/metrics"))}
    return {sample.labels.get("dp_rank"): sample.value for sample in families[f"adaptive_spec_{name}"].samples}


def _ranks(status: dict[str, Any], key: str) -> list[Any]:
    return [one[key] for one in status.get("dp_ranks", {}).values()]


def test_one_sidecar_for_all_ranks(runtime_dir: Path, sidecar: SidecarProcess) -> None:
    idle = RunningEngine(dp_rank_dir(runtime_dir, 1))
    with idle.paused():
        busy = RunningEngine(dp_rank_dir(runtime_dir, 0))
        try:
            status = sidecar.wait_status(lambda s: _ranks(s, "mode") == ["active", "active"], "the prior to be shared")
            assert status["engine_attached"]
            assert _ranks(status, "origin") == ["sweep", "profile"]
            steps = _ranks(status, "decode_steps")
            assert steps[1] < 10 < steps[0], "the other rank has not learnt this from its own steps"
            table = json.loads(sidecar.get("/status.json?dp_rank=1"))
            assert table["latency_points"]
            assert "dp_ranks" not in table
            with pytest.raises(urllib.error.HTTPError) as refused:
                sidecar.get("/explain.json?dp_rank=7")
            assert json.loads(refused.value.read())["error"] == "dp_rank: must be one of the server's (0, 1), got 7"
            shown = run_cli("ctl", "status", "--runtime-dir", runtime_dir)
            assert ["rank 0, of 2" in shown.stdout, "dp_rank 1" in shown.stdout] == [True, True], shown.stdout + shown.stderr
            other = run_cli("ctl", "status", "--dp-rank", "1", "--json", "--runtime-dir", runtime_dir)
            assert json.loads(other.stdout)["origin"] == "profile"
            assert_one_line(
                run_cli("ctl", "pin", "1", "--dp-rank", "1", "--runtime-dir", runtime_dir), "--dp-rank", "got 1 with pin"
            )
            assert list(_samples(sidecar, "decode_steps")) == ["0", "1"]
            assert _samples(sidecar, "engine_attached") == {"0": 1.0, "1": 1.0}
        finally:
            busy.stop()
    try:
        sidecar.wait_status(lambda s: _ranks(s, "engine_attached") == [False, True], "the first rank to be seen as gone")
        sidecar.wait_status(lambda s: _ranks(s, "decode_steps")[1] > 100, "the other one to be followed")
        result = run_cli("ctl", "pin", "3", "--runtime-dir", runtime_dir)
        assert (result.returncode, result.stdout) == (0, "pin: done, mode pinned\n"), result.stderr
        wait_for(lambda: idle.engine.tap.begun.k == 3, "the pinned K")
        back = RunningEngine(dp_rank_dir(runtime_dir, 0))
        try:
            status = sidecar.wait_status(lambda s: _ranks(s, "engine_attached") == [True, True], "the rank to come back")
            assert _ranks(status, "mode") == ["pinned", "pinned"]
            wait_for(lambda: back.engine.tap.begun.k == 3, "the pinned K on the other rank")
        finally:
            back.stop()
    finally:
        idle.stop()
    log = sidecar.stop()
    assert "data-parallel rank 1 continues from the models of rank 0" in log
    assert (runtime_dir / "dp-0" / "checkpoint.npz").exists()
    assert (runtime_dir / "dp-1" / "checkpoint.npz").exists()
    assert len([path for path in (runtime_dir.parent / "profiles").iterdir() if path.is_dir() and not path.is_symlink()]) == 1


def test_a_server_that_gives_up_data_parallelism(runtime_dir: Path, sidecar: SidecarProcess) -> None:
    """What is left of the ranks is not shown, and not steered."""
    ranks = [RunningEngine(dp_rank_dir(runtime_dir, rank)) for rank in range(2)]
    sidecar.wait_status(lambda s: _ranks(s, "engine_attached") == [True, True], "both ranks")
    for rank in ranks:
        rank.stop()
    sidecar.wait_status(lambda s: _ranks(s, "engine_attached") == [False, False], "both to be gone")
    alone = RunningEngine(runtime_dir)
    try:
        status = sidecar.wait_status(lambda s: s["engine_attached"], "the server without ranks")
        assert "dp_ranks" not in status
        assert status["engine_pid"] == os.getpid()
        assert list(_samples(sidecar, "engine_attached")) == [None]
    finally:
        alone.stop()
    ranks = [RunningEngine(dp_rank_dir(runtime_dir, rank)) for rank in range(2)]
    try:
        sidecar.wait_status(lambda s: _ranks(s, "engine_attached") == [True, True], "the ranks again")
        assert list(_samples(sidecar, "engine_attached")) == ["0", "1"]
    finally:
        for rank in ranks:
            rank.stop()
