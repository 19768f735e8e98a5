"""The hooks of vLLM's scheduler, in EngineCore. All decisions are made here, once, for every rank.

vLLM drafts at the end of step t what it verifies in step t + 1. So the K chosen before `schedule()` of step t is drafted then,
and verified a step later; the verify lengths chosen before it are those of the drafts of step t - 1. A record is one round: the
drafting at the end of the step before, and the verification.

    attach                      once: what this server can do; opens the tap
    schedule -> results         every step

A batch is the requests that decode. Prefills in the same step do not count, and do not change K; the step is DISTURBED.
Exceptions are caught by `common.hook_guard.Guard`; vLLM then runs the step without the plugin.
"""

from __future__ import annotations

import logging
import os
import time
import zlib
from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

import numpy as np

from adaptive_spec.domain.acceptance_history import REQUESTS_REMEMBERED, AcceptanceHistory
from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.domain.policy import Granularity, Mode
from adaptive_spec.domain.step_record import StepFlag
from adaptive_spec.engine_side.tap import BegunStep, EngineTap
from adaptive_spec.engines.common.hook_guard import Guard
from adaptive_spec.engines.common.identity import config_hash, fingerprint, model_name
from adaptive_spec.engines.common.plugin_settings import PluginSettings
from adaptive_spec.engines.common.report_writer import ReportWriter
from adaptive_spec.engines.common.stage_clock import HostClock
from adaptive_spec.engines.common.steps_in_flight import FinishedStep, OpenStep, StepsInFlight
from adaptive_spec.engines.vllm import contract
from adaptive_spec.engines.vllm.cost_curves import CostCurves
from adaptive_spec.engines.vllm.launch_schedule import candidates_of
from adaptive_spec.engines.vllm.step_notes import (
    CURVES_ATTRIBUTE,
    NOTES_ATTRIBUTE,
    STEP_ATTRIBUTE,
    NotedConfidences,
    NotedTime,
    StepNotes,
)
from adaptive_spec.engines.vllm.supported_servers import observe_only, process_title, refusal
from adaptive_spec.wire.engine_report import EngineReport, State
from adaptive_spec.wire.slot import MAX_BATCH_LIMIT

MOST_RUNNING = 64
"""Most steps that wait for their results: vLLM schedules one ahead, and one for each pipeline stage. Older ones are dropped."""

_FALLBACK, _TRIAL = int(StepFlag.FALLBACK), int(StepFlag.TRIAL)
_CENSORED, _DISTURBED = int(StepFlag.CENSORED), int(StepFlag.DISTURBED)
log = logging.getLogger("vllm.adaptive_spec")


@dataclass
class Round:
    """Drafts that wait for verification. number: of the step that drafted them. k: asked for. prefill: it held prefills too."""

    begun: BegunStep
    k: int
    number: int
    prefill: bool


@dataclass
class Running:
    """A scheduled step, until its result. rows: ids of the decoding requests. drafted_in: number of the step before."""

    number: int
    rows: list[str]
    step: OpenStep | None
    drafted_in: int
    verified: list[int]


