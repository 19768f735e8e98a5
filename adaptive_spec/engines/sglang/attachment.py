"""What the plugin holds on to in one scheduler process: the hooks' bodies, in the order in which a decode step meets them.

    worker, controller, attach      once, while the server starts
    step -> draft, draft_forward -> verify -> draft_extend -> results      every decode step

Nothing here guards itself: `hooks.Guard` catches whatever is raised and leaves the step to SGLang.
"""

from __future__ import annotations

import logging
import os
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adaptive_spec import __version__
from adaptive_spec.batch_scores import AcceptanceHistory, refined_k
from adaptive_spec.engine_info import EngineInfo
from adaptive_spec.engine_report import EngineReport, State, write_report
from adaptive_spec.engines.sglang.draft_policy import SidecarDraftPolicy
from adaptive_spec.engines.sglang.hooks import Guard
from adaptive_spec.engines.sglang.plugin_settings import PluginSettings
from adaptive_spec.engines.sglang.ranks import Group, RankedTap, Rendezvous, TorchGroup, agree
from adaptive_spec.engines.sglang.stage_clock import HostClock, StageClock, clock_for
from adaptive_spec.engines.sglang.step_book import FinishedStep, OpenStep, StepBook
from adaptive_spec.policy import Granularity
from adaptive_spec.records import MAX_BATCH_LIMIT
from adaptive_spec.tap import BegunStep, EngineTap

STEP_ATTRIBUTE = "adaptive_spec_step"
"""Where a step travels on SGLang's result object."""
REPORT_INTERVAL_S = 1.0
REQUESTS_REMEMBERED = 4096
LAUNCH = -1

log = logging.getLogger("sglang.adaptive_spec")


class Place(NamedTuple):
    """One of `ranks` tensor-parallel ranks. group: theirs, None for a single one."""

    rank: int
    ranks: int
    group: Group | None


