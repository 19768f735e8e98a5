"""One real server with EAGLE, under everything that may happen to it. The tests build on each other, in their order."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from adaptive_spec.client.sidecar import ControlClient
from adaptive_spec.config.load import load_settings
from adaptive_spec.domain.step_record import StepFlag, StepRecord
from adaptive_spec.engine_side.tap import PAGE_NAME
from adaptive_spec.engines.sglang.cpu_kit import CpuKit
from adaptive_spec.wire.engine_report import EngineReport
from adaptive_spec.wire.policy_page import PolicyPageReader
from tests.engines.sglang.server import SglangServer, beside, some_prompts, trace
from tests.support.models_anew import assert_models_are_those_of, models_anew, same_models
from tests.support.processes import assert_one_line, run_cli
from tests.support.ring_trace import RingTrace

pytestmark = pytest.mark.server

CONFIG = "controller: {policy: {max_age_s: 1, min_dwell_s: 0.2}}\ncheckpoint_interval_s: 1\nlog_level: debug\n"
CANDIDATES = {0, 1, 3, 5}


@pytest.fixture(scope="module")
def server(kit: CpuKit, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SglangServer]:
    with SglangServer(tmp_path_factory.mktemp("server"), config=CONFIG) as server:
        yield server


@pytest.fixture(scope="module")
def whole(server: SglangServer) -> Iterator[RingTrace]:
    """All records from the server's first on, until it is stopped."""
    traced = RingTrace(server.runtime_dir, oldest=True)
    yield traced
    traced.end()


def _swept(server: SglangServer) -> None:
    for seed in range(10):
        if server.status()["mode"] == "active":
            return
        server.load(some_prompts(16, seed), 4)
    server.wait_status(lambda s: s["mode"] == "active", "the sweep to end")


@contextmanager
def _pinned_in_turn(server: SglangServer) -> Iterator[None]:
    """Hot-swap K as fast as the sidecar takes commands: traffic alone may leave it where it is."""
    client = ControlClient.find(server.runtime_dir, None, None)

    def pin(ended: threading.Event) -> None:
        for k in itertools.cycle(sorted(CANDIDATES)):
            if ended.is_set():
                return
            client.send("pin", k)

    try:
        with beside(pin):
            yield
    finally:
        client.send("unpin")


def _count(records: list[StepRecord]) -> tuple[int, int, int]:
    """Rows, verified and accepted draft tokens."""
    return (
        sum(len(r.accept_len) for r in records),
        sum(int(r.verify_len.sum()) for r in records),
        sum(int(r.accept_len.sum()) for r in records),
    )


def test_attached(server: SglangServer, whole: RingTrace) -> None:
    status = server.wait_status(lambda s: s["engine_attached"], "the sidecar to attach")
    assert set(status["engine"]["candidates"]) == CANDIDATES
    assert (status["engine"]["name"], status["engine"]["launch_k"], status["engine"]["max_batch"]) == ("sglang", 3, 16)
    assert status["engine_report"]["state"] == "attached"
    assert server.metrics()["engine_attached"] == {(): 1.0}


def test_exact_outputs_and_exact_counts_while_k_switches(server: SglangServer) -> None:
    """200 requests at concurrency 8, every token the target's own, every token counted."""
    _swept(server)
    before = server.settled()
    with trace(server) as records, _pinned_in_turn(server):
        answers = server.load(some_prompts(200, seed=5), 8)
    assert all(answer.exact for answer in answers)
    ks = [record.k for record in records]
    assert set(ks) <= CANDIDATES
    switches = sum(a != b for a, b in itertools.pairwise(ks))
    assert switches >= 50, f"K switched {switches} times"
    assert len(set(ks)) >= 3

    rows, verified, accepted = _count(records)
    correct = sum(answer.meta.get("spec_num_correct_drafts", 0) for answer in answers)
    verifications = sum(answer.meta["spec_verify_ct"] for answer in answers)
    status = server.settled()
    assert rows == verifications
    assert accepted == correct
    counted = {
        name: np.array(status[name]) - np.array(before[name]) for name in ("draft_tokens", "verified_tokens", "accepted_tokens")
    }
    assert int(counted["accepted_tokens"].sum()) == accepted
    assert int(counted["verified_tokens"].sum()) == verified == int(counted["draft_tokens"].sum())
    assert server.total("accepted_tokens_total") == sum(status["accepted_tokens"])
    assert status["dropped"] == {}


def test_trace_holds_what_a_policy_needs(server: SglangServer) -> None:
    with trace(server) as records:
        server.load(some_prompts(40, seed=3), 6)
    for record in records:
        assert record.invalid_reason() is None
        assert record.flags & 8 == 0, "every confidence is known"
        assert record.num_tokens == record.batch_size * (record.k + 1) == record.padded_tokens
        assert 0.0 < record.verify_s < record.step_s
        assert (record.draft_s > 0.0) == (record.k > 0)
        assert record.draft_extend_s > 0.0
        assert record.kv_tokens >= record.batch_size
    confidences = np.concatenate([r.confidences[:, 0] for r in records if r.k])
    accepted = np.concatenate([r.accept_len > 0 for r in records if r.k])
    assert len(np.unique(confidences)) > 20, "not SGLang's constant 1.0"
    assert accepted[confidences > 0.985].mean() > accepted[confidences < 0.8].mean() + 0.2, "and they say something"