class SchedulerAttachment:
    """One per EngineCore."""

    def __init__(self, settings: PluginSettings, guard: Guard, engine: str) -> None:
        self._settings, self._guard, self._engine = settings, guard, engine
        guard.on_close = self._closed
        self._writer = ReportWriter(settings.runtime_dir, log)
        self._state: State = "refused"
        self._reason = ""
        self._scheduler: Any = None
        self._tap: EngineTap | None = None
        self._launch_lookup: list[int] = []
        self._written_k: int | None = None
        """K that stands at every batch size of vLLM's list; None: the launch schedule does."""
        self._steers = False
        self._trims = False
        """Whether vLLM's own adaptive verification is on: the worker, not the scheduler, chooses which drafts are verified."""
        self._curves: CostCurves | None = None
        self._history: AcceptanceHistory | None = None
        self._notes = StepNotes()
        self._book = StepsInFlight(self._write)
        self._clock = HostClock()
        self._number = 0
        self._round: Round | None = None
        self._running: dict[int, Running] = {}
        self._graph_tokens: list[int] = []
        self.cut_steps = 0
        """Steps in which drafts were cut."""
        self.preemptions = 0
        """Requests that vLLM preempted."""

    # -- once ----------------------------------------------------------------------------------------------------------

    def attach_after(self, note: None, result: None, scheduler: Any, *args: Any, **kwargs: Any) -> None:
        """vLLM's scheduler was made: find out what is possible, publish it and open the tap."""
        config, version = scheduler.vllm_config, self._engine.partition(" ")[2]
        reason = refusal(config, version, process_title())
        if reason is not None:
            log.error("adaptive-spec: not attached: %s", reason)
            self._guard.closed = reason
            self.report("refused", reason)
            return
        lookup = scheduler.dynamic_sd_lookup
        reason = observe_only(config, lookup)
        self._scheduler, self._launch_lookup = scheduler, list(lookup or ())
        info = self._info(config, scheduler)
        self._steers = reason is None and self._settings.mode == "active"
        self._trims = bool(getattr(config.speculative_config, "enable_adaptive_verification", False))
        if self._trims and self._settings.mode == "active":
            self._curves = CostCurves()
        sizes = config.compilation_config.cudagraph_capture_sizes
        self._graph_tokens = [] if config.model_config.enforce_eager else sorted(sizes or ())
        self._history = AcceptanceHistory(max(info.max_k, 1), REQUESTS_REMEMBERED) if self._steers else None
        self._tap = EngineTap.open(self._settings.runtime_dir, info, self._settings.max_age_s)
        self.report("attached" if reason is None else "observing", reason or "")
        log.info(
            "adaptive-spec: attached, mode %s, K %d at launch, candidates %s%s", self._settings.mode, info.launch_k,
            info.candidates, f"; K is not decided here: {reason}" if reason else "",
        )  # fmt: skip

    def _info(self, config: Any, scheduler: Any) -> EngineInfo:
        import torch

        from adaptive_spec.engines.torch_device import device_name

        largest, lookup = int(scheduler.num_spec_tokens), self._launch_lookup
        launch_k = int(lookup[1]) if len(lookup) > 1 else largest
        model, speculative = config.model_config, config.speculative_config
        path, draft_path = str(model.model), getattr(speculative, "model", None)
        return EngineInfo(
            name="vllm", model=model_name(path, getattr(model, "served_model_name", None)),
            gpu=device_name(torch.device(str(config.device_config.device_type))),
            tp=int(config.parallel_config.tensor_parallel_size), launch_k=launch_k,
            candidates=candidates_of(lookup, launch_k) if lookup else (largest,),
            max_batch=min(int(config.scheduler_config.max_num_seqs), MAX_BATCH_LIMIT),
            granularity=Granularity.BATCH if self._settings.batch_scores == "off" else Granularity.REQUEST,
            holds_batch=False, pid=os.getpid(),
            fingerprint=fingerprint(
                engine=self._engine, target=config_hash(path, getattr(model, "hf_config", None)),
                draft=config_hash(draft_path) if draft_path else None, target_path=path, draft_path=draft_path,
                quantization=getattr(model, "quantization", None), dtype=str(getattr(model, "dtype", "")),
                kv_cache_dtype=getattr(getattr(config, "cache_config", None), "cache_dtype", None),
                method=getattr(speculative, "method", None),
            ),
        )  # fmt: skip

    # -- every step ----------------------------------------------------------------------------------------------------

    def schedule_before(self, scheduler: Any, *args: Any, **kwargs: Any) -> tuple[list[Any], BegunStep, Any] | None:
        """Choose verify lengths of the drafts that wait, then K of the drafts to be made in this step."""
        tap = self._tap
        if tap is None or scheduler is not self._scheduler:
            return None
        decoding = [request for request in scheduler.running if not request.is_prefill_chunk]
        if self._steers and self._round is not None and decoding:
            self._guard.part("lengths", self._cut, tap, decoding, self._round)
        batch_size = len(decoding) or min(len(scheduler.running) + len(scheduler.waiting), tap.info.max_batch) or 1
        kv_tokens = sum(request.num_computed_tokens for request in decoding)
        tap.begin_step(batch_size, kv_tokens, time.monotonic_ns())
        if self._steers:
            self._write_k(tap.begun)
        return decoding, tap.begun, self._clock.now()

    def _cut(self, tap: EngineTap, decoding: list[Any], waiting: Round) -> None:
        """Shorten the drafts of each request to the verify length that the slot search chooses.

        Under asynchronous scheduling the ids are placeholders, in one list that all requests share: never changed in place.
        """
        requests = [request for request in decoding if request.spec_token_ids]
        policy = tap.planner.policy
        if not requests or waiting.k == 0 or policy is None or self._history is None:
            return
        if (policy.verify_all or policy.mode is Mode.SWEEP) and not tap.planner.trial_tokens:
            return  # K is to be measured, or was pinned, as it is
        ids = [request.request_id for request in requests]
        confidences = self._notes.confidences(waiting.number, ids, waiting.k)
        chances = self._history.conditional([request_number(i) for i in ids])
        expected = np.cumprod(chances[:, : waiting.k], axis=1, dtype=np.float64)
        for request, length in zip(requests, tap.verify_lengths(confidences, expected).tolist(), strict=True):
            if length < len(request.spec_token_ids):
                request.spec_token_ids = request.spec_token_ids[:length]

    def _write_k(self, begun: BegunStep) -> None:
        """Put K into vLLM's list, at every batch size, because vLLM counts prefills too; or the launch schedule back."""
        k = None if begun.flags & _FALLBACK or not begun.policy_version else begun.k
        if k != self._written_k:
            lookup = self._scheduler.dynamic_sd_lookup
            lookup[:] = self._launch_lookup if k is None else [k] * len(self._launch_lookup)
            self._written_k = k

    def schedule_after(self, note: Any, output: Any, scheduler: Any, *args: Any, **kwargs: Any) -> None:
        """The step is scheduled: open its record."""
        if note is None or output.total_num_scheduled_tokens == 0 or self._tap is None:
            return
        decoding, begun, started = note
        self._number += 1
        self.preemptions += len(output.preempted_req_ids or ())
        scheduled, drafts = output.num_scheduled_tokens, output.scheduled_spec_decode_tokens
        rows = [request for request in decoding if request.request_id in scheduled]
        ids = [request.request_id for request in rows]
        prefill = len(scheduled) > len(rows)
        output.__dict__[STEP_ATTRIBUTE] = self._number
        if self._curves is not None:
            policy = None if begun.flags & _FALLBACK or not begun.policy_version else self._tap.planner.policy
            curves = self._curves.due(policy, self._tap.info.max_batch)
            if curves is not None:
                output.__dict__[CURVES_ATTRIBUTE] = curves
        before, self._round = self._round, Round(begun, int(output.num_spec_tokens_to_schedule), self._number, prefill)
        step, verified, drafted_in = None, [], self._number - 1
        if rows and before is not None:
            drafted_in = before.number
            verified = [len(drafts.get(request, ())) for request in ids]
            step = self._open(rows, ids, verified, before, started, prefill)
            self._book.begin(step)
        else:
            self._book.interrupt()
        self._running[self._number] = Running(self._number, ids, step, drafted_in, verified)
        if len(self._running) > MOST_RUNNING:
            self._running.pop(next(iter(self._running)))

    def _open(self, rows: list[Any], ids: list[str], verified: list[int], before: Round, started: Any, prefill: bool) -> OpenStep:
        k, flags, widest = before.k, 0, max(verified)
        if prefill or before.prefill or any(_other_work(request) for request in rows):
            flags |= _DISTURBED
        if widest > k:  # near max_model_len: zeros as wide as the largest K, whatever K was asked for
            k, flags = widest, flags | _DISTURBED | _CENSORED
        begun = before.begun._replace(
            batch_size=len(rows),
            kv_tokens=sum(max(r.num_computed_tokens - v - 1, 0) for r, v in zip(rows, verified, strict=True)),
        )
        if before.begun.batch_size != len(rows):
            begun = begun._replace(flags=begun.flags & ~_TRIAL)
        step = OpenStep(begun, k, np.array([request_number(i) for i in ids], np.uint32), len(rows), started, flags=flags)
        step.verify_len = np.array(verified, np.uint8)
        step.num_tokens = len(rows) + sum(verified)
        step.padded_tokens = self._padded(step.num_tokens)
        if self._notes.come and contract.STAGE_TIMES not in self._notes.lost:
            step.stages["draft"] = (NotedTime(self._notes, before.number, "draft"),) * 2
            step.stages["verify"] = (NotedTime(self._notes, self._number, "verify"),) * 2
            step.drafts_next = (NotedTime(self._notes, self._number, "draft"),) * 2
            step.confidences = NotedConfidences(self._notes, before.number, ids, k)
        else:
            step.staged = False
        if sum(verified) < len(rows) * k:
            self.cut_steps += 1
        return step

    def _padded(self, tokens: int) -> int:
        at = bisect_left(self._graph_tokens, tokens)
        return self._graph_tokens[at] if at < len(self._graph_tokens) else tokens

    def results_before(self, scheduler: Any, output: Any, result: Any, *args: Any, **kwargs: Any) -> None:
        """Before vLLM takes a step's result: which drafts were accepted, and what the worker measured."""
        number = output.__dict__.pop(STEP_ATTRIBUTE, None)
        if number is None or scheduler is not self._scheduler:
            return
        self._notes.take(result.__dict__.pop(NOTES_ATTRIBUTE, ()))
        running = self._running.pop(number, None)
        if running is not None and running.step is not None:
            self._finish(scheduler, running, running.step, result)
        if self._writer.due:
            self.report(self._state, self._reason)

    def _finish(self, scheduler: Any, running: Running, step: OpenStep, result: Any) -> None:
        step.ended = self._clock.now()
        if self._trims:
            self._trimmed(step, running)
        stats = result.cudagraph_stats
        if stats is not None and not step.flags & _DISTURBED:
            step.padded_tokens = max(int(stats.num_padded_tokens), step.num_tokens or 0)
        accepted, counted = [], []
        for request in running.rows:
            row = result.req_id_to_index.get(request)
            tokens = result.sampled_token_ids[row] if row is not None and result.sampled_token_ids else ()
            known = scheduler.requests.get(request)
            accepted.append(max(len(tokens) - 1, 0))
            counted.append(len(tokens) > 0 and known is not None and not known.is_finished())
        if not self._notes.drafted(running.drafted_in) and step.k and max(running.verified, default=0):
            step.flags |= _DISTURBED | _CENSORED  # nothing was drafted: what was verified were zeros
        verified = np.array(running.verified, np.int64)
        self._book.result(step, accepted, counted, verified)
        rows = np.array(counted, bool)
        if self._history is not None and rows.any() and not step.flags & _CENSORED:
            right = np.maximum(np.minimum(np.array(accepted, np.int64), verified), 0)
            self._history.observe(step.request_ids[rows].tolist(), right[rows], verified[rows])

    def _trimmed(self, step: OpenStep, running: Running) -> None:
        """vLLM verified the most promising drafts only: how many tokens the worker tells, of which requests nobody does."""
        tokens = self._notes.tokens(running.number)
        step.flags |= _CENSORED
        if tokens is not None:
            step.num_tokens, step.padded_tokens = tokens, self._padded(tokens)
        elif any(running.verified):
            step.flags |= _DISTURBED

    # -- inside --------------------------------------------------------------------------------------------------------

    def _write(self, step: FinishedStep) -> None:
        if self._tap is not None:
            self._tap.end_step(
                time.monotonic_ns(), step.num_tokens, step.padded_tokens, step.draft_s, step.verify_s, step.draft_extend_s,
                step.step_s, step.confidences, step.verify_len, step.accept_len, step.request_ids, step.flags, step.begun,
            )  # fmt: skip

    @property
    def level(self) -> int:
        """What the plugin does now, 0..3, see `contract.LEVELS`."""
        if self._tap is None or self._guard.closed is not None:
            return 0
        if not self._notes.come or contract.STAGE_TIMES in self._notes.lost:
            return 1
        return 2 if contract.CONFIDENCES in self._notes.lost or self._settings.confidences == "off" else 3

    def _closed(self) -> None:
        """Detached: the launch schedule back."""
        if self._scheduler is not None and self._written_k is not None:
            self._scheduler.dynamic_sd_lookup[:] = self._launch_lookup
            self._written_k = None
        self.report("detached", self._guard.closed or "")

    def report(self, state: State, reason: str) -> None:
        """Write the engine report if it has changed. Never raises."""
        self._state, self._reason = state, reason
        counters: dict[str, int] = {}
        if self._tap is not None:
            counters = {**self._tap.counters._asdict(), "steps_lost": self._book.lost, "cut_steps": self.cut_steps}
            counters["preemptions"] = self.preemptions
        failures = {**self._notes.failures}
        for hook, count in self._guard.failures.items():
            failures[hook] = failures.get(hook, 0) + count
        self._writer.write(EngineReport(os.getpid(), self._engine, state, reason, failures, counters, self.level))


def request_number(request_id: str) -> int:
    return zlib.crc32(request_id.encode())


def _other_work(request: Any) -> bool:
    """Whether a request's step does work that the latency model does not cover: a grammar's masks, log-probabilities."""
    sampling = request.sampling_params
    return bool(request.use_structured_output) or (
        sampling is not None and (sampling.logprobs is not None or sampling.prompt_logprobs is not None)
    )
