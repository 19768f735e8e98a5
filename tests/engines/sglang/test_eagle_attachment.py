"""Ranks in one process, one after another: whatever fails on one of them, all draft the same K."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from adaptive_spec.domain.policy import Mode, Trial
from adaptive_spec.domain.step_record import UNKNOWN_CONFIDENCE, StepFlag
from adaptive_spec.engine_side.tap import PAGE_NAME, RING_NAME
from adaptive_spec.engines.common.hook_guard import FAILURES_IN_A_ROW
from adaptive_spec.engines.sglang.attachment import STEP_ATTRIBUTE, Place
from adaptive_spec.engines.sglang.eagle_attachment import SKIP_EXTEND_VARIABLE, STALE_STEPS
from adaptive_spec.wire.engine_report import read_report
from adaptive_spec.wire.policy_page import PolicyPage, payload_bytes
from adaptive_spec.wire.ring import RingReader
from tests.engines.sglang.eagle_rank import LAUNCH_K, STOCK_K, Board, EagleRank, Stock, loop
from tests.engines.sglang.rank_policies import CANDIDATES, MAX_BATCH, MAX_K, random_policy
from tests.engines.sglang.slots import Slots

RANKS = 3


def _rank(folder: Path, **options: Any) -> EagleRank:
    """One rank alone."""
    return EagleRank(Place(0, 1), folder, **options)


def _together(folder: Path, change: dict[int, dict[str, Any]] | None = None, **options: Any) -> tuple[list[EagleRank], Board]:
    """Several ranks, attached. change: options of one rank."""
    board = Board(RANKS)
    ranks = [EagleRank(Place(i, RANKS), folder, **{**options, **(change or {}).get(i, {})}) for i in range(RANKS)]
    for rank in ranks:
        rank.attach(board)
    return ranks, board


def _run(ranks: list[EagleRank], loops: int, seed: int) -> list[int]:
    """K of every step, equal on all ranks: a forward with two K would not end."""
    dice, found = random.Random(seed), []
    for _ in range(loops):
        loop(ranks, [object()])
        rows, kv_tokens = dice.randint(1, MAX_BATCH), dice.randint(1, 10_000)
        ks = [rank.step(rows, kv_tokens) for rank in ranks]
        assert ks == ks[:1] * len(ranks)
        found.append(ks[0])
    return found


def _steps(rank: EagleRank, count: int, seed: int) -> list[int]:
    dice = random.Random(seed)
    return [rank.step(dice.randint(1, MAX_BATCH), dice.randint(1, 10_000)) for _ in range(count)]


@pytest.fixture
def page(tmp_path: Path) -> Any:
    with PolicyPage.create_or_open(tmp_path / PAGE_NAME, payload_bytes(MAX_BATCH, MAX_K)) as page:
        policy = random_policy(1, random.Random(3))
        assert policy.acting
        page.publish(policy)
        page.heartbeat(time.monotonic_ns())
        yield page


def test_all_ranks_draft_alike(tmp_path: Path, page: PolicyPage) -> None:
    ranks, _ = _together(tmp_path)
    found = _run(ranks, 60, 1)
    assert len(set(found)) > 1
    assert not any(rank.guard.failures for rank in ranks)
    report = read_report(tmp_path)
    assert report is not None
    assert report.state == "attached"
    assert all(rank.attachment._history is None for rank in ranks), "no floats of one's own decide among ranks"


HOOKS = ("step", "step/after", "results", "results/after", "broadcast")


@pytest.mark.parametrize("fallback", ["stock", "launch"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_that_fails_on_one_rank_takes_all_back(
    tmp_path: Path, page: PolicyPage, rank: int, hook: str, fallback: str
) -> None:
    """From the middle of a run on; the same K in every step."""
    faults = tmp_path / "faults"
    faults.write_text("")
    ranks, _ = _together(tmp_path, {rank: {"faults": f"@{faults}"}}, fallback=fallback)
    before = _run(ranks, 30, 2)
    assert len(set(before)) > 1
    faults.write_text(hook)
    after = _run(ranks, 30, 3)
    if hook == "broadcast" and rank:
        assert len(set(after)) > 1, "only rank 0 reads the page"
        return
    assert set(after[15:]) == {{"stock": STOCK_K, "launch": LAUNCH_K}[fallback]}
    assert all(one.attachment._steering is not None and one.attachment._steering.left for one in ranks)
    report = read_report(tmp_path)
    assert report is not None
    assert report.state == ("observing" if rank or hook == "broadcast" else "detached")
    assert report.failures["ranks"] == 1
    assert (f"rank {rank}" if rank or hook == "broadcast" else hook.partition("/")[0]) in report.reason


def test_one_failure_of_the_decision_itself_makes_all_leave(tmp_path: Path, page: PolicyPage) -> None:
    """What nobody foresaw. Only of that one step can it not be said that all ranks ran the same K."""
    ranks, _ = _together(tmp_path)
    _run(ranks, 30, 2)
    tap = ranks[1].attachment._tap
    assert tap is not None
    planner, tap.planner = tap.planner, None  # type: ignore[assignment]
    for rank in ranks:
        rank.step(4, 100)
    tap.planner = planner
    assert set(_run(ranks, 10, 3)) == {STOCK_K}
    assert all(rank.attachment._steering is not None and "RuntimeError" in rank.attachment._steering.left for rank in ranks)


@pytest.mark.parametrize("fallback", ["stock", "launch"])
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("fault", ["controller", "attach", "attach/after", "attach/ranks"])
def test_a_rank_that_cannot_attach_leaves_all_to_sglang(
    tmp_path: Path, page: PolicyPage, fault: str, rank: int, fallback: str
) -> None:
    ranks, _ = _together(tmp_path, {rank: {"faults": fault}}, fallback=fallback)
    assert all(one.captured for one in ranks)
    assert _run(ranks, 30, 4) == [STOCK_K] * 30, "SGLang's own policy"
    assert not any(one.attachment._steering and one.attachment._steering.steers for one in ranks)


@pytest.mark.parametrize("change", [{"mode": "shadow"}, {"fallback": "launch"}])
def test_ranks_told_different_things_leave_all_to_sglang(tmp_path: Path, page: PolicyPage, change: dict[str, Any]) -> None:
    ranks, _ = _together(tmp_path, {1: change})
    assert _run(ranks, 30, 4) == [STOCK_K] * 30


def test_a_rank_without_the_plugin_leaves_all_to_sglang(tmp_path: Path, page: PolicyPage) -> None:
    """Nothing waits for it, and nothing that it could not read is sent to it."""
    board = Board(RANKS)
    ranks = [EagleRank(Place(i, RANKS), tmp_path, timeout_s=1) for i in range(RANKS - 1)]
    for rank in ranks:
        rank.attach(board)
    sent: list[Any] = []
    for second in range(30):
        for rank in ranks[:1]:
            assert rank.attachment._steering is not None
            rank.attachment._steering._looked_s = -1e9
            rank.attachment.broadcast(lambda receiver, given: sent.extend(given), None, [second])
    assert sent == list(range(30))
    report = read_report(tmp_path)
    assert report is not None
    assert report.state == "observing"
    assert "rank 2 did not answer within 1 s" in report.reason


@pytest.mark.parametrize("options", [{"mode": "shadow"}, {"candidates": (LAUNCH_K,)}])
def test_without_a_k_to_decide_the_ranks_exchange_nothing(tmp_path: Path, page: PolicyPage, options: dict[str, Any]) -> None:
    ranks, board = _together(tmp_path, **options)
    sent: list[Any] = []
    for rank in ranks:
        rank.attachment.broadcast(lambda receiver, given: sent.extend(given or ()), None, [] if rank.place.rank == 0 else None)
    _run(ranks, 30, 5)
    assert board.calls == 0
    assert not sent


def test_a_single_rank_attaches_without_a_group(tmp_path: Path, page: PolicyPage) -> None:
    rank = _rank(tmp_path)
    rank.attach()
    assert rank.guard.closed is None
    assert rank.attachment._history is not None
    found = _steps(rank, 60, 5)
    assert set(found) <= set(CANDIDATES)
    assert len(set(found)) > 1
    rank.guard.close("enough")
    assert _steps(rank, 10, 6) == [1] * 10, "SGLang's own policy"


@pytest.mark.parametrize(("fallback", "k"), [("stock", 1), ("launch", 3)])
def test_without_a_policy_that_acts_the_fallback_decides(tmp_path: Path, fallback: str, k: int) -> None:
    rank = _rank(tmp_path, fallback=fallback)
    rank.attach()
    assert _steps(rank, 5, 5) == [k] * 5, "no sidecar"
    with PolicyPage.create_or_open(tmp_path / PAGE_NAME, payload_bytes(MAX_BATCH, MAX_K)) as page:
        page.publish(replace(random_policy(1, random.Random(3)), acting=False))
        page.heartbeat(time.monotonic_ns())
        assert _steps(rank, 100, 5) == [k] * 100, "a policy that does not act"
        page.publish(replace(random_policy(2, random.Random(3)), acting=True))
        assert len(set(_steps(rank, 100, 5))) > 1, "one that acts"
    assert not rank.guard.failures


def test_a_step_that_cannot_be_as_asked_is_limited_and_no_trial(tmp_path: Path) -> None:
    """K 5 is captured, and not listed from 5 requests on."""
    rank = _rank(tmp_path, stock=Slots({1: [1, 3, 5], 5: [0, 1]}))
    rank.policy.set_cuda_graph_bs(None)
    rank.attach()
    attachment = rank.attachment
    assert attachment._tap is not None
    assert attachment._tap.info.allowed_from == ((1, (1, 3, 5)), (5, (0, 1, 3)))
    policy = replace(random_policy(1, random.Random(3)), mode=Mode.ACTIVE, acting=True, trials=(Trial(0, 5, 0, 4),))
    policy.k_table[:] = 5
    with PolicyPage.create_or_open(tmp_path / PAGE_NAME, payload_bytes(MAX_BATCH, MAX_K)) as page:
        page.publish(policy)
        page.heartbeat(time.monotonic_ns())
        seen = []
        for rows in (2, 6, 2, 6, 6, 2):
            ran = rank.step(rows, 100, lambda k: setattr(rank.worker, "speculative_num_steps", k))
            seen.append((ran, StepFlag(rank.last_begun.flags)))
    limited, trial = StepFlag.LIMITED, StepFlag.TRIAL
    assert seen == [(5, trial), (3, limited), (5, trial), (3, limited), (3, limited), (5, trial)], (
        "a limited step is none of the trial"
    )
    # A worker that ran something else, whatever the reason.
    rank.step(2, 100, lambda k: setattr(rank.worker, "speculative_num_steps", 1))
    assert rank.last_begun.flags == StepFlag.LIMITED
    assert not rank.guard.failures


def test_a_controller_that_does_not_ask_the_plugin_is_noticed(tmp_path: Path, page: PolicyPage) -> None:
    """A subclass with a constructor of its own, which does not call the hooked one."""

    class OwnController(SimpleNamespace): ...

    rank = _rank(tmp_path)
    rank.worker.adaptive_controller = OwnController(_states=dict.fromkeys(CANDIDATES), params=Stock())
    rank.attach()
    report = read_report(tmp_path)
    assert report is not None
    assert (report.state, report.reason) == ("observing", "SGLang's OwnController does not ask the plugin's policy for K")
    rank.step(2, 100)
    assert rank.last_begun.policy_version == 0


def test_a_step_that_waits_on_the_host_is_disturbed(tmp_path: Path) -> None:
    rank = _rank(tmp_path)
    rank.attach()
    rank.step(2, 100)
    assert rank.last.flags == 0
    for what in ("grammar", "hidden_states"):
        setattr(rank, what, True)
        rank.step(2, 100)
        assert rank.last.flags == StepFlag.DISTURBED
        setattr(rank, what, False)


@pytest.mark.parametrize("skips", [True, False])
def test_drafts_after_skipped_ones_teach_no_acceptance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skips: bool) -> None:
    monkeypatch.setenv(SKIP_EXTEND_VARIABLE, str(skips).lower())
    rank = _rank(tmp_path)
    rank.attach()
    flagged = []
    for k in (3, 0, 0, *[3] * (STALE_STEPS + 2)):
        rank.step(2, 100, lambda _, k=k: setattr(rank.worker, "speculative_num_steps", k))  # type: ignore[misc]  # k of this round
        flagged.append(bool(rank.last.flags & StepFlag.CENSORED))
    assert flagged == [False, False, False, *[skips] * STALE_STEPS, False, False]


def _levels(rank: EagleRank) -> int | None:
    report = read_report(rank.attachment._settings.runtime_dir)
    assert report is not None
    return report.level


def test_each_level_fails_alone(tmp_path: Path, page: PolicyPage, caplog: pytest.LogCaptureFixture) -> None:
    rank = _rank(tmp_path)
    rank.attach()
    attachment, guard = rank.attachment, rank.guard
    assert _levels(rank) == 3
    assert attachment._confidences is not None
    for _ in range(FAILURES_IN_A_ROW):
        guard.part("confidences", lambda: {"a": 1}["x"])
    assert (_levels(rank), attachment._confidences) == (2, None)
    verify = guard.around("verify", lambda *_: {"a": 1}["x"], None)
    for _ in range(FAILURES_IN_A_ROW):
        verify(lambda: None)
    assert _levels(rank) == 1
    assert guard.closed is None
    caplog.clear()
    verify(lambda: None)
    assert not caplog.records, "one line for each level"
    assert guard.failures == {"confidences": FAILURES_IN_A_ROW, "verify": FAILURES_IN_A_ROW}
    results = guard.around("results", attachment.results_before, attachment.results_after)
    rank.step(2, 100)
    rank.last.ended = attachment._clock.now()
    result = SimpleNamespace(num_correct_drafts_per_req_cpu=[1, 2])
    setattr(result, STEP_ATTRIBUTE, rank.last)
    requests = [SimpleNamespace(is_retracted=False, finished=lambda: False)] * 2
    results(lambda *_: [], None, result, SimpleNamespace(reqs=requests))
    with RingReader.open(tmp_path / RING_NAME) as ring:
        [record] = ring.poll(8)
    assert record.flags & StepFlag.WHOLE
    assert not record.flags & StepFlag.DISTURBED
    assert (record.draft_s, record.draft_extend_s) == (0.0, 0.0)
    assert 0.0 < record.verify_s <= record.step_s
    guard.close("no more")
    assert _levels(rank) == 0


def test_results_reach_the_ring_with_their_own_step(tmp_path: Path, page: PolicyPage) -> None:
    rank = _rank(tmp_path)
    rank.attach()
    attachment, guard = rank.attachment, rank.guard
    verify = guard.around("verify", attachment.verify_before, attachment.verify_after)
    results = guard.around("results", attachment.results_before, attachment.results_after)
    mode = SimpleNamespace(is_extend=lambda: False, is_idle=lambda: False)
    requests = [SimpleNamespace(rid=f"r{i}", is_retracted=False, finished=lambda i=i: i == 1) for i in range(3)]
    batch = SimpleNamespace(
        forward_mode=mode, is_extend_in_batch=False, reqs=requests, seq_lens_sum=60, spec_info=SimpleNamespace(topk_p=None),
        has_grammar=False, return_logprob=False,
    )  # fmt: skip
    launched = []
    for _ in range(2):

        def forward(worker: Any, batch: Any) -> Any:
            verify(lambda *_: None, worker, batch)
            return SimpleNamespace()

        launched.append(rank._step(forward, rank.worker, batch))
    for result in launched:  # the overlap scheduler: the result of a step comes after the next one has begun
        result.num_correct_drafts_per_req_cpu = [1, 2, 3]
        results(lambda *_: [], None, result, batch)
        assert not hasattr(result, "adaptive_spec_step")
    assert not guard.failures
    with RingReader.open(tmp_path / RING_NAME) as ring:
        records = ring.poll(8)
    assert [record.step for record in records] == [1, 2]
    assert records[0].accept_len.tolist() == [1, 3], "one had ended"
    assert records[0].verify_len.tolist() == [3, 3]
    assert records[0].num_tokens == 12


def _records(rank: EagleRank, topk_p: torch.Tensor, ran: list[int]) -> list[Any]:
    """The records of steps of two requests that ran these K, draft-extend skipped throughout."""
    side, guard = rank.attachment, rank.guard
    draft = guard.around("draft", side.draft_before, side.draft_after)
    verify = guard.around("verify", side.verify_before, side.verify_after)
    results = guard.around("results", side.results_before, side.results_after)
    mode = SimpleNamespace(is_extend=lambda: False, is_idle=lambda: False)
    requests = [SimpleNamespace(rid=f"r{i}", is_retracted=False, finished=lambda: False) for i in range(2)]
    batch = SimpleNamespace(
        forward_mode=mode, is_extend_in_batch=False, reqs=requests, seq_lens_sum=60, spec_info=SimpleNamespace(topk_p=topk_p),
        has_grammar=False, return_logprob=False,
    )  # fmt: skip
    for k in ran:

        def forward(worker: Any, batch: Any, k: int = k) -> Any:
            worker.speculative_num_steps = worker._draft_worker.speculative_num_steps = k
            if k:
                draft(lambda *_: None, worker._draft_worker, batch)
            verify(lambda *_: None, worker, batch)
            return SimpleNamespace(num_correct_drafts_per_req_cpu=[min(k, 1), 0])

        results(lambda *_: [], None, rank._step(forward, rank.worker, batch), batch)
    rank.attachment._in_flight.interrupt()
    assert not guard.failures
    with RingReader.open(rank.attachment._settings.runtime_dir / RING_NAME) as ring:
        return list(ring.poll(16))


def test_without_confidences_the_counts_are_recorded(tmp_path: Path, page: PolicyPage) -> None:
    rank = _rank(tmp_path, confidences="off")
    forward = rank.worker._draft_worker.draft_runner.forward
    rank.attach()
    assert rank.worker._draft_worker.draft_runner.forward is forward, "the draft model is left alone"
    records = _records(rank, torch.ones(2, 1), [3, 3])
    assert [record.accept_len.tolist() for record in records] == [[1, 0]] * 2
    assert all((record.confidences == UNKNOWN_CONFIDENCE).all() and record.confidences.shape == (2, 3) for record in records)
    assert all(record.invalid_reason() is None and not record.flags & StepFlag.CENSORED for record in records)


@pytest.mark.parametrize(("confidences", "expected"), [("on", 0.9), ("off", None)])
def test_the_step_choice_uses_topk_p_only_where_it_is_a_confidence(
    tmp_path: Path, page: PolicyPage, monkeypatch: pytest.MonkeyPatch, confidences: str, expected: float | None
) -> None:
    rank = _rank(tmp_path, confidences=confidences)
    rank.attach()
    seen: list[Any] = []

    def refined(history: Any, planner: Any, ids: Any, first: Any, k: int, *args: Any) -> int:
        seen.append(first)
        return k

    monkeypatch.setattr("adaptive_spec.engines.sglang.eagle_attachment.refined_k", refined)
    _steps(rank, 20, 5)
    assert seen
    assert all((first is None) if expected is None else (first == np.float32(expected)).all() for first in seen)
