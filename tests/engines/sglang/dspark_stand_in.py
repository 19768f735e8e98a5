"""A stand-in for a DSpark server, on a CPU: SGLang's own DSparkWorkerV2, proposer, planner and verify executor, with both model
forwards replaced by arithmetic, and time by a counter. SGLang needs a GPU and a DSpark checkpoint for the real thing.

    target      after token t comes t + 1
    draft       raw confidences of its own; a token is right with probability sigmoid(raw / TRUE_TEMPERATURE), given that all
                before it are
    time        drafting takes DRAFT_S, verifying m tokens `verify_seconds(m)`
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sglang.srt.managers.overlap_utils import CONFIDENCE_RELAY_RING_LAG, ResolvedConfidence
from sglang.srt.managers.scheduler_components.batch_result_processor import SchedulerBatchResultProcessor
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.models.dspark import BaseDSparkMarkovHead, DSparkConfidenceHead
from sglang.srt.speculative.dflash_info_v2 import DFlashDraftInputV2
from sglang.srt.speculative.dspark_components import dspark_planner, dspark_worker_v2
from sglang.srt.speculative.dspark_components.dspark_draft import DraftBlockProposer, DraftForwardResult
from sglang.srt.speculative.dspark_components.dspark_planner import DSparkVerifyPlanner
from sglang.srt.speculative.dspark_components.dspark_sps import SpsCostTable
from sglang.srt.speculative.dspark_components.dspark_sts import DSparkStsCalibration
from sglang.srt.speculative.dspark_components.dspark_verify import TargetVerifyExecutor, TargetVerifyResult
from sglang.srt.speculative.dspark_components.dspark_worker_v2 import DSparkWorkerV2

from adaptive_spec.engines.common.steps_in_flight import Moment

GAMMA, MAX_BATCH, VOCABULARY, WIDTH = 5, 8, 64, 16
TRUE_TEMPERATURE, LAUNCH_TEMPERATURE = 2.0, 1.0
DRAFT_S, TILE, JUMP_S = 1e-3, 12, 6e-3
CAPTURED = [MAX_BATCH * (GAMMA + 1)]
"""Token counts of the captured graphs, where there are any."""


def verify_seconds(tokens: int) -> float:
    return 4e-3 + JUMP_S * ((tokens - 1) // TILE) + 2e-5 * tokens


class VirtualMoment:
    def __init__(self, at_s: float) -> None:
        self.at_s = at_s

    def seconds_to(self, later: Moment) -> float | None:
        assert isinstance(later, VirtualMoment)
        return later.at_s - self.at_s


class VirtualClock:
    at_s = 0.0

    def now(self) -> Moment:
        return VirtualMoment(self.at_s)


class NoBias(BaseDSparkMarkovHead):  # type: ignore[misc]  # SGLang has no types here
    vocab_size = VOCABULARY

    def step_bias(self, prev_tokens: Any, *, hidden_states: Any, state: Any) -> Any:
        return torch.zeros(len(prev_tokens), VOCABULARY), state

    def step_logits_dtype(self, base_dtype: torch.dtype) -> torch.dtype:
        return base_dtype


class Draft:
    """In place of the draft model. raw: confidences of the last block [b, gamma]; right: how many tokens of it are right [b]."""

    sample_from_anchor = True
    embed_tokens = None

    def __init__(self, head: Any, seed: int) -> None:
        self.confidence_head, self.markov_head = head, NoBias()
        self.dice = np.random.default_rng(seed)
        self.raw, self.right, self.anchors = torch.zeros(0, GAMMA), np.zeros(0, int), torch.zeros(0, dtype=torch.long)

    def draft(self, anchors: torch.Tensor) -> None:
        rows = len(anchors)
        self.anchors = anchors.clone()
        self.raw = torch.from_numpy(self.dice.normal(1.5, 2.5, (rows, GAMMA))).float()
        true = 1.0 / (1.0 + np.exp(-self.raw.numpy() / TRUE_TEMPERATURE))
        self.right = np.cumprod(self.dice.random((rows, GAMMA)) < true, axis=1).sum(axis=1)

    def compute_base_logits(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
        rows = len(self.anchors)
        tokens = (self.anchors[:, None] + 1 + torch.arange(GAMMA)) % VOCABULARY
        wrong = torch.arange(GAMMA)[None, :] >= torch.from_numpy(self.right)[:, None]
        tokens = torch.where(wrong, (tokens + 7) % VOCABULARY, tokens)
        return 9.0 * torch.nn.functional.one_hot(tokens, VOCABULARY).float().view(rows * GAMMA, -1), None

    def compute_confidence(self, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self.confidence_head.apply_sts(self.raw), self.raw


class Proposer(DraftBlockProposer):  # type: ignore[misc]  # SGLang has no types here
    clock: VirtualClock

    def _run_forward(self, *, draft_input: Any, bs: int, **_: Any) -> DraftForwardResult:
        self.clock.at_s += DRAFT_S
        self.draft_model.draft(draft_input.bonus_tokens.view(-1))
        ids = torch.zeros(bs, GAMMA, dtype=torch.long)
        ids[:, 0] = draft_input.bonus_tokens.view(-1)
        hidden = torch.zeros(bs * GAMMA, 4)
        return DraftForwardResult(
            draft_block_ids=ids, raw_hidden=hidden, draft_hidden_3d=hidden.view(bs, GAMMA, -1), can_run_graph=False
        )

    def _base_logits_context(self) -> Any:
        return contextlib.nullcontext()


class Executor(TargetVerifyExecutor):  # type: ignore[misc]  # SGLang has no types here
    clock: VirtualClock

    def _forward_prepared_verify(self, *, verify_input: Any, **_: Any) -> TargetVerifyResult:
        tokens = verify_input.draft_token
        self.clock.at_s += verify_seconds(len(tokens))
        logits = 9.0 * torch.nn.functional.one_hot((tokens + 1) % VOCABULARY, VOCABULARY).float()
        output = SimpleNamespace(next_token_logits=logits, hidden_states=torch.zeros(len(tokens), 4))
        return TargetVerifyResult(logits_output=output, can_run_cuda_graph=False)

    def commit_hidden(self, **_: Any) -> None:
        """No KV cache here."""


def planner_for(
    monkeypatch: pytest.MonkeyPatch, folder: Path, model_runner: Any, head: Any, *, mode: str, sps: bool, sts: bool,
    overlap: bool, filled: bool, attention_dp: int,
) -> Any:  # fmt: skip
    """SGLang's planner as its own constructor makes it, of files."""
    monkeypatch.setenv("SGLANG_RAGGED_VERIFY_MODE", mode)
    (folder / "sps.json").write_text(
        SpsCostTable(
            sample_batch_tokens=[1, 16, 32], sample_steps_per_sec=[100.0, 90.0, 80.0], max_batch_tokens=CAPTURED[-1]
        ).to_json()
    )
    (folder / "sts.json").write_text(DSparkStsCalibration(temperatures=[LAUNCH_TEMPERATURE] * GAMMA).to_json())
    spec = SimpleNamespace(
        speculative_dspark_align_verify_tokens_to_graph_tier=filled,
        speculative_dspark_confidence_sts_path=str(folder / "sts.json") if sts else None,
        speculative_dspark_sps_table_path=str(folder / "sps.json") if sps else None,
    )
    schedule = SimpleNamespace(disable_overlap_schedule=not overlap, max_running_requests=MAX_BATCH)
    monkeypatch.setattr(dspark_planner, "get_spec", lambda: spec)
    monkeypatch.setattr(dspark_planner, "get_schedule", lambda: schedule)
    monkeypatch.setattr(dspark_planner, "is_dp_attention_enabled", lambda: attention_dp > 1)
    # With more than one rank for a batch SGLang agrees on no plan: all graphs have room for every drafted token.
    monkeypatch.setattr(dspark_planner, "get_parallel", lambda: SimpleNamespace(attn_tp_size=2, attn_cp_size=1))
    return DSparkVerifyPlanner(
        draft_model=SimpleNamespace(confidence_head=head), gamma=GAMMA, model_runner=model_runner, device="cpu", tp_rank=0,
        verify_num_draft_tokens=GAMMA + 1, tp_sync=SimpleNamespace(sync=lambda site, values: values),
    )  # fmt: skip


