"""Several ranks in one process, as threads: whatever fails on one of them, none waits in vain and all draft the same K."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
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
from adaptive_spec.engines.sglang.attachment import STEP_ATTRIBUTE, Place
from adaptive_spec.engines.sglang.eagle_attachment import SKIP_EXTEND_VARIABLE, STALE_STEPS, EagleAttachment
from adaptive_spec.engines.sglang.hook_guard import FAILURES_IN_A_ROW, Guard
from adaptive_spec.engines.sglang.plugin_settings import PluginSettings
from adaptive_spec.wire.engine_report import read_report
from adaptive_spec.wire.policy_page import PolicyPage, payload_bytes
from adaptive_spec.wire.ring import RingReader
from tests.engines.sglang.rank_policies import CANDIDATES, MAX_BATCH, MAX_K, random_policy
from tests.engines.sglang.slots import Slots
from tests.engines.sglang.thread_group import ThreadGroup, together

RANKS = 3
INTERVAL = 4


class Stock:
    candidate_steps = CANDIDATES

    def set_cuda_graph_bs(self, cuda_graph_bs: list[int] | None) -> None: ...

    def get_steps_for_batch(self, batch_size: int) -> int:
        return 1

    def cuda_graph_bs_for_step(self, step: int) -> list[int] | None:
        return None


class Rank:
    """An attachment with as much of a worker as it touches."""

    def __init__(
        self, rank: int, folder: Path, group: ThreadGroup | None, faults: str = "", mode: Any = "active", fallback: Any = "stock",
        stock: Any = None, confidences: Any = "on",
    ) -> None:  # fmt: skip
        self.guard = Guard(faults)
        settings = PluginSettings(mode, folder, 30.0, rendezvous_steps=INTERVAL, fallback=fallback, confidences=confidences)
        self.attachment = EagleAttachment(settings, self.guard, "sglang test")
        self.attachment._supported = True
        member = group.member(rank) if group is not None else None
        self.attachment._place = lambda: Place(rank, RANKS if group else 1, member)  # type: ignore[method-assign]  # no SGLang here
        draft = SimpleNamespace(
            draft_runner=SimpleNamespace(forward=lambda *_: None),
            speculative_num_steps=3,
            cuda_graph_runner_for_draft_extend=None,
        )
        runner = SimpleNamespace(model_runner=SimpleNamespace(max_running_requests=MAX_BATCH))
        self.worker = SimpleNamespace(
            device="cpu", speculative_num_steps=3, _draft_worker=draft, _target_worker=runner,
            adaptive_controller=SimpleNamespace(_states=dict.fromkeys(stock.candidate_steps if stock else CANDIDATES)),
            server_args=SimpleNamespace(model_path="/m/x"),
        )  # fmt: skip
        self.policy = self.attachment.draft_policy(self.worker, stock or Stock())
        self.worker.adaptive_controller.params = self.policy
        self.grammar = False
        self.captured = False
        self._step = self.guard.around("step", self.attachment.step_before, self.attachment.step_after)

    def attach(self) -> None:
        def original(worker: Any) -> None:
            self.captured = True

        self.attachment.attach(original, self.worker)

    def step(self, rows: int, kv_tokens: int, run: Callable[[int], None] = lambda k: None) -> int:
        """K the draft policy says in a decode step; run: runs it."""
        mode = SimpleNamespace(is_extend=lambda: False, is_idle=lambda: False)
        requests = [SimpleNamespace(rid=f"r{i}") for i in range(rows)]
        batch = SimpleNamespace(
            forward_mode=mode, is_extend_in_batch=False, reqs=requests, seq_lens_sum=kv_tokens,
            has_grammar=self.grammar, return_logprob=False,
            spec_info=SimpleNamespace(topk_p=torch.full((rows, 1), 0.9)),
        )  # fmt: skip
        found: list[int] = []

        def forward(worker: Any, batch: Any) -> Any:
            found.append(self.policy.get_steps_for_batch(rows))
            run(found[0])
            return SimpleNamespace()

        result = self._step(forward, self.worker, batch)
        if hasattr(result, STEP_ATTRIBUTE):
            self.last = getattr(result, STEP_ATTRIBUTE)
            self.last_begun = self.last.begun
        return found[0]


def _steps(rank: Rank, count: int, seed: int) -> list[int]:
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
    group = ThreadGroup(RANKS)
    ranks = [Rank(i, tmp_path, group) for i in range(RANKS)]
    together(ranks, Rank.attach)
    assert all(rank.captured and rank.guard.closed is None and rank.guard.lockstep for rank in ranks)
    found = together(ranks, lambda rank: _steps(rank, 60, 1))
    assert found[0] == found[1] == found[2]
    assert len(set(found[0])) > 1
    report = read_report(tmp_path)
    assert report is not None
    assert report.state == "attached"
    assert all(rank.attachment._history is None for rank in ranks), "no floats of one's own decide among ranks"


@pytest.mark.parametrize(("fallback", "k"), [("stock", 1), ("launch", 3)])
def test_a_rank_that_detaches_takes_all_back(tmp_path: Path, page: PolicyPage, fallback: str, k: int) -> None:
    group = ThreadGroup(RANKS)
    ranks = [Rank(i, tmp_path, group, fallback=fallback) for i in range(RANKS)]
    together(ranks, Rank.attach)
    before = together(ranks, lambda rank: _steps(rank, 2 * INTERVAL, 2))
    failing = ranks[1].guard.around("results", lambda: {"a": 1}["x"], None)
    for _ in range(FAILURES_IN_A_ROW):
        failing(lambda: None)
    assert ranks[1].guard.closed
    after = together(ranks, lambda rank: _steps(rank, 10 * INTERVAL, 3))
    assert before[0] == before[1] == before[2]
    assert after[0] == after[1] == after[2], "also until the meeting"
    assert set(after[0][INTERVAL:]) == {k}


@pytest.mark.parametrize("fault", ["attach", "attach/after"])
def test_a_rank_that_cannot_attach_leaves_all_to_sglang(tmp_path: Path, page: PolicyPage, fault: str) -> None:
    group = ThreadGroup(RANKS)
    ranks = [Rank(i, tmp_path, group, fault if i == 2 else "") for i in range(RANKS)]
    together(ranks, Rank.attach)
    assert all(rank.captured and rank.guard.closed for rank in ranks)
    found = together(ranks, lambda rank: _steps(rank, 3 * INTERVAL, 4))
    assert found == [[1] * (3 * INTERVAL)] * RANKS, "SGLang's own policy"


def test_ranks_told_different_things_leave_all_to_sglang(tmp_path: Path, page: PolicyPage) -> None:
    group = ThreadGroup(RANKS)
    ranks = [Rank(i, tmp_path, group, mode="shadow" if i == 1 else "active") for i in range(RANKS)]
    together(ranks, Rank.attach)
    assert all("do not agree" in str(rank.guard.closed) for rank in ranks)
    assert together(ranks, lambda rank: rank.step(4, 100)) == [1] * RANKS


def test_one_rank_alone_asks_nobody(tmp_path: Path, page: PolicyPage) -> None:
    rank = Rank(0, tmp_path, None)
    rank.attach()
    assert rank.guard.closed is None
    assert not rank.guard.lockstep
    assert rank.attachment._history is not None
    found = _steps(rank, 60, 5)
    assert set(found) <= set(CANDIDATES)
    assert len(set(found)) > 1
    rank.guard.close("enough")
    assert _steps(rank, 10, 6) == [1] * 10, "SGLang's own policy"


@pytest.mark.parametrize(("fallback", "k"), [("stock", 1), ("launch", 3)])
def test_without_a_policy_that_acts_the_fallback_decides(tmp_path: Path, fallback: str, k: int) -> None:
    rank = Rank(0, tmp_path, None, fallback=fallback)
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
    rank = Rank(0, tmp_path, None, stock=Slots({1: [1, 3, 5], 5: [0, 1]}))
    rank.policy.set_cuda_graph_bs(None)
    rank.attach()
    side = rank.attachment
    assert side._tap is not None
    assert side._tap.info.allowed_from == ((1, (1, 3, 5)), (5, (0, 1, 3)))
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

    rank = Rank(0, tmp_path, None)
    rank.worker.adaptive_controller = OwnController(_states=dict.fromkeys(CANDIDATES), params=Stock())
    rank.attach()
    report = read_report(tmp_path)
    assert report is not None
    assert (report.state, report.reason) == ("observing", "SGLang's OwnController does not ask the plugin's policy for K")
    rank.step(2, 100)
    assert rank.last_begun.policy_version == 0


def test_a_step_that_waits_on_the_host_is_disturbed(tmp_path: Path) -> None:
    rank = Rank(0, tmp_path, None)
    rank.attach()
    rank.step(2, 100)
    assert rank.last.flags == 0
    rank.grammar = True
    rank.step(2, 100)
    assert rank.last.flags == StepFlag.DISTURBED


@pytest.mark.parametrize("skips", [True, False])
def test_drafts_after_skipped_ones_teach_no_acceptance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skips: bool) -> None:
    monkeypatch.setenv(SKIP_EXTEND_VARIABLE, str(skips).lower())
    rank = Rank(0, tmp_path, None)
    rank.attach()
    flagged = []
    for k in (3, 0, 0, *[3] * (STALE_STEPS + 2)):
        rank.step(2, 100, lambda _, k=k: setattr(rank.worker, "speculative_num_steps", k))  # type: ignore[misc]  # k of this round
        flagged.append(bool(rank.last.flags & StepFlag.CENSORED))
    assert flagged == [False, False, False, *[skips] * STALE_STEPS, False, False]


def _levels(rank: Rank) -> int | None:
    report = read_report(rank.attachment._settings.runtime_dir)
    assert report is not None
    return report.level


def test_each_level_fails_alone(tmp_path: Path, page: PolicyPage, caplog: pytest.LogCaptureFixture) -> None:
    rank = Rank(0, tmp_path, None)
    rank.attach()
    side, guard = rank.attachment, rank.guard
    assert _levels(rank) == 3
    assert side._confidences is not None
    for _ in range(FAILURES_IN_A_ROW):
        guard.part("confidences", lambda: {"a": 1}["x"])
    assert (_levels(rank), side._confidences) == (2, None)
    verify = guard.around("verify", lambda *_: {"a": 1}["x"], None)
    for _ in range(FAILURES_IN_A_ROW):
        verify(lambda: None)
    assert _levels(rank) == 1
    assert guard.closed is None
    caplog.clear()
    verify(lambda: None)
    assert not caplog.records, "one line for each level"
    assert guard.failures == {"confidences": FAILURES_IN_A_ROW, "verify": FAILURES_IN_A_ROW}
    results = guard.around("results", side.results_before, side.results_after)
    rank.step(2, 100)
    rank.last.ended = side._clock.now()
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
    rank = Rank(0, tmp_path, None)
    rank.attach()
    side, guard = rank.attachment, rank.guard
    verify = guard.around("verify", side.verify_before, side.verify_after)
    results = guard.around("results", side.results_before, side.results_after)
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


def _records(rank: Rank, topk_p: torch.Tensor, ran: list[int]) -> list[Any]:
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
    rank = Rank(0, tmp_path, None, confidences="off")
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
    rank = Rank(0, tmp_path, None, confidences=confidences)
    rank.attach()
    seen: list[Any] = []

    def refined(history: Any, planner: Any, ids: Any, first: Any, k: int, *args: Any) -> int:
        seen.append(first)
        return k

    monkeypatch.setattr("adaptive_spec.engines.sglang.eagle_attachment.refined_k", refined)
    _steps(rank, 20, 5)
    assert seen
    assert all((first is None) if expected is None else (first == np.float32(expected)).all() for first in seen)
