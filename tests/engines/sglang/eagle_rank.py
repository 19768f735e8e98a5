"""One rank of an EAGLE server without a model: our attachment and hooks, with as much of SGLang's objects as they touch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch

from adaptive_spec.engines.common.hook_guard import Guard
from adaptive_spec.engines.common.plugin_settings import PluginSettings
from adaptive_spec.engines.sglang.attachment import STEP_ATTRIBUTE, Attachment, Place
from adaptive_spec.engines.sglang.eagle_attachment import EagleAttachment
from adaptive_spec.engines.sglang.ranks import View
from tests.engines.sglang.rank_policies import CANDIDATES, MAX_BATCH

LAUNCH_K, STOCK_K = 3, 1


class Stock:
    candidate_steps = CANDIDATES

    def set_cuda_graph_bs(self, cuda_graph_bs: list[int] | None) -> None: ...

    def get_steps_for_batch(self, batch_size: int) -> int:
        return STOCK_K

    def cuda_graph_bs_for_step(self, step: int) -> list[int] | None:
        return None

    def on_verify_complete(self, counts: list[int], batch_size: int) -> None: ...


class Board:
    """The store of all ranks in one process. lost: ranks whose writing does not arrive."""

    def __init__(self, ranks: int) -> None:
        self.terms: list[int | None] = [None] * ranks
        self.answers = [0] * ranks
        self.failed = ""
        self.lost: set[int] = set()
        self.calls = 0

    def notes(self, rank: int, terms: int) -> BoardNotes:
        self.calls += 1
        if rank not in self.lost:
            self.terms[rank] = terms
        return BoardNotes(self, rank)


class BoardNotes:
    """A `ranks.Notes` whose writing arrives at once."""

    def __init__(self, board: Board, rank: int) -> None:
        self._board, self._rank, self.waiting = board, rank, False

    @property
    def view(self) -> View:
        board = self._board
        return View(tuple(board.terms), tuple(board.answers[1:]), board.failed)

    def answer(self, number: int) -> None:
        if self._rank not in self._board.lost:
            self._board.answers[self._rank] = number

    def fail(self, reason: str) -> None:
        self._board.failed = reason

    def end(self) -> None: ...


class HasAttachment(Protocol):
    @property
    def attachment(self) -> Attachment: ...

    @property
    def place(self) -> Place: ...


class EagleRank:
    """place: of this rank, `Place(0, 1)` for a single one."""

    def __init__(
        self, place: Place, folder: Path, faults: str = "", mode: Any = "active", fallback: Any = "stock", stock: Any = None,
        max_age_s: float = 30.0, timeout_s: int = 60, candidates: Sequence[int] = CANDIDATES, confidences: Any = "on",
    ) -> None:  # fmt: skip
        self.place, self.guard = place, Guard("SGLang", faults)
        settings = PluginSettings(mode, folder, max_age_s, ranks_timeout_s=timeout_s, fallback=fallback, confidences=confidences)
        self.attachment = side = EagleAttachment(settings, self.guard, "sglang test")
        side._supported = True
        side._place = lambda: place  # type: ignore[method-assign]  # no SGLang process groups here
        draft = SimpleNamespace(
            draft_runner=SimpleNamespace(forward=lambda *_: None),
            speculative_num_steps=LAUNCH_K,
            cuda_graph_runner_for_draft_extend=None,
        )
        runner = SimpleNamespace(model_runner=SimpleNamespace(max_running_requests=MAX_BATCH))
        self.worker = SimpleNamespace(
            device="cpu", speculative_num_steps=LAUNCH_K, topk=1, _draft_worker=draft, _target_worker=runner,
            adaptive_controller=SimpleNamespace(_states=dict.fromkeys(stock.candidate_steps if stock else candidates)),
            server_args=SimpleNamespace(model_path="/m/x"),
        )  # fmt: skip
        own = stock or Stock()
        try:
            self.policy: Any = side.draft_policy(self.worker, own)
        except Exception:  # as the plugin does
            self.guard.failed("controller")
            self.policy = own
        self.worker.adaptive_controller.params = self.policy
        self.grammar = self.hidden_states = False
        self.captured, self.forward_iter, self.last_k = False, 0, 0
        around = self.guard.around
        self._step = around("step", side.step_before, side.step_after, side.step_first)
        self._verify = around("verify", side.verify_before, side.verify_after)
        self._results = around("results", side.results_before, side.results_after)

    def attach(self, board: Board | None = None) -> None:
        def original(worker: Any) -> None:
            self.captured = True

        side = self.attachment
        if board is not None:
            side._notes = lambda place, terms: board.notes(place.rank, terms)  # type: ignore[method-assign]
            side._hook_broadcast = lambda: None  # type: ignore[method-assign]
        side.attach(original, self.worker)

    def step(self, rows: int, kv_tokens: int, run: Callable[[int], None] = lambda k: None) -> int:
        """K the draft policy says in a decode step; run: runs it."""
        mode = SimpleNamespace(is_extend=lambda: False, is_idle=lambda: False)
        requests = [SimpleNamespace(rid=f"r{i}", is_retracted=False, finished=lambda: False) for i in range(rows)]
        self.forward_iter += 1
        batch = SimpleNamespace(
            forward_mode=mode, is_extend_in_batch=False, reqs=requests, seq_lens_sum=kv_tokens, forward_iter=self.forward_iter,
            has_grammar=self.grammar, return_logprob=False, return_hidden_states=self.hidden_states,
            spec_info=SimpleNamespace(topk_p=torch.full((rows, 1), 0.9)),
        )  # fmt: skip

        def forward(worker: Any, batch: Any) -> Any:
            self.last_k = self.policy.get_steps_for_batch(rows)
            self._verify(lambda *_: None, worker, batch)
            run(self.last_k)
            return SimpleNamespace(num_correct_drafts_per_req_cpu=[0] * rows)

        result = self._step(forward, self.worker, batch)
        if hasattr(result, STEP_ATTRIBUTE):
            self.last = getattr(result, STEP_ATTRIBUTE)
            self.last_begun = self.last.begun
        self._results(lambda *_: [], None, result, batch)
        self.policy.on_verify_complete([0] * rows, rows)
        return self.last_k


def loop(ranks: Sequence[HasAttachment], requests: Sequence[Any] = ()) -> None:
    """One loop of the schedulers of all ranks: SGLang's broadcast of the received requests, with our hook around it."""
    sent: list[Any] = []

    def broadcast(receiver: Any, given: Any) -> list[Any]:
        if given is not None:
            sent[:] = given
        return list(sent)

    for rank in ranks:
        if rank.attachment._steering is not None:
            rank.attachment._steering._looked_s = -1e9  # look at once
        found = rank.attachment.broadcast(broadcast, None, list(requests) if rank.place.rank == 0 else None)
        assert found == list(requests), "SGLang sees its own requests only"