def test_metrics_say_what_page_and_trace_say(server: SglangServer) -> None:
    server.control("pause")
    server.control("refit")
    time.sleep(1.0)
    status, metrics = server.status(), server.metrics()
    with PolicyPageReader.open(server.runtime_dir / PAGE_NAME, max_age_s=1e6) as page:
        policy = page.poll(time.monotonic_ns())
    assert policy is not None
    assert policy.version == status["policy_version"] == metrics["policy_version"][()]
    table = {int(b): k for b, k in status["k_by_batch_size"].items()}
    assert table == {b: policy.draft_length(b, 0) for b in table}
    assert {int(dict(labels)["batch_size"]): k for labels, k in metrics["policy_draft_tokens"].items()} == table
    assert sorted(metrics.get("tile_boundary_tokens", {}).values()) == status["boundaries"]
    assert metrics["calibration_error_ratio"][()] == status["calibration"]["ece"] < 0.1
    # What a trace of our own adds up to is what the metrics grew by.
    before = server.metrics()
    with trace(server) as records:
        server.load(some_prompts(30, seed=4), 6)
    server.settled()
    time.sleep(0.5)
    after = server.metrics()
    for stage in ("verify", "draft_extend", "step"):
        key = (("stage", stage),)
        grown = after["step_duration_seconds_sum"][key] - before["step_duration_seconds_sum"][key]
        assert grown == pytest.approx(sum(getattr(r, f"{stage}_s") for r in records), rel=1e-6), stage
    counted = after["decode_steps_total"][()] - before["decode_steps_total"][()]
    assert counted == len(records)
    for position in range(1, 6):
        key = (("position", str(position)),)
        grown = after["accepted_tokens_total"][key] - before["accepted_tokens_total"][key]
        assert grown == sum(int((r.accept_len >= position).sum()) for r in records), position
    server.control("resume")


def test_boundaries_and_calibration_are_those_of_the_trace(server: SglangServer, whole: RingTrace, tmp_path: Path) -> None:
    """All models computed anew from the records since the server's start, fitted where the sidecar says it did.

    Sweep, drifts, pins and refits by the clock are all in it. Sidecar and test have other builds of numpy, whose last digits
    may differ: hence one in a million, not equality.
    """
    _swept(server)
    with _pinned_in_turn(server):
        server.load(some_prompts(60, seed=6), 6)
    server.settled()
    server.control("refit")
    status, metrics = server.settled(), server.metrics()
    assert status["origin"] == "sweep"
    (tmp_path / "config.yaml").write_text(CONFIG)
    settings = load_settings(tmp_path / "config.yaml", {}).controller
    info, records, fitted = assert_models_are_those_of(whole, status, metrics, server.log.read_text(errors="replace"), settings)
    # Nor does another moment of the refits agree.
    late = [fit._replace(after=min(fit.after + 40, len(records))) for fit in fitted]
    assert any("calibration" in line for line in same_models(metrics, models_anew(records, late, info, settings), 1e-6))