class Attachment:
    """One per process. active: decide K; otherwise watch only (shadow, or a server whose K cannot change)."""

    def __init__(self, settings: PluginSettings, guard: Guard, engine: str) -> None:
        self._settings, self._guard, self._engine = settings, guard, engine
        guard.on_close = self._closed
        self._state: State = "refused"
        self._reason = ""
        self._supported = False
        self._refused = False
        self._rendezvous: Rendezvous | None = None
        self._policy: SidecarDraftPolicy | None = None
        self._worker: Any = None
        self._tap: EngineTap | None = None
        self._clock: StageClock = HostClock()
        self._book = StepBook(self._write)
        self._history: AcceptanceHistory | None = None
        self._confidences: Any = None
        self._step: OpenStep | None = None
        self._decided: int | None = None
        self._first_rank = True
        self._report_at_s = 0.0
        self._reported: EngineReport | None = None

    # -- once ----------------------------------------------------------------------------------------------------------

    def worker_after(self, note: None, worker_class: Any, algorithm: Any, server_args: Any) -> None:
        """SGLang has chosen its speculative worker: say whether K can be decided for it, in SGLang's own words."""
        from adaptive_spec.engines.sglang.unsupported import can_observe, unsupported_reason

        reason = unsupported_reason(server_args)
        self._supported = reason is None
        if reason is None:
            return
        log.warning("adaptive-spec: K is not decided here: %s", reason)
        if not can_observe(server_args):
            self._refused = True
            self._guard.closed = reason
        self.report("refused", reason)

    def draft_policy(self, worker: Any, stock: Any) -> Any:
        """The policy AdaptiveController is given in place of SGLang's own."""
        if self._guard.closed is not None or not self._supported:
            return stock
        self._guard.fault("controller")
        self._policy = SidecarDraftPolicy(stock, int(worker.speculative_num_steps), self._k_decided)
        return self._policy

    def attach(self, original: Callable[..., None], worker: Any) -> None:
        """Around the capture of all states. Guards itself: with several ranks each must reach `agree`, whatever failed here."""
        guard = self._guard
        well = guard.closed is None and self._guarded("attach", self._before_capture, worker)
        original(worker)
        if self._refused:
            return
        try:
            place = self._place()
        except Exception:
            guard.failed("attach")
            return
        well = well and self._guarded("attach/after", self._begin, worker, place)
        if place.group is None:
            return
        try:
            guard.lockstep = agree(place.group, place.rank, place.ranks, self._terms() if well else 0)
        except Exception:
            guard.failed("attach")
        if not guard.lockstep:
            self._tap = None
            guard.close("the ranks do not agree: a hook failed on one of them, or they were told different things")

    def _guarded(self, name: str, call: Callable[..., None], *args: Any) -> bool:
        try:
            self._guard.fault(name)
            call(*args)
        except Exception:
            self._guard.failed("attach")
            return False
        return True

    def _before_capture(self, worker: Any) -> None:
        """Before the CUDA graphs are captured: what computes confidences must become part of them."""
        import torch

        from adaptive_spec.engines.sglang.confidences import ConfidenceTap

        captured = self._policy.captured if self._policy is not None else (int(worker.speculative_num_steps),)
        device = torch.device(str(worker.device))
        self._clock = clock_for(device.type)
        self._confidences = ConfidenceTap(worker._draft_worker, _max_batch(worker), max(captured), device)

    def _place(self) -> Place:
        """Which of the tensor-parallel ranks this is."""
        from sglang.srt.runtime_context import get_parallel

        parallel = get_parallel()
        rank, ranks = int(parallel.tp_rank), int(parallel.tp_size)
        group = TorchGroup(parallel.tp_group.cpu_group, parallel.tp_group.first_rank) if ranks > 1 else None
        return Place(rank, ranks, group)

    def _begin(self, worker: Any, place: Place) -> None:
        """All states are captured: tell the sidecar what this engine can do, and begin."""
        controller = worker.adaptive_controller
        launch_k = int(worker.speculative_num_steps)
        candidates = tuple(sorted(int(k) for k in controller._states)) if controller is not None else (launch_k,)
        if self._policy is not None:
            self._policy.captured = candidates
        model, gpu = Path(str(worker.server_args.model_path)).name, _device_name(str(worker.device))
        info = EngineInfo(
            name="sglang", model=model, gpu=gpu, tp=place.ranks, launch_k=launch_k, candidates=candidates,
            max_batch=_max_batch(worker), granularity=Granularity.BATCH, holds_batch=False, pid=os.getpid(),
        )  # fmt: skip
        self._first_rank = place.rank == 0
        scores = self._settings.batch_scores
        if scores == "on" or (scores == "auto" and place.ranks == 1):
            self._history = AcceptanceHistory(max(candidates[-1], 1), REQUESTS_REMEMBERED)
        self._tap = self._open_tap(info, place)
        self._worker = worker
        if self._policy is not None:
            self.report("attached", "")
            log.info("adaptive-spec: attached, mode %s, K %d at launch, candidates %s", self._settings.mode, launch_k, candidates)
        else:
            self.report("observing", self._reason)

    def _open_tap(self, info: EngineInfo, place: Place) -> EngineTap:
        settings = self._settings
        if place.group is None:
            return EngineTap.open(settings.runtime_dir, info, settings.max_age_s)
        self._rendezvous = Rendezvous(place.group, place.rank, settings.rendezvous_steps)
        # Only the ring of an opened tap is needed, and only on rank 0: the others have nothing to write and nothing to read.
        first = EngineTap.open(settings.runtime_dir, info, settings.max_age_s) if place.rank == 0 else None
        ring = first.detach_ring() if first is not None else None
        return RankedTap(settings.runtime_dir, info, ring, self._rendezvous, settings.max_age_s)

    def _terms(self) -> int:
        """A number that says all that K depends on beside the policy; never 0."""
        settings, policy = self._settings, self._policy
        terms = (
            settings.mode, settings.rendezvous_steps, self._history is not None, settings.k_min, settings.k_max,
            policy.captured if policy is not None else None, __version__,
        )  # fmt: skip
        return zlib.crc32(repr(terms).encode()) + 1

    # -- every decode step ---------------------------------------------------------------------------------------------

    def step_before(self, worker: Any, batch: Any, *args: Any, **kwargs: Any) -> OpenStep | None:
        self._step = self._decided = None
        tap = self._tap
        if tap is None or worker is not self._worker:
            return None
        if batch.forward_mode.is_extend() or batch.is_extend_in_batch or batch.forward_mode.is_idle():
            self._book.interrupt()
            return None
        rows, kv_tokens = len(batch.reqs), _kv_tokens(batch)
        closed = self._guard.closed is not None
        if closed and self._rendezvous is not None:
            self._rendezvous.failed = True  # at the next meeting all ranks go back to the launch K
        started = self._clock.now() if not closed else None
        # First of all, and whatever fails later: the ranks meet in here.
        k = tap.begin_step(rows, kv_tokens, time.monotonic_ns())
        begun = tap.begun
        policy = self._policy
        ids = [_request_id(request) for request in batch.reqs]
        if policy is not None and self._settings.mode == "active":
            self._decided = k = policy.nearest(rows, k)
            if begun.policy_version:
                self._decided = k = self._by_scores(policy, ids, batch, k, kv_tokens)
        else:
            # What a policy would do is none of this step's doing.
            begun = BegunStep(begun.step, k, rows, kv_tokens, 0, 0)
        if started is None:
            return None
        padded = policy.padded_rows(rows) if policy is not None else rows
        self._step = OpenStep(begun, k, np.array(ids, np.uint32), padded, started)
        self._book.begin(self._step)
        return self._step

    def step_after(self, step: OpenStep | None, result: Any, worker: Any, *args: Any, **kwargs: Any) -> None:
        self._step = None
        if step is None:
            return
        step.k = int(worker.speculative_num_steps)
        step.ended = self._clock.now()
        setattr(result, STEP_ATTRIBUTE, step)
        now_s = time.monotonic()
        if now_s >= self._report_at_s:
            self.report(self._state, self._reason)

    def draft_before(self, *args: Any, **kwargs: Any) -> Any:
        return self._clock.now() if self._step is not None else None

    def draft_after(self, started: Any, verify_input: Any, draft_worker: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
        step = self._step
        if step is None or started is None:
            return
        step.stages["draft"] = (started, self._clock.now())
        step.confidences = self._confidences.after_draft(batch.spec_info.topk_p, int(draft_worker.speculative_num_steps))

    def draft_forward_before(self, draft_worker: Any, forward_batch: Any) -> None:
        if self._confidences is not None:
            self._confidences.before_draft_forward()

    def draft_forward_after(self, note: None, result: Any, draft_worker: Any, forward_batch: Any) -> None:
        if self._confidences is not None and not forward_batch.forward_mode.is_idle():
            self._confidences.after_draft_forward()

    def verify_before(self, *args: Any, **kwargs: Any) -> Any:
        return self._clock.now() if self._step is not None else None

    def verify_after(self, started: Any, *args: Any, **kwargs: Any) -> None:
        if self._step is not None and started is not None:
            self._step.stages["verify"] = (started, self._clock.now())

    def draft_extend_before(self, *args: Any, **kwargs: Any) -> Any:
        if self._step is None:
            return None
        self._confidences.before_extend()
        return self._clock.now()

    def draft_extend_after(
        self, started: Any, result: Any, draft_worker: Any, batch: Any, batch_result: Any, *args: Any, **kwargs: Any
    ) -> None:
        if self._step is None or started is None:
            return
        self._step.stages["draft_extend"] = (started, self._clock.now())
        self._confidences.after_extend(batch_result.next_draft_input)

    def results_before(self, processor: Any, result: Any, batch: Any) -> list[bool]:
        """Which requests SGLang counts: those that have not ended since the step was launched."""
        return [not (request.is_retracted or request.finished()) for request in batch.reqs]

    def results_after(self, counted: list[bool], tokens: Any, processor: Any, result: Any, batch: Any) -> None:
        step = getattr(result, STEP_ATTRIBUTE, None)
        if step is None:
            return
        delattr(result, STEP_ATTRIBUTE)
        self._book.result(step, result.num_correct_drafts_per_req_cpu, counted)
        history = self._history
        if history is not None and step.accept_len is not None and step.counted is not None:
            history.observe(step.request_ids[step.counted].tolist(), step.accept_len[step.counted], step.k)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _k_decided(self) -> int | None:
        """See `SidecarDraftPolicy`. Never raises."""
        if self._policy is None or self._tap is None or self._settings.mode != "active":
            return None
        ours = self._decided is not None and (self._guard.closed is None or self._guard.lockstep)
        return self._decided if ours else LAUNCH

    def _by_scores(self, policy: SidecarDraftPolicy, ids: list[int], batch: Any, k: int, kv_tokens: int) -> int:
        """K of this step from the batch's own scores, where the policy leaves the choice open."""
        if self._history is None or self._tap is None:
            return k
        settings = self._settings
        candidates = [c for c in policy.allowed(len(ids)) if c == k or settings.k_min <= c <= settings.k_max]
        first = batch.spec_info.topk_p
        # On a GPU the host would have to wait for it: there the history decides alone.
        known = first.reshape(-1).numpy() if first is not None and first.device.type == "cpu" and len(first) == len(ids) else None
        return refined_k(self._history, self._tap.planner, ids, known, k, kv_tokens, policy.padded_rows(len(ids)), candidates)

    def _write(self, step: FinishedStep) -> None:
        if self._tap is not None and self._first_rank:
            self._tap.end_step(
                time.monotonic_ns(), step.num_tokens, step.padded_tokens, step.draft_s, step.verify_s, step.draft_extend_s,
                step.step_s, step.confidences, step.verify_len, step.accept_len, step.request_ids, step.flags, step.begun,
            )  # fmt: skip

    def _closed(self) -> None:
        self.report("detached", self._guard.closed or "")

    def report(self, state: State, reason: str) -> None:
        """Tell the sidecar how this side stands, if that is news. Never raises."""
        self._state, self._reason = state, reason
        self._report_at_s = time.monotonic() + REPORT_INTERVAL_S
        if not self._first_rank:
            return
        try:
            counters = {**self._tap.counters._asdict(), "steps_lost": self._book.lost} if self._tap is not None else {}
            report = EngineReport(os.getpid(), self._engine, state, reason, dict(self._guard.failures), counters)
            if report != self._reported:
                self._settings.runtime_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
                write_report(self._settings.runtime_dir, report)
                self._reported = report
        except Exception as error:
            log.warning("adaptive-spec: the report could not be written: %s", error)
            self._report_at_s = time.monotonic() + 60.0


def _request_id(request: Any) -> int:
    return zlib.crc32(request.rid.encode())


def _kv_tokens(batch: Any) -> int:
    """Context tokens of the batch, from what the host knows: the same on every rank, and never a wait for the GPU."""
    if batch.seq_lens_sum is not None:
        return int(batch.seq_lens_sum)
    return sum(len(request.origin_input_ids) + len(request.output_ids) for request in batch.reqs)


def _max_batch(worker: Any) -> int:
    return min(int(worker._target_worker.model_runner.max_running_requests), MAX_BATCH_LIMIT)


def _device_name(device: str) -> str:
    import torch

    from adaptive_spec.engines.embedded.models import device_name

    return device_name(torch.device(device))
