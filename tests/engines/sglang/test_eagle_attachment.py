"""Several ranks in one process, as threads: whatever fails on one of them, none waits in vain and all draft the same K."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from adaptive_spec.domain.step_record import UNKNOWN_CONFIDENCE, StepFlag
from adaptive_spec.engine_side.tap import PAGE_NAME, RING_NAME
from adaptive_spec.engines.sglang.attachment import Place
from adaptive_spec.engines.sglang.eagle_attachment import EagleAttachment
from adaptive_spec.engines.sglang.hook_guard import FAILURES_IN_A_ROW, Guard
from adaptive_spec.engines.sglang.plugin_settings import PluginSettings
from adaptive_spec.wire.engine_report import read_report
from adaptive_spec.wire.policy_page import PolicyPage, payload_bytes
from adaptive_spec.wire.ring import RingReader
from tests.engines.sglang.rank_policies import CANDIDATES, MAX_BATCH, MAX_K, random_policy
from tests.engines.sglang.thread_group import ThreadGroup

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
        self, rank: int, folder: Path, group: ThreadGroup | None, faults: str = "", mode: Any = "active", confidences: Any = "on"
    ) -> None:
        self.guard = Guard(faults)
        settings = PluginSettings(mode, folder, 30.0, rendezvous_steps=INTERVAL, confidences=confidences)
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
            adaptive_controller=SimpleNamespace(_states=dict.fromkeys(CANDIDATES)),
            server_args=SimpleNamespace(model_path="/m/x"),
        )  # fmt: skip
        self.policy = self.attachment.draft_policy(self.worker, Stock())
        self.captured = False
        self._step = self.guard.around("step", self.attachment.step_before, self.attachment.step_after)

    def attach(self) -> None:
        def original(worker: Any) -> None:
            self.captured = True

        self.attachment.attach(original, self.worker)

    def step(self, rows: int, kv_tokens: int) -> int:
        """K the draft policy says in a decode step."""
        mode = SimpleNamespace(is_extend=lambda: False, is_idle=lambda: False)
        requests = [SimpleNamespace(rid=f"r{i}") for i in range(rows)]
        batch = SimpleNamespace(
            forward_mode=mode, is_extend_in_batch=False, reqs=requests, seq_lens_sum=kv_tokens,
            spec_info=SimpleNamespace(topk_p=torch.full((rows, 1), 0.9)),
        )  # fmt: skip
        found: list[int] = []

        def forward(worker: Any, batch: Any) -> Any:
            found.append(self.policy.get_steps_for_batch(rows))
            return SimpleNamespace()

        self._step(forward, self.worker, batch)
        return found[0]


def _together(ranks: list[Rank], call: Callable[[Rank], Any]) -> list[Any]:
    results: list[Any] = [None] * len(ranks)

    def run(index: int) -> None:
        results[index] = call(ranks[index])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "deadlock"
    return results


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
    _together(ranks, Rank.attach)
    assert all(rank.captured and rank.guard.closed is None and rank.guard.lockstep for rank in ranks)
    found = _together(ranks, lambda rank: _steps(rank, 60, 1))
    assert found[0] == found[1] == found[2]
    assert len(set(found[0])) > 1
    report = read_report(tmp_path)
    assert report is not None
    assert report.state == "attached"
    assert all(rank.attachment._history is None for rank in ranks), "no floats of one's own decide among ranks"


def test_a_rank_that_detaches_takes_all_back_to_the_launch_k(tmp_path: Path, page: PolicyPage) -> None:
    group = ThreadGroup(RANKS)
    ranks = [Rank(i, tmp_path, group) for i in range(RANKS)]
    _together(ranks, Rank.attach)
    before = _together(ranks, lambda rank: _steps(rank, 2 * INTERVAL, 2))
    failing = ranks[1].guard.around("verify", lambda: {"a": 1}["x"], None)
    for _ in range(FAILURES_IN_A_ROW):
        failing(lambda: None)
    assert ranks[1].guard.closed
    after = _together(ranks, lambda rank: _steps(rank, 10 * INTERVAL, 3))
    assert before[0] == before[1] == before[2]
    assert after[0] == after[1] == after[2], "also until the meeting"
    assert set(after[0][INTERVAL:]) == {3}


@pytest.mark.parametrize("fault", ["attach", "attach/after"])
def test_a_rank_that_cannot_attach_leaves_all_to_sglang(tmp_path: Path, page: PolicyPage, fault: str) -> None:
    group = ThreadGroup(RANKS)
    ranks = [Rank(i, tmp_path, group, fault if i == 2 else "") for i in range(RANKS)]
    _together(ranks, Rank.attach)
    assert all(rank.captured and rank.guard.closed for rank in ranks)
    found = _together(ranks, lambda rank: _steps(rank, 3 * INTERVAL, 4))
    assert found == [[1] * (3 * INTERVAL)] * RANKS, "SGLang's own policy"


def test_ranks_told_different_things_leave_all_to_sglang(tmp_path: Path, page: PolicyPage) -> None:
    group = ThreadGroup(RANKS)
    ranks = [Rank(i, tmp_path, group, mode="shadow" if i == 1 else "active") for i in range(RANKS)]
    _together(ranks, Rank.attach)
    assert all("do not agree" in str(rank.guard.closed) for rank in ranks)
    assert _together(ranks, lambda rank: rank.step(4, 100)) == [1] * RANKS


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
    assert _steps(rank, 10, 6) == [3] * 10, "the launch K"


def test_results_reach_the_ring_with_their_own_step(tmp_path: Path, page: PolicyPage) -> None:
    rank = Rank(0, tmp_path, None)
    rank.attach()
    side, guard = rank.attachment, rank.guard
    verify = guard.around("verify", side.verify_before, side.verify_after)
    results = guard.around("results", side.results_before, side.results_after)
    mode = SimpleNamespace(is_extend=lambda: False, is_idle=lambda: False)
    requests = [SimpleNamespace(rid=f"r{i}", is_retracted=False, finished=lambda i=i: i == 1) for i in range(3)]
    batch = SimpleNamespace(
        forward_mode=mode, is_extend_in_batch=False, reqs=requests, seq_lens_sum=60, spec_info=SimpleNamespace(topk_p=None)
    )
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
        forward_mode=mode, is_extend_in_batch=False, reqs=requests, seq_lens_sum=60, spec_info=SimpleNamespace(topk_p=topk_p)
    )
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


def test_the_first_step_after_k_zero_without_draft_extend_carries_no_labels(tmp_path: Path, page: PolicyPage) -> None:
    rank = Rank(0, tmp_path, None, confidences="off")
    rank.attach()
    records = _records(rank, torch.zeros(2, 1), [3, 0, 0, 3, 3])
    assert [bool(record.flags & StepFlag.CENSORED) for record in records] == [False, False, False, True, False]
