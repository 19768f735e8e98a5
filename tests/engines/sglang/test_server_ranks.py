"""A real server of two tensor-parallel ranks on the CPU kit: SGLang's own broadcasts and all-reduces on gloo."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

from adaptive_spec.engines.sglang.cpu_kit import CpuKit
from tests.engines.sglang.server import SglangServer, beside, some_prompts, trace

pytestmark = [pytest.mark.server, pytest.mark.nightly]

START_S = 500.0
"""Both ranks import SGLang and load the models, on the cores of one machine."""

STOPPED_S = 30.0
"""Fifteen times the rank timeout of this test, and as long as a policy is valid without a heartbeat."""


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def _scheduler(server: SglangServer, rank: int) -> int:
    """Process id of a rank's scheduler: it has the parent of rank 0, which wrote the report."""
    report = server.report()
    assert report is not None
    parent = _parent(report.pid)
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            title = (entry / "cmdline").read_bytes().decode(errors="replace")
            if title.startswith(f"sglang::scheduler_TP{rank}") and _parent(int(entry.name)) == parent:
                return int(entry.name)
    raise AssertionError(f"no scheduler of rank {rank}")


def _swaps(server: SglangServer) -> int:
    report = server.report()
    return report.counters.get("rank_swaps", 0) if report is not None else 0


def test_two_ranks(kit: CpuKit, tmp_path: Path) -> None:
    """A rank is stopped for 30 s, then the sidecar is killed: outputs stay exact, no step waits for the plugin."""
    environment = {"ADAPTIVE_SPEC_RANKS_TIMEOUT_S": "2", **CpuKit.bound_to_cores(2)}
    with SglangServer(tmp_path, environment=environment, start_s=START_S, tp=2) as server:
        with trace(server) as records:
            answers = server.load(some_prompts(24, 1), 4)
            server.wait(lambda: _swaps(server) >= 2, "policies taken into use by both ranks")
            report = server.report()
            assert report is not None
            assert report.state == "attached", report.reason
            stopped = _scheduler(server, 1)
            with beside(lambda ended: answers.extend(server.load(some_prompts(8, 2), 4))):
                time.sleep(1.0)
                os.kill(stopped, signal.SIGSTOP)
                time.sleep(STOPPED_S)
                os.kill(stopped, signal.SIGCONT)
            before = _swaps(server)
            answers += server.load(some_prompts(24, 3), 4)
            server.wait(lambda: _swaps(server) > before, "a policy after the pause")
            server.kill_sidecar()
            answers += server.load(some_prompts(16, 4), 2)
        report = server.report()
        assert report is not None
        assert report.state == "attached", report.reason
        assert not report.failures
        assert all(answer.exact for answer in answers)
        decided = [record for record in records if record.policy_version]
        assert len(decided) > 20
        assert len({record.k for record in records}) > 1
        print(f"{_swaps(server)} policies taken into use, {len(decided)} of {len(records)} steps decided, {report.counters}")
