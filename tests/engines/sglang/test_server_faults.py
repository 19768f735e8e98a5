"""A fault of ours in every hook of a real server: it keeps answering, falls back, and says so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from adaptive_spec.domain.step_record import StepFlag
from adaptive_spec.engines.common.hook_guard import FAILURES_IN_A_ROW, FAULT_VARIABLE, ONCE
from adaptive_spec.engines.sglang import contract
from adaptive_spec.engines.sglang.cpu_kit import CpuKit
from tests.engines.sglang.server import SglangServer, some_prompts, trace

pytestmark = [pytest.mark.server, pytest.mark.nightly]

STEPPING = [need.hook for group in contract.LEVELS for need in contract.hooks_of(group) if need.hook not in ONCE | {"switch"}]
"""Called in every step; `switch` is called at a switch of K only."""


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("faults") / "faults"
    file.write_text("")
    return file


@pytest.fixture(scope="module")
def server(kit: CpuKit, faults: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SglangServer]:
    environment = {FAULT_VARIABLE: f"@{faults}"}
    with SglangServer(tmp_path_factory.mktemp("server"), environment=environment) as server:
        server.wait_status(lambda s: s["engine_attached"], "the sidecar to attach")
        yield server


@pytest.mark.parametrize("half", ["", "/after"])
@pytest.mark.parametrize("hook", STEPPING)
def test_a_few_faults(server: SglangServer, faults: Path, hook: str, half: str) -> None:
    """Some steps go unrecorded or run the launch K; every request is answered, and it goes on as before."""
    before = server.report()
    assert before is not None
    server.control("pin", "1")
    times = FAILURES_IN_A_ROW - 1
    (faults.parent / "next").write_text(f"{hook}{half}:{times}")
    (faults.parent / "next").replace(faults)
    answers = server.load(some_prompts(12, seed=1, tokens=(40, 60)), 4)
    assert all(answer.exact for answer in answers)
    with trace(server) as records:
        answers = server.load(some_prompts(12, seed=2, tokens=(40, 60)), 4)
    assert all(answer.exact for answer in answers)
    assert {record.k for record in records} == {1}, "as if nothing had been"
    wanted = before.failures.get(hook, 0) + times
    # The server writes its report now and then while it decodes: on a quick machine the load above may end too soon for it.
    report = server.wait(
        lambda: server.load(some_prompts(1, seed=2), 1) and (r := server.report()) and r.failures.get(hook) == wanted and r,
        "the report to say so",
    )
    assert report.state == "attached"
    server.wait(lambda: server.metrics()["engine_failures_total"].get((("hook", hook),)) == wanted, "the metrics to say so")


def test_a_level_is_lost(server: SglangServer, faults: Path) -> None:
    """Stage times fail for good: K is still decided, and records have the time of the whole step."""
    server.control("pin", "1")
    (faults.parent / "next").write_text("verify")
    (faults.parent / "next").replace(faults)
    server.load(some_prompts(12, seed=3), 4)
    with trace(server) as records:
        answers = server.load(some_prompts(12, seed=4), 4)
    assert all(answer.exact for answer in answers)
    assert {record.k for record in records} == {1}
    assert all(record.flags & StepFlag.WHOLE and record.verify_s > 0.0 == record.draft_s for record in records)
    report = server.report()
    assert report is not None
    assert (report.state, report.level) == ("attached", 1)
    server.wait(lambda: server.metrics()["engine_level"] == {(): 1.0}, "the metrics to say so")


def test_faults_without_end(server: SglangServer, faults: Path) -> None:
    """The plugin detaches: SGLang's own policy decides K; report, metrics and log say so."""
    server.control("pin", "1")
    (faults.parent / "next").write_text("results")
    (faults.parent / "next").replace(faults)
    answers = server.load(some_prompts(24, seed=3), 6)
    assert all(answer.exact for answer in answers)
    report = server.report()
    assert report is not None
    assert (report.state, report.reason) == ("detached", f"hook results failed {FAILURES_IN_A_ROW} times in a row")
    status = server.wait_status(lambda s: not s["engine_attached"], "the sidecar to see it")
    assert status["engine_report"]["reason"] == report.reason
    assert server.metrics()["engine_attached"] == {(): 0.0}
    freed = [server.generate(prompt, 60) for prompt, _ in some_prompts(4, seed=4, regions="a")]
    assert all(answer.exact for answer in freed)
    # Region a accepts everything, so SGLang's policy raises K above the pinned 1, at which 2 tokens come in a step.
    assert 60 / freed[-1].meta["spec_verify_ct"] > 2.5
    assert "Adaptive spec params updated" in server.log.read_text(errors="replace")
    assert "detached" in server.log.read_text(errors="replace")


@pytest.mark.parametrize("fault", ["worker", "controller", "attach", "attach/after"])
def test_faults_at_the_start(kit: CpuKit, tmp_path: Path, fault: str) -> None:
    """SGLang's own adaptive policy stays in charge."""
    with SglangServer(tmp_path, environment={FAULT_VARIABLE: fault}) as server:
        answers = server.load(some_prompts(24, seed=3), 6)
        assert all(answer.exact for answer in answers)
        hook = fault.partition("/")[0]
        report = server.wait(lambda: (r := server.report()) and r.failures.get(hook) and r, "the report")
        assert report.failures[hook] == 1
        server.wait(lambda: server.metrics().get("engine_failures_total", {}).get((("hook", hook),)) == 1.0, "the metrics")
        assert (report.state, report.reason) == ("detached", f"hook {hook} failed while the server started")
        assert server.metrics()["engine_attached"] == {(): 0.0}
        log = server.log.read_text(errors="replace")
        assert "fault injected" in log
        assert "Adaptive spec params updated" in log, "SGLang's own policy decides"
