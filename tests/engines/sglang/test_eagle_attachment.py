"""Several ranks in one process, as threads: whatever fails on one of them, none waits in vain and all draft the same K."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

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

    def __init__(self, rank: int, folder: Path, group: ThreadGroup | None, faults: str = "", mode: Any = "active") -> None:
        self.guard = Guard(faults)
        settings = PluginSettings(mode, folder, 30.0, rendezvous_steps=INTERVAL)
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