def test_sweep_through_the_servers_own_api(server: SglangServer) -> None:
    """Batch sizes are held by so many streaming requests; every captured K is tried at each."""
    url = f"http://127.0.0.1:{server.port}"
    command = [sys.executable, "-m", "adaptive_spec.cli", "sweep", "--url", url, "--runtime-dir", str(server.runtime_dir)]
    with trace(server) as records:
        result = subprocess.run([*command, "--batch-sizes", "1,3,7"], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert "sweep finished: batch sizes 1, 3, 7" in result.stdout
    tried = {(r.batch_size, r.k) for r in records if r.flags & StepFlag.TRIAL}
    assert tried >= {(size, k) for size in (1, 3, 7) for k in CANDIDATES}
    assert {7, 14, 28, 42} <= {tokens for tokens, _, _ in server.status()["latency_points"]}
    assert all(answer.exact for answer in server.load(some_prompts(8), 4)), "the requests it left behind are gone"
    assert_one_line(
        run_cli("sweep", "--url", url, "--runtime-dir", server.runtime_dir, "--batch-sizes", "17"), "--batch-sizes", "1..16"
    )
    assert_one_line(run_cli("sweep", "--url", "http://127.0.0.1:1", "--runtime-dir", server.runtime_dir), "--url", "127.0.0.1:1")


def test_pinned(server: SglangServer) -> None:
    """With one K throughout SGLang's own count of proposed drafts is right too: equal to the token."""
    server.control("pin", "3")
    server.load(some_prompts(4, seed=1), 2)
    before = server.settled()
    with trace(server) as records:
        answers = server.load(some_prompts(40, seed=2), 5)
    assert {record.k for record in records} == {3}
    assert all(answer.exact for answer in answers)
    rows, verified, _ = _count(records)
    proposed = sum(answer.meta["spec_num_proposed_drafts"] for answer in answers)
    assert verified == proposed
    status = server.settled()
    assert sum(status["draft_tokens"]) - sum(before["draft_tokens"]) == verified == 3 * rows
    server.control("unpin")


def test_kill_9_of_the_sidecar(server: SglangServer) -> None:
    server.settled()
    steps = server.status()["decode_steps"]
    fallbacks = server.report()
    assert fallbacks is not None
    killed = threading.Event()

    def kill() -> None:
        time.sleep(1.0)
        server.kill_sidecar()
        killed.set()

    thread = threading.Thread(target=kill)
    thread.start()
    answers = server.load(some_prompts(150, seed=7), 8)
    thread.join()
    assert killed.is_set()
    assert all(answer.exact for answer in answers), "zero failed requests"
    status = server.wait_status(lambda s: s["engine_attached"] and s["decode_steps"] > 0, "another sidecar")
    assert status["origin"] == "checkpoint"
    assert status["decode_steps"] > 0.9 * steps
    server.load(some_prompts(8, seed=8), 4)
    report = server.report()
    assert report is not None
    assert report.counters["fallback_steps"] > fallbacks.counters["fallback_steps"], "the fallback, while there was no sidecar"
    assert server.wait(
        lambda: (
            server.metrics()["engine_events_total"].get((("event", "fallback_steps"),), 0) >= report.counters["fallback_steps"]
        ),
        "the metrics to say so",
    )
    assert "was restarted" in server.log.read_text(errors="replace")


def test_full_ring(server: SglangServer) -> None:
    """A sidecar that stands still: the ring is overwritten, the server does not notice."""
    server.wait_status(lambda s: s["mode"] in ("active", "sweep"), "the sidecar")
    pid = server.kill_sidecar(signal.SIGSTOP)
    try:
        answers = server.load(some_prompts(140, seed=9, regions="ef", tokens=(100, 140)), 8)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert all(answer.exact for answer in answers)
    status = server.wait_status(lambda s: s["dropped"].get("lost", 0) > 0, "the losses to be counted")
    assert server.metrics()["observations_dropped_total"][(("reason", "lost"),)] == status["dropped"]["lost"]


@pytest.mark.parametrize("how", ["in place", "replaced"])
def test_garbage_page(server: SglangServer, how: str) -> None:
    page = server.runtime_dir / PAGE_NAME
    noise = os.urandom(page.stat().st_size)
    report = server.report()
    assert report is not None

    def spoil(ended: threading.Event) -> None:
        while not ended.wait(0.4):
            if how == "in place":
                with page.open("r+b") as file:
                    file.write(noise)
            else:
                (page.parent / "noise").write_bytes(noise)
                (page.parent / "noise").replace(page)

    def refused() -> EngineReport | None:
        """Once the engine has met a spoiled page: the sidecar may put its own back first, and an idle engine reports nothing."""
        assert all(answer.exact for answer in server.load(some_prompts(30, seed=12), 8)), "zero failed requests"
        found = server.report()
        return found if found is not None and found.counters["page_failures"] > report.counters["page_failures"] else None

    with beside(spoil):
        answers = server.load(some_prompts(120, seed=11), 8)
        if how == "in place":
            server.wait(refused, "the page to be refused")
    assert all(answer.exact for answer in answers), "zero failed requests"
    server.load(some_prompts(30, seed=12), 4)
    found = server.wait(lambda: page.read_bytes() != noise and server.report(), "the sidecar's page to be back")
    assert found.counters["hook_failures"] == report.counters["hook_failures"]
    assert found.state == "attached"
    # A new sidecar makes a new page.
    server.kill_sidecar()
    server.wait_status(lambda s: s["engine_attached"] and s["mode"] in ("active", "sweep"), "another sidecar")
    server.load(some_prompts(30, seed=13), 4)
    server.wait(lambda: json.loads((server.runtime_dir / "engine.json").read_bytes())["counters"]["adoptions"] > 0, "a policy")


def test_sigterm_ends_everything(server: SglangServer, tmp_path: Path) -> None:
    sidecar, engine = int(server.sidecar["pid"]), int(server.status()["engine_pid"])
    server.process.send_signal(signal.SIGTERM)
    status = server.process.wait(60)
    assert status == 0, server.log_tail()
    for pid in (sidecar, engine):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_what_to_capture_follows_from_the_profile(server: SglangServer, tmp_path: Path) -> None:
    """The file that `candidates` writes is read by SGLang's own loader."""
    folder = next(server.profile_dir.iterdir())
    out = tmp_path / "adaptive.json"
    result = run_cli("candidates", folder, "--states", "3", "--out", out, "--json")
    assert result.returncode == 0, result.stderr
    states = json.loads(result.stdout)["states"]
    code = (
        "import sys; from sglang.srt.speculative.adaptive_spec_params import resolve_candidate_steps_from_config as r;"
        f"print('states', r({str(out)!r}), file=sys.stderr)"
    )
    loaded = subprocess.run(server.kit.command("python", "-c", code), capture_output=True, text=True, timeout=120, check=True)
    assert f"states {states}" in loaded.stderr
