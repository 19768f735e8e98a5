"""Real vLLM servers on the CPU kit: `serve`, a sidecar that is killed, two ranks, and what is refused."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from adaptive_spec.client.sidecar import ControlClient
from adaptive_spec.engine_side.tap import RING_NAME
from adaptive_spec.engines.vllm.cpu_kit import CpuKit
from adaptive_spec.wire.engine_report import read_report
from tests.engines.vllm.server import VllmServer, all_records

pytestmark = [pytest.mark.nightly, pytest.mark.server]


def _pinned(client: ControlClient, k: int) -> bool:
    return bool(client.status()["k_by_batch_size"]["1"] == k)


def test_serve_counts_what_vllm_counts_and_survives_a_killed_sidecar(vllm_kit: CpuKit, tmp_path: Path) -> None:
    with VllmServer(vllm_kit, tmp_path) as server:
        client = server.sidecar()
        assert server.exact(24, 4) == 24
        report = server.report()
        assert (report.state, report.level) == ("attached", 3)
        assert client.status()["mode"] in ("sweep", "active")
        drafted = server.own_counter("vllm:spec_decode_num_draft_tokens_total")
        accepted = server.own_counter("vllm:spec_decode_num_accepted_tokens_total")
        server.wait(lambda: server.report().counters["records_written"] > 0, "records")

        def same() -> bool:
            status = client.status()
            return (sum(status["verified_tokens"]), sum(status["accepted_tokens"])) == (drafted, accepted)

        server.wait(same, "the sidecar to count what vLLM counts")
        for k in (5, 0, 1):
            client.send("pin", k)
            server.wait(partial(_pinned, client, k), "the pin")
            time.sleep(0.3)
            with server.ring() as ring:
                all_records(ring)  # of before
                assert server.exact(6, 3, seed=k) == 6
                records = all_records(ring)
                assert {record.k for record in records} <= {k}
                assert all((record.verify_len == record.k).all() for record in records if not record.flags & 12)
        client.send("unpin")
        pid = client.status()["sidecar_pid"]
        ended = threading.Event()

        def kill() -> None:
            time.sleep(0.5)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            ended.set()

        thread = threading.Thread(target=kill)
        thread.start()
        assert server.exact(40, 8, seed=9) == 40, "under load, while the sidecar dies"
        thread.join()
        assert ended.is_set()
        again = server.wait(lambda: server.sidecar().status()["sidecar_pid"] != pid, "a new sidecar")
        assert again
        assert server.report().state == "attached"
        assert server.exact(8, 4, seed=10) == 8


def test_two_ranks_run_the_k_that_the_engine_core_decides(vllm_kit: CpuKit, tmp_path: Path) -> None:
    with VllmServer(vllm_kit, tmp_path, tp=2) as server:
        client = server.sidecar()
        assert client.status()["engine"]["tp"] == 2
        assert server.exact(8, 4) == 8
        for k in (0, 5):
            client.send("pin", k)
            server.wait(partial(_pinned, client, k), "the pin")
            with server.ring() as ring:
                all_records(ring)  # of before
                assert server.exact(4, 2, seed=k) == 4
                assert {record.k for record in all_records(ring)} <= {k}
        assert server.report().failures == {}


def test_data_parallelism_is_refused_with_the_reason(vllm_kit: CpuKit, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o700)
    environment = {"ADAPTIVE_SPEC_MODE": "active", "ADAPTIVE_SPEC_RUNTIME_DIR": str(tmp_path / "run")}
    with VllmServer(vllm_kit, tmp_path, direct=True, environment=environment, more=("-dp", "2")) as server:
        report = server.wait(lambda: read_report(server.runtime_dir), "the report")
        assert report.state == "refused"
        assert "data parallelism" in report.reason
        assert server.exact(4, 2) == 4


def test_installed_and_not_asked_for_it_does_nothing(vllm_kit: CpuKit, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o700)
    environment = {"ADAPTIVE_SPEC_RUNTIME_DIR": str(tmp_path / "run")}
    with VllmServer(vllm_kit, tmp_path, direct=True, environment=environment) as server:
        assert server.exact(4, 2) == 4
        assert list((tmp_path / "run").iterdir()) == []
        assert not (tmp_path / "run" / RING_NAME).exists()
        assert "adaptive-spec:" not in server.log.read_text(errors="replace")


def test_shadow_observes_and_changes_nothing(vllm_kit: CpuKit, tmp_path: Path) -> None:
    with VllmServer(vllm_kit, tmp_path, mode="shadow") as server:
        client = server.sidecar()
        with server.ring() as ring:
            assert server.exact(16, 4) == 16
            records = all_records(ring)
        assert {record.k for record in records} == {5}, "the launch schedule, at up to 12 requests"
        assert all((record.verify_len == record.k).all() for record in records if not record.flags & 12)
        assert client.status()["mode"] == "shadow"
