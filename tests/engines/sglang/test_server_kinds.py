"""Algorithms, and servers the plugin must leave alone."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adaptive_spec.domain.step_record import StepFlag
from adaptive_spec.engine_side.tap import RING_NAME
from adaptive_spec.engines.sglang.cpu_kit import CpuKit
from adaptive_spec.wire.engine_report import read_report
from adaptive_spec.wire.ring import RingReader
from tests.engines.sglang.server import SglangServer, beside, some_prompts, trace
from tests.support.processes import SidecarProcess, run_cli

pytestmark = pytest.mark.server


@pytest.mark.nightly
def test_eagle3(kit: CpuKit, tmp_path: Path) -> None:
    with SglangServer(tmp_path, algorithm="EAGLE3") as server:
        server.wait_status(lambda s: s["engine_attached"], "the sidecar to attach")
        with trace(server) as records:
            answers = server.load(some_prompts(60, seed=1), 8)
        assert all(answer.exact for answer in answers)
        assert len({record.k for record in records}) >= 3
        assert sum(int(r.accept_len.sum()) for r in records) == sum(a.meta.get("spec_num_correct_drafts", 0) for a in answers)
        confidences = np.concatenate([r.confidences.ravel() for r in records if r.k])
        assert len(np.unique(confidences)) > 20
        assert not any(record.flags & 8 for record in records)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("flags", "k", "tokens", "staged", "reason"),
    [
        ({"algorithm": "STANDALONE"}, 3, 4, True, "speculative_algorithm=STANDALONE (only EAGLE/EAGLE3 are supported)"),
        ({"algorithm": "NGRAM", "k": 5}, 5, 6, False, "speculative_algorithm=NGRAM (only EAGLE/EAGLE3 are supported)"),
        ({"topk": 2, "draft_tokens": 6}, 3, 6, True, "speculative_eagle_topk=2 (only topk=1 is supported)"),
        ({"algorithm": ""}, 0, 1, False, "the server runs without speculation"),
    ],
    ids=["standalone", "ngram", "tree", "no-speculation"],
)
def test_a_server_whose_k_cannot_change_is_observed(
    kit: CpuKit, tmp_path: Path, flags: dict[str, Any], k: int, tokens: int, staged: bool, reason: str
) -> None:
    """tokens: of a request in a verify forward. staged: whether the stages of a step are timed."""
    with SglangServer(tmp_path, **flags) as server:
        server.wait_status(lambda s: s["engine_attached"], "the sidecar to attach")
        with trace(server) as records:
            answers = server.load(some_prompts(30, seed=1), 4)
        assert all(answer.exact for answer in answers)
        report = server.report()
        assert report is not None
        assert (report.state, report.reason) == ("observing", reason)
        assert not report.failures
        assert f"K is not decided here: {reason}" in server.log.read_text(errors="replace")
        assert {record.k for record in records} == {k}
        assert {record.num_tokens - record.batch_size * tokens for record in records} == {0}
        assert max(record.batch_size for record in records) > 1
        assert {bool(record.flags & StepFlag.WHOLE) for record in records} == {not staged}
        assert not any(record.flags & StepFlag.DISTURBED for record in records)
        accepted = sum(int(r.accept_len.sum()) for r in records)
        assert accepted == sum(a.meta.get("spec_num_correct_drafts", 0) for a in answers)
        assert (accepted > 0) == (k > 0)
        status = server.settled()
        assert status["engine"]["candidates"] == [k]
        assert status["decode_steps"] == server.metrics()["decode_steps_total"][()]
        # The first token comes from the prefill; what a last step produced beyond the number asked for is counted too.
        assert status["output_tokens"] >= sum(a.tokens for a in answers) - len(answers)
        assert not status["failures"], status["failures"]
        assert len(status["accepted_tokens"]) == k
        if k:
            assert status["accepted_tokens"][0] > 0


@pytest.mark.nightly
def test_replicas_of_one_server_are_steered_each_by_itself(kit: CpuKit, tmp_path: Path) -> None:
    """dp_size 2: two schedulers, two rings, one sidecar."""
    with SglangServer(tmp_path, dp=2, environment=CpuKit.bound_to_cores(2)) as server:
        server.wait_status(
            lambda s: [one["engine_attached"] for one in s.get("dp_ranks", {}).values()] == [True] * 2, "both ranks"
        )
        for seed in range(1, 60):
            answers = server.load(some_prompts(32, seed=seed), 8)
            assert all(answer.exact for answer in answers)
            ranks = server.status()["dp_ranks"].values()
            if all(one["mode"] == "active" and len(one["k_by_batch_size"]) for one in ranks):
                break
        assert [one["mode"] for one in ranks] == ["active"] * 2, ranks
        assert all(one["decode_steps"] > 20 for one in ranks), ranks
        server.control("pin", "1")
        rings = [RingReader.open(server.runtime_dir / f"dp-{rank}" / RING_NAME, "newest") for rank in range(2)]
        answers = server.load(some_prompts(32, seed=99), 8)
        assert all(answer.exact for answer in answers)
        for ring in rings:
            records = ring.poll(1024)
            ring.close()
            assert {record.k for record in records[len(records) // 2 :]} == {1}
        reports = [read_report(server.runtime_dir / f"dp-{rank}") for rank in range(2)]
        assert [report.state for report in reports if report is not None] == ["attached"] * 2
        steps = server.metrics()["decode_steps_total"]
        assert sorted(steps) == [(("dp_rank", "0"),), (("dp_rank", "1"),)]


@pytest.mark.nightly
def test_one_k_can_be_watched(kit: CpuKit, tmp_path: Path) -> None:
    with SglangServer(tmp_path, adaptive=None) as server:
        server.wait_status(lambda s: s["engine_attached"], "the sidecar to attach")
        with trace(server) as records:
            answers = server.load(some_prompts(24, seed=1), 6)
        assert all(answer.exact for answer in answers)
        assert {record.k for record in records} == {3}
        report = server.report()
        assert report is not None
        assert report.state == "observing"
        assert report.reason.startswith("speculative_adaptive=False")
        assert sum(int(r.verify_len.sum()) for r in records) == sum(a.meta["spec_num_proposed_drafts"] for a in answers)
        # The sidecar was asked for mode active, and detects that its trials are not run.
        for seed in range(2, 20):
            if server.status()["mode"] == "shadow":
                break
            server.load(some_prompts(24, seed), 6)
        status, metrics = server.settled(), server.metrics()
        assert status["mode"] == "shadow"
        words = "the engine is observe-only: its steps run none of the policies made for it"
        assert status["reason"] == f"{words} ({report.reason})"
        assert metrics["mode"][(("mode", "shadow"),)] == 1.0
        assert metrics["mode"][(("mode", "sweep"),)] == 0.0
        assert metrics["sweep_progress_ratio"] == {(): 1.0}
        assert status["latency_points"], "it learns from the traffic"
        assert set(status["k_by_batch_size"].values()) == {3}

        def load(ended: threading.Event) -> None:
            while not ended.is_set():
                server.load(some_prompts(12, seed=30), 6)

        with beside(load):
            refused = run_cli("sweep", "--runtime-dir", server.runtime_dir, "--timeout", "50")
        assert refused.returncode == 2, refused.stderr
        assert refused.stderr.endswith(f"sweep: cannot run: {status['reason']}\n")


def test_shadow_leaves_k_to_sglang(kit: CpuKit, tmp_path: Path) -> None:
    with SglangServer(tmp_path, mode="shadow") as server:
        status = server.wait_status(lambda s: s["engine_attached"], "the sidecar to attach")
        assert status["mode"] == "shadow"
        with trace(server) as records:
            answers = server.load(some_prompts(60, seed=1), 6)
        assert all(answer.exact for answer in answers)
        assert {record.policy_version for record in records} == {0}
        assert len({record.k for record in records}) >= 2, "SGLang's own policy moves"
        assert sum(int(r.accept_len.sum()) for r in records) == sum(a.meta.get("spec_num_correct_drafts", 0) for a in answers)
        assert "Adaptive spec params updated" in server.log.read_text(errors="replace")


def test_inert_unless_asked(kit: CpuKit, tmp_path: Path) -> None:
    environment = {"ADAPTIVE_SPEC_RUNTIME_DIR": str(tmp_path / "run")}
    with SglangServer(tmp_path, direct=True, environment=environment) as server:
        answers = server.load(some_prompts(12, seed=1), 4)
        assert all(answer.exact for answer in answers)
        assert not (tmp_path / "run").exists()
        log = server.log.read_text(errors="replace")
        assert "adaptive-spec:" not in log


@pytest.mark.nightly
def test_another_sglang_is_left_alone(kit: CpuKit, tmp_path: Path) -> None:
    """The installed one, under the version number of a later one. A sidecar shows the server's own numbers."""
    site = tmp_path / "site" / "sglang-99.0.dist-info"
    site.mkdir(parents=True)
    (site / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 99.0\n")
    environment = {
        "PYTHONPATH": str(site.parent), "ADAPTIVE_SPEC_MODE": "active", "ADAPTIVE_SPEC_RUNTIME_DIR": str(tmp_path / "run"),
    }  # fmt: skip
    with SglangServer(tmp_path, direct=True, environment=environment, more=("--enable-metrics",)) as server:
        answers = server.load(some_prompts(60, seed=1), 8)
        assert all(answer.exact for answer in answers)
        log = server.log.read_text(errors="replace")
        assert "not attached: SGLang 99.0 is not a supported release" in log
        report = server.report()
        assert report is not None
        assert report.state == "refused"
        with SidecarProcess(server.runtime_dir, server.profile_dir, "--server-port", str(server.port)) as sidecar:
            status = sidecar.wait_status(lambda s: s.get("server_reported"), "the server's own numbers")
        assert "SGLang 99.0" in status["reason"]
        assert not status["engine_attached"]
        reported = status["server_reported"]
        assert (reported["failure"], reported["running_requests"]) == ("", 0)
        assert 1 < reported["accept_length"] <= 4, "of its latest 40 steps"