class StandInServer:
    """Worker, scheduler loop and result processor of one rank. mode: SGLANG_RAGGED_VERIFY_MODE. sps, sts: files given at start.

    graphs: the planner pads to them, or, filled, verifies as much as they have room for. attention_dp: ranks that verify in one
    forward, of which the others have `others` requests. results: SGLang's own, step by step.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, folder: Path, *, mode: str = "compact", sps: bool = True, sts: bool = True,
        overlap: bool = False, graphs: Sequence[int] = (), filled: bool = False, attention_dp: int = 1, others: int = 0,
        seed: int = 0,
    ) -> None:  # fmt: skip
        self.attention_dp, self.others = attention_dp, others
        self.clock, self.overlap, self.results = VirtualClock(), overlap, list[Any]()
        self.waiting: deque[tuple[Any, Any]] = deque()
        self.relayed: deque[torch.Tensor] = deque(maxlen=CONFIDENCE_RELAY_RING_LAG)
        pool = SimpleNamespace(
            req_generation=torch.ones(MAX_BATCH, dtype=torch.int64),
            req_to_token=torch.arange(MAX_BATCH * 4096).view(MAX_BATCH, -1),
        )
        captured = SimpleNamespace(ragged_verify_mode=True, capture_num_tokens=list(graphs), max_bs=MAX_BATCH)
        runner = SimpleNamespace(
            max_running_requests=MAX_BATCH, model=SimpleNamespace(get_input_embeddings=lambda: None),
            decode_cuda_graph_runner=captured if graphs else None, req_to_token_pool=pool,
            ngram_embedding_manager=SimpleNamespace(update_after_verify=lambda **_: None),
            kv_index_translator=SimpleNamespace(plan_uniform_extend=self._plan),
            model_config=SimpleNamespace(hf_text_config=SimpleNamespace(model_type="stand-in")),
        )  # fmt: skip
        target = SimpleNamespace(model_runner=runner)
        head = DSparkConfidenceHead(hidden_size=4, markov_rank=0, with_markov=False) if mode != "static" else None
        self.planner = planner_for(
            monkeypatch, folder, runner, head, mode=mode, sps=sps, sts=sts, overlap=overlap, filled=filled,
            attention_dp=attention_dp,
        )  # fmt: skip
        sync = SimpleNamespace(sync=lambda site, values: values, available_memory_gb=lambda *_, **__: 9.0)
        proposer, executor = object.__new__(Proposer), object.__new__(Executor)
        proposer.__dict__ |= {
            "draft_model": Draft(head, seed), "gamma": GAMMA, "sample_from_anchor": True, "query_token_num": GAMMA,
            "_greedy_draft": True,
            "_draft_sampler": None, "_noise": SimpleNamespace(key=1, offset=torch.zeros(1, dtype=torch.int64)), "_tp_sync": sync,
            "clock": self.clock,
        }  # fmt: skip
        TargetVerifyExecutor.__init__(
            executor, target_worker=target, gamma=GAMMA, verify_num_draft_tokens=GAMMA + 1, model_runner=runner,
            kv_injector=None, tp_sync=sync,
        )  # fmt: skip
        executor.clock = self.clock
        executor._verify_backend_self_adds_seq_lens_cache = True
        observers = SimpleNamespace(
            begin_step=lambda: None, note_prefill_step=lambda: None, note_idle_decode_step=lambda: None,
            segment=lambda _: contextlib.nullcontext(), observe_verify_step=lambda **_: None,
        )  # fmt: skip
        self.worker = object.__new__(DSparkWorkerV2)
        self.worker.__dict__ |= {
            "_hosts_draft": True, "_draft_is_moe": attention_dp > 1, "device": "cpu", "gpu_id": 0, "gamma": GAMMA,
            "verify_num_draft_tokens": GAMMA + 1,
            "server_args": SimpleNamespace(model_path="/models/stand-in"), "model_runner": runner, "_target_worker": target,
            "_draft_worker": SimpleNamespace(init_cuda_graphs=lambda **_: None), "_decode_graph_allowed": False, "_tp_sync": sync,
            "_draft_graph_group": None, "draft_parallel_layout": None, "_block_pos_offsets": torch.arange(GAMMA + 1),
            "_proposer": proposer,
            "_verify_planner": self.planner, "_verify_executor": executor, "_verify_epilogue": None, "_observers": observers,
            "_need_mamba_verify_commit": False, "_simulate_acc_greedy": False, "enable_dp_spec_prefill_coordination": False,
        }  # fmt: skip
        processor = object.__new__(SchedulerBatchResultProcessor)
        reporter = SimpleNamespace(snapshot_spec_decode_metrics=lambda *_: None)
        object.__setattr__(processor, "metrics_reporter", reporter)
        object.__setattr__(processor, "model_worker", self.worker)
        self.processor = processor
        execution = SimpleNamespace(mamba=SimpleNamespace(enable_mamba_extra_buffer=False))
        monkeypatch.setattr("sglang.srt.speculative.spec_utils.get_exec", lambda: execution)
        monkeypatch.setattr(dspark_worker_v2, "draft_pp_context", contextlib.nullcontext)
        monkeypatch.setattr(dspark_worker_v2, "draft_tp_context", lambda _: contextlib.nullcontext())
        monkeypatch.setattr(dspark_worker_v2, "get_parallel", lambda: SimpleNamespace(attn_dp_enabled=attention_dp > 1))
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)  # a CPU has no streams
        self.next_anchor: dict[int, int] = {}

    @staticmethod
    def _plan(*, req_pool_indices: Any, width: int, **_: Any) -> Any:
        return SimpleNamespace(write_virtual=torch.zeros(len(req_pool_indices) * width, dtype=torch.int64))

    def start(self) -> None:
        self.worker.init_cuda_graphs()

    def batch(self, rows: int) -> Any:
        """A decode batch of the first `rows` requests, as the scheduler hands it over."""
        requests = [
            SimpleNamespace(
                rid=f"r{i}", is_retracted=False, finished=lambda: False, grammar=None, spec_verify_ct=0,
                spec_num_correct_drafts=0,
                kv=SimpleNamespace(kv_committed_len=0), update_spec_correct_drafts_histogram=lambda _: None,
                spec_num_block_accept_tokens=0, spec_num_cap_tokens=0, update_spec_cap_lens_histogram=lambda _: None,
            )
            for i in range(rows)
        ]  # fmt: skip
        draft_input = DFlashDraftInputV2.create_idle_input(device=torch.device("cpu"))
        draft_input.bonus_tokens = torch.tensor([self.next_anchor.get(i, i) for i in range(rows)])
        draft_input.future_indices = torch.arange(rows)
        lengths = torch.full((rows,), 100, dtype=torch.int64)
        of_all = [rows, *[self.others] * (self.attention_dp - 1)] if self.attention_dp > 1 else None
        return SimpleNamespace(
            reqs=requests, spec_info=draft_input, forward_mode=ForwardMode.DECODE, is_extend_in_batch=False, seq_lens=lengths,
            seq_lens_cpu=lengths, seq_lens_sum=100 * rows, global_num_tokens=of_all, sampling_info=None, has_grammar=False,
            req_pool_indices=torch.arange(rows), req_pool_indices_cpu=torch.arange(rows), return_logprob=False, forward_iter=1,
            spec_verify_tier_num_tokens=-1, global_spec_verify_tier_num_tokens=None, batch_size=lambda: rows,
        )  # fmt: skip

    def prefill(self) -> None:
        """What a prefill looks like to the hooks; its own forward is left out."""
        self.worker.__dict__["_forward_prefill"] = lambda *_: SimpleNamespace()
        batch = SimpleNamespace(forward_mode=ForwardMode.EXTEND, is_extend_in_batch=False, spec_info=None, batch_size=lambda: 1)
        if self.overlap:
            self.planner.prepare_verify_budget(batch, None)
        self.worker.forward_batch_generation(batch)

    def step(self, rows: int) -> Any:
        """One decode step. With the overlap scheduler its result is looked at after the next one was launched."""
        batch = self.batch(rows)
        if self.overlap:
            self.planner.prepare_verify_budget(batch, SimpleNamespace(resolve_confidence_cpu=self._resolve))
        published: list[torch.Tensor] = []
        result = self.worker.forward_batch_generation(
            batch, on_publish=lambda lengths, confidence=None: published.append(confidence)
        )
        if published[0] is not None:
            padded = torch.ones(MAX_BATCH, GAMMA)
            padded[:rows] = published[0]
            self.relayed.append(padded)
        self.next_anchor |= {i: int(t) for i, t in enumerate(result.next_draft_input.bonus_tokens)}
        self.results.append(result)
        self.waiting.append((result, batch))
        while len(self.waiting) > self.overlap:
            self.processor._resolve_spec_v2_tokens(*self.waiting.popleft())
        return result

    def _resolve(self, batch: Any) -> ResolvedConfidence | None:
        rows = batch.req_pool_indices_cpu
        if len(self.relayed) < CONFIDENCE_RELAY_RING_LAG:
            return None
        return ResolvedConfidence(confidence=self.relayed[0][rows], generation=torch.ones(len(rows), dtype=torch.int64))

    def drain(self) -> None:
        while self.waiting:
            self.processor._resolve_spec_v2_tokens(*self.waiting.popleft())


def served(server: StandInServer) -> list[tuple[list[int], list[int]]]:
    """Verified and accepted draft tokens of every step, by SGLang's own results."""
    return [
        (
            (result.cap_lens - 1).tolist() if result.cap_lens is not None else [GAMMA] * len(result.accept_lens),
            (result.accept_lens - 1).tolist(),
        )
        for result in server.results
    ]
