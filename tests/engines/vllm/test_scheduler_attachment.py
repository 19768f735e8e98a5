"""The scheduler's hooks on a stand-in scheduler; `test_in_process` has the real one."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from adaptive_spec.domain.policy import Granularity, Mode, Policy, Trial
from adaptive_spec.domain.step_record import StepFlag
from adaptive_spec.domain.survival import GRID_POINTS, SurvivalMap
from adaptive_spec.engine_side.tap import PAGE_NAME, RING_NAME
from adaptive_spec.engines.common.hook_guard import FAILURES_IN_A_ROW, Guard
from adaptive_spec.engines.common.plugin_settings import PluginSettings
from adaptive_spec.engines.vllm.step_notes import STEP_ATTRIBUTE
from adaptive_spec.wire.engine_report import read_report
from adaptive_spec.wire.policy_page import PolicyPage, payload_bytes
from adaptive_spec.wire.ring import RingReader
from tests.engines.vllm.stand_in import Engine, K, Output, Request, Scheduler

LAUNCH = [0, 5, 5, 5, 4, 3, 2, 1, 0]


def policy(k: int, version: int = 1, mode: Mode = Mode.ACTIVE, trials: tuple[Trial, ...] = (), token_s: float = 0.0) -> Policy:
    """K everywhere; survival is the confidence itself; each verified token costs token_s."""
    logits = np.linspace(-10.0, 10.0, GRID_POINTS)
    identity = np.tile(1.0 / (1.0 + np.exp(-logits)), (K, 1)).astype(np.float32)
    verify = (0.001 + token_s * np.arange(8 * (K + 1) + 1)).astype(np.float32)
    return Policy(
        version, mode, mode is not Mode.SHADOW, Granularity.REQUEST, K, np.full((9, 1), k, np.uint8), np.zeros(0, np.float32),
        np.full((K + 1, 9), 0.001, np.float32), verify, 0.0, SurvivalMap(identity, True), mode is Mode.PINNED, trials,
    )  # fmt: skip


class Sidecar:
    def __init__(self, folder: Path) -> None:
        self._page = PolicyPage.create_or_open(folder / PAGE_NAME, payload_bytes(8, K))

    def publish(self, published: Policy, now_ns: int | None = None) -> None:
        self._page.publish(published)
        self._page.heartbeat(time.monotonic_ns() if now_ns is None else now_ns)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "run"
    made.mkdir(mode=0o700)
    return made


def engine(folder: Path, requests: int = 3, mode: Any = "active", guard: Guard | None = None, **changes: Any) -> Engine:
    scheduler = Scheduler([Request(f"r{i}") for i in range(requests)], **changes)
    return Engine(PluginSettings(mode=mode, runtime_dir=folder), scheduler, guard)


def run(vllm: Engine, steps: int) -> list[Output]:
    return [vllm.step() for _ in range(steps)]


def test_k_of_the_policy_is_drafted_at_once_and_verified_a_step_later(folder: Path) -> None:
    vllm, sidecar = engine(folder), Sidecar(folder)
    ring = RingReader.open(folder / RING_NAME)
    sidecar.publish(policy(2))
    outputs = run(vllm, 4)
    assert [o.num_spec_tokens_to_schedule for o in outputs] == [2, 2, 2, 2]
    assert [sum(map(len, o.scheduled_spec_decode_tokens.values())) for o in outputs] == [0, 6, 6, 6]
    found = ring.poll(10)
    assert [r.k for r in found] == [2, 2, 2]
    assert all(r.batch_size == 3 and r.num_tokens == 9 and r.policy_version == 1 and r.flags == 0 for r in found)
    assert found[0].draft_s == pytest.approx(0.002)
    assert found[0].verify_s == pytest.approx(0.004)
    assert (found[0].confidences == np.float32(0.5)).all()


def test_a_record_has_the_drafting_of_its_own_drafts(folder: Path) -> None:
    vllm, sidecar = engine(folder), Sidecar(folder)
    ring = RingReader.open(folder / RING_NAME)
    sidecar.publish(policy(1))
    run(vllm, 2)
    sidecar.publish(policy(4, 2))
    run(vllm, 3)
    found = ring.poll(10)
    assert [(r.k, r.policy_version) for r in found] == [(1, 1), (1, 1), (4, 2), (4, 2)]
    assert [r.draft_s for r in found] == pytest.approx([0.001, 0.001, 0.004, 0.004])


def test_prefills_do_not_change_k_and_disturb_the_step_and_its_drafts(folder: Path) -> None:
    vllm, sidecar = engine(folder, requests=2), Sidecar(folder)
    ring = RingReader.open(folder / RING_NAME)
    by_size = policy(3)
    by_size.k_table[:] = np.array([[0], [5], [4], [1], [1], [1], [1], [1], [1]], np.uint8)
    sidecar.publish(by_size)
    run(vllm, 3)
    vllm.scheduler.running += [Request(f"p{i}", is_prefill_chunk=True) for i in range(3)]
    vllm.scheduler.requests |= {r.request_id: r for r in vllm.scheduler.running}
    assert vllm.step().num_spec_tokens_to_schedule == 4, "2 requests decode, whatever else is scheduled"
    vllm.scheduler.running = vllm.scheduler.running[:2]
    run(vllm, 3)
    flags = [r.flags & StepFlag.DISTURBED for r in ring.poll(10)]
    assert [bool(f) for f in flags] == [False, False, True, True, False, False]


def test_drafts_of_unsure_requests_are_cut_and_the_list_that_all_share_stays(folder: Path) -> None:
    vllm, sidecar = engine(folder), Sidecar(folder)
    ring = RingReader.open(folder / RING_NAME)
    vllm.confidences = {"r0": 0.99, "r1": 0.02, "r2": 0.99}
    sidecar.publish(policy(4, token_s=0.002))
    vllm.step()
    shared = [-1] * 4
    for request in vllm.scheduler.running:
        request.spec_token_ids = shared
    output = vllm.schedule()
    lengths = {r: len(ids) for r, ids in output.scheduled_spec_decode_tokens.items()}
    assert lengths["r0"] == lengths["r2"] == 4
    assert "r1" not in lengths
    assert shared == [-1] * 4
    vllm.result(output)
    vllm.draft(output)
    run(vllm, 1)
    [record] = ring.poll(1)
    assert record.verify_len.tolist() == [4, 0, 4]
    assert record.k == 4


def test_without_confidences_the_history_of_each_request_decides_and_a_cut_one_is_tried_again(folder: Path) -> None:
    vllm, sidecar = engine(folder, requests=2), Sidecar(folder)
    vllm.accepts = {"r0": 4}
    sidecar.publish(policy(4, token_s=0.001))
    widths: list[int] = []
    for _ in range(300):
        output = vllm.schedule()
        widths.append(len(output.scheduled_spec_decode_tokens.get("r1", ())))
        vllm.confidences = {"r0": 0.0, "r1": 0.0}
        vllm.result(output)
        vllm.draft(output)
    late = widths[100:]
    assert 0 in late, "its drafts are never accepted"
    assert max(late) > 0, "it is tried again now and then"
    assert np.mean(late) < 2.0


def test_a_trial_verifies_every_draft_and_loses_its_mark_in_another_batch(folder: Path) -> None:
    vllm, sidecar = engine(folder), Sidecar(folder)
    ring = RingReader.open(folder / RING_NAME)
    vllm.confidences = {"r0": 0.01, "r1": 0.01, "r2": 0.01}
    sidecar.publish(policy(4, mode=Mode.SWEEP, trials=(Trial(3, 2, 0, 3),), token_s=0.01))
    run(vllm, 3)
    vllm.scheduler.running.pop()
    run(vllm, 3)
    found = ring.poll(10)
    assert [(r.k, r.batch_size, bool(r.flags & StepFlag.TRIAL)) for r in found][:3] == [(2, 3, True), (2, 3, True), (2, 2, False)]
    assert all((r.verify_len == r.k).all() for r in found[:3])


def test_fallback_and_shadow_put_the_launch_schedule_back(folder: Path) -> None:
    vllm, sidecar = engine(folder), Sidecar(folder)
    sidecar.publish(policy(2))
    run(vllm, 2)
    assert vllm.scheduler.dynamic_sd_lookup == [2] * 9
    sidecar.publish(policy(2, 2, Mode.SHADOW))
    run(vllm, 1)
    assert vllm.scheduler.dynamic_sd_lookup == LAUNCH
    sidecar.publish(policy(1, 3))
    run(vllm, 1)
    assert vllm.scheduler.dynamic_sd_lookup == [1] * 9
    sidecar.publish(policy(1, 4), now_ns=1)  # a heartbeat of long ago
    outputs = run(vllm, 2)
    assert vllm.scheduler.dynamic_sd_lookup == LAUNCH
    assert outputs[-1].num_spec_tokens_to_schedule == 5


def test_mode_shadow_changes_nothing(folder: Path) -> None:
    vllm, sidecar = engine(folder, mode="shadow"), Sidecar(folder)
    vllm.confidences = {"r0": 0.01}
    sidecar.publish(policy(2, token_s=0.01))
    outputs = run(vllm, 3)
    assert [o.num_spec_tokens_to_schedule for o in outputs] == [5, 5, 5]
    assert all(len(ids) == 5 for ids in outputs[-1].scheduled_spec_decode_tokens.values())


def test_detaching_puts_the_launch_schedule_back_and_is_reported(folder: Path) -> None:
    guard = Guard("vLLM", f"results:{FAILURES_IN_A_ROW}")
    vllm, sidecar = engine(folder, guard=guard), Sidecar(folder)
    sidecar.publish(policy(2))
    run(vllm, FAILURES_IN_A_ROW + 1)
    assert vllm.scheduler.dynamic_sd_lookup == LAUNCH
    report = read_report(folder)
    assert report is not None
    assert (report.state, report.level) == ("detached", 0)
    assert "results failed 8 times in a row" in report.reason


def test_zeros_drafted_near_max_model_len_are_no_acceptance(folder: Path) -> None:
    vllm, sidecar = engine(folder), Sidecar(folder)
    ring = RingReader.open(folder / RING_NAME)
    sidecar.publish(policy(2, mode=Mode.PINNED))
    run(vllm, 2)
    vllm.drafts = False  # from now on zeros, as wide as the largest K
    run(vllm, 3)
    found = ring.poll(10)
    censored = int(StepFlag.CENSORED | StepFlag.DISTURBED)
    assert [r.flags & censored for r in found] == [0, 0, censored, censored][: len(found)]
    assert [r.k for r in found][-1] == K


def test_zeros_as_wide_as_k_are_known_by_the_step_that_drafted_nothing(folder: Path) -> None:
    vllm = engine(folder)
    ring = RingReader.open(folder / RING_NAME)
    run(vllm, 2)
    vllm.drafts = False
    run(vllm, 3)
    assert [bool(r.flags & StepFlag.CENSORED) for r in ring.poll(10)][-1]


def test_results_of_aborted_requests_are_left_out(folder: Path) -> None:
    vllm = engine(folder)
    ring = RingReader.open(folder / RING_NAME)
    run(vllm, 2)
    output = vllm.schedule()
    vllm.scheduler.requests["r1"].finished = True
    del vllm.scheduler.requests["r2"]
    vllm.result(output)
    vllm.scheduler.running = vllm.scheduler.running[:1]
    vllm.draft(output)
    run(vllm, 2)
    assert [len(r.verify_len) for r in ring.poll(10)][1] == 1


def test_asynchronous_steps_are_matched_with_their_own_results_and_notes(folder: Path) -> None:
    vllm, sidecar = engine(folder), Sidecar(folder)
    ring = RingReader.open(folder / RING_NAME)
    before: Output | None = None
    for step in range(8):
        sidecar.publish(policy(1 + step % 4, step + 1, Mode.PINNED))
        output = vllm.schedule()
        vllm.draft(output, placeholder=True)
        if before is not None:
            vllm.result(before)
        before = output
    found = ring.poll(20)
    assert len(found) >= 4
    assert [r.k for r in found] == [1 + (r.policy_version - 1) % 4 for r in found]
    assert [r.draft_s for r in found[1:]] == pytest.approx([0.001 * r.k for r in found[1:]])
    assert all((r.confidences == np.float32(0.5)).all() for r in found[1:])


@pytest.mark.parametrize(("kind", "flagged"), [("logprobs", True), ("grammar", True), ("plain", False)])
def test_log_probabilities_and_grammars_disturb(folder: Path, kind: str, flagged: bool) -> None:
    vllm = engine(folder)
    ring = RingReader.open(folder / RING_NAME)
    request = vllm.scheduler.running[0]
    request.use_structured_output = kind == "grammar"
    request.sampling_params = SimpleNamespace(logprobs=2 if kind == "logprobs" else None, prompt_logprobs=None)
    run(vllm, 4)
    assert {bool(r.flags & StepFlag.DISTURBED) for r in ring.poll(10)} == {flagged}


def test_a_worker_that_measures_nothing_leaves_whole_steps(folder: Path) -> None:
    vllm = engine(folder)
    ring = RingReader.open(folder / RING_NAME)
    for _ in range(4):
        vllm.step(noted=False)
    found = ring.poll(10)
    assert found
    assert all(r.flags & StepFlag.WHOLE for r in found)
    report = read_report(folder)
    assert report is not None
    assert report.level == 1


def test_where_vllm_trims_drafts_itself_the_tokens_are_those_it_verified(folder: Path) -> None:
    vllm = engine(folder, speculative_config=SimpleNamespace(enable_adaptive_verification=True))
    ring = RingReader.open(folder / RING_NAME)
    vllm.trims = 7
    run(vllm, 3)
    vllm.trims = None
    vllm.step(noted=False)
    found = ring.poll(10)
    vllm.step(noted=False)
    found += ring.poll(10)
    wanted = int(StepFlag.CENSORED | StepFlag.WHOLE | StepFlag.FALLBACK)
    assert [(r.num_tokens, r.flags) for r in found[:2]] == [(7, wanted)] * 2, "not the 18 that were scheduled"
    assert found[-1].flags & StepFlag.DISTURBED, "how many were verified is not known"
    assert all(r.invalid_reason() is None for r in found)


def test_preempted_requests_are_counted(folder: Path) -> None:
    vllm = engine(folder)
    schedule = vllm.scheduler.schedule

    def preempting() -> Output:
        output = schedule()
        output.preempted_req_ids = {"r8", "r9"}
        return output

    vllm.scheduler.schedule = preempting  # type: ignore[method-assign]  # one step's schedule, as vLLM returns it
    run(vllm, 2)
    assert vllm.attachment.preemptions == 4


def test_a_step_with_nothing_scheduled_is_no_step(folder: Path) -> None:
    vllm = engine(folder)
    run(vllm, 2)
    vllm.scheduler.running, running = [], vllm.scheduler.running
    assert STEP_ATTRIBUTE not in vllm.schedule().__dict__
    vllm.scheduler.running = running
    run(vllm, 2)


def _parallel(size: int, index: int) -> SimpleNamespace:
    return SimpleNamespace(data_parallel_size=size, data_parallel_index=index, tensor_parallel_size=1)


@pytest.mark.parametrize(
    ("changes", "state", "words"),
    [
        ({"parallel_config": _parallel(2, 0)}, "refused", "data parallelism"),
        ({"parallel_config": _parallel(1, 1)}, "refused", "data parallelism"),
        ({"speculative_config": None}, "refused", "does not speculate"),
        ({"lookup": []}, "observing", "no schedule of K"),
        ({"speculative_config": SimpleNamespace(enable_adaptive_verification=True)}, "observing", "adaptive verification"),
    ],
)
def test_servers_that_are_refused_or_observed(folder: Path, changes: dict[str, Any], state: str, words: str) -> None:
    vllm = engine(folder, **changes)
    report = read_report(folder)
    assert report is not None
    assert report.state == state
    assert words in report.reason
    run(vllm, 3)
    assert (folder / RING_NAME).exists() == (state == "observing")
