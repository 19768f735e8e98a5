"""What all algorithms share: attach, join the other ranks, open the tap, take results, write the engine report.

    attach                          once, while the server starts: `_before_capture`, SGLang's own work, `_begin`
    broadcast                       every loop of the scheduler, where K is decided for several ranks
    results                         every decode step, after the algorithm's own hooks

Only `attach` and `report` catch their own exceptions. Those of all other hooks are caught by `hook_guard.Guard`.
"""

from __future__ import annotations

import logging
import os
import time
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from adaptive_spec import __version__
from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.domain.policy import Granularity, Policy
from adaptive_spec.domain.step_record import StepFlag
from adaptive_spec.engine_side.tap import EngineTap
from adaptive_spec.engines.common.hook_guard import Guard
from adaptive_spec.engines.common.identity import config_hash, fingerprint, known, model_name
from adaptive_spec.engines.common.plugin_settings import PluginSettings
from adaptive_spec.engines.common.report_writer import ReportWriter
from adaptive_spec.engines.common.stage_clock import HostClock, StageClock
from adaptive_spec.engines.common.steps_in_flight import FinishedStep, OpenStep, StepsInFlight
from adaptive_spec.engines.sglang import contract, supported_servers
from adaptive_spec.engines.sglang.ranks import Notes, RankedTap, Steering, carried, try_policy
from adaptive_spec.engines.static_contract import installed, unmet
from adaptive_spec.wire.engine_report import EngineReport, State
from adaptive_spec.wire.slot import MAX_BATCH_LIMIT

STEP_ATTRIBUTE = "adaptive_spec_step"
"""Attribute of SGLang's result object that holds its step."""

_DISTURBED = int(StepFlag.DISTURBED)

log = logging.getLogger("sglang.adaptive_spec")


class Place(NamedTuple):
    """The place of this process among `ranks` tensor-parallel ranks. first: global rank of the first of them.

    attention_dp: ranks whose attention is data-parallel, 1 without. Then `rank` counts within the ranks that share batches.
    """

    rank: int
    ranks: int
    first: int = 0
    attention_dp: int = 1

    @property
    def agree(self) -> bool:
        """Whether several ranks must decide alike. With attention DP, SGLang changes K on none of them."""
        return self.ranks > 1 and self.attention_dp == 1


class Attachment:
    """The plugin's state in one scheduler process. One per process and algorithm; see the module.

    REQUIRED_GROUPS, OPTIONAL_GROUPS: of `contract`, without which it does not attach, or attaches at a lower level. PARTS: group
    of each part of a hook that may fail without the rest.
    """

    REQUIRED_GROUPS: ClassVar[tuple[str, ...]] = ()
    OPTIONAL_GROUPS: ClassVar[tuple[str, ...]] = ()
    PARTS: ClassVar[Mapping[str, str]] = {}

    def __init__(self, settings: PluginSettings, guard: Guard, engine: str) -> None:
        self._settings, self._guard, self._engine = settings, guard, engine
        guard.on_close, guard.on_lose, guard.optional = self._closed, self._lost, self.OPTIONAL_GROUPS
        groups = (*self.REQUIRED_GROUPS, *self.OPTIONAL_GROUPS)
        guard.groups = {need.hook: need.group for group in groups for need in contract.hooks_of(group)} | dict(self.PARTS)
        self._state: State = "refused"
        self._reason = ""
        self._refused = False
        self._supported = False
        """Whether K can be decided on this server."""
        self._steering: Steering | None = None
        """Set with several ranks."""
        self._worker: Any = None
        self._tap: EngineTap | None = None
        self._clock: StageClock = HostClock()
        self._in_flight = StepsInFlight(self._write)
        self._step: OpenStep | None = None
        self._first_rank = True
        self._attention_dp = False
        self._writer = ReportWriter(settings.runtime_dir, log)

    # -- once ----------------------------------------------------------------------------------------------------------

    def own_hooks(self) -> dict[str, Callable[..., None]]:
        """Hooks that are no pair of `{hook}_before` and `{hook}_after` under the guard."""
        return {"attach": self.attach}

    def worker_after(self, note: None, worker_class: Any, algorithm: Any, server_args: Any) -> None:
        """SGLang has chosen its worker: refuse it if it cannot be observed, and report it if K cannot be decided for it."""
        reason = supported_servers.refusal(server_args)
        if reason is not None:
            log.warning("adaptive-spec: not attached: %s", reason)
            self.refuse(reason)
            return
        reason = self._why_k_is_fixed(server_args)
        self._supported = reason is None
        if reason is not None:
            log.warning("adaptive-spec: K is not decided here: %s", reason)
            self.report("refused", reason)

    def _why_k_is_fixed(self, server_args: Any) -> str | None:
        """Why K cannot be decided on a server whose steps can be observed, None if it can."""
        return supported_servers.unsupported_reason(server_args)

    def refuse(self, reason: str) -> None:
        """Do not attach to this server: close the guard and report why."""
        self._refused = True
        self._guard.closed = reason
        self.report("refused", reason)

    def attach(self, original: Callable[..., None], worker: Any, *args: Any, **kwargs: Any) -> None:
        """Around the capture of all states. Catches its own exceptions: rank 0 must learn of those of the others."""
        guard = self._guard
        well = guard.closed is None and self._guarded("attach", self._before_capture, worker)
        original(worker, *args, **kwargs)
        if self._refused:
            return
        try:
            place = self._place()
        except Exception:
            guard.failed("attach")
            return
        well = well and self._guarded("attach/after", self._begin, worker, place)
        if place.agree and self._settings.mode == "active" and (not well or self._may_steer()):
            self._join_ranks(place, well)

    def _guarded(self, name: str, call: Callable[..., None], *args: Any) -> bool:
        try:
            self._guard.fault(name)
            call(*args)
        except Exception:
            self._guard.failed("attach")
            return False
        return True

    def _before_capture(self, worker: Any) -> None:
        """Prepare what SGLang's CUDA graphs must contain, before they are captured."""

    def _begin(self, worker: Any, place: Place) -> None:
        """SGLang is ready: publish the engine's abilities and open the tap."""
        raise NotImplementedError

    def _may_steer(self) -> bool:
        """Whether a policy can change anything on this server in mode active."""
        raise NotImplementedError

    def _follow(self, policy: Policy) -> None:
        """Raise if this rank could not execute the policy. Changes nothing."""
        assert self._tap is not None
        try_policy(self._tap.info)(policy)

    def _terms(self) -> int:
        """Checksum of everything beside the policy that the ranks' decisions depend on; never 0."""
        raise NotImplementedError

    def _crc(self, *terms: object) -> int:
        settings = self._settings
        whole = (settings.mode, settings.fallback, __version__, *terms)
        return zlib.crc32(repr(whole).encode()) + 1

    def _place(self) -> Place:
        """Which of the tensor-parallel ranks this is."""
        from sglang.srt.runtime_context import get_parallel

        parallel = get_parallel()
        rank, ranks, attention_dp = int(parallel.tp_rank), int(parallel.tp_size), rank_of(parallel, "attn_dp_size") or 1
        if attention_dp > 1:
            rank %= max(ranks // attention_dp, 1)  # SGLang numbers the ranks of one batch in a row
        return Place(rank, ranks, int(parallel.tp_group.first_rank), attention_dp)

    def _info(
        self, worker: Any, place: Place, launch_k: int, candidates: tuple[int, ...], granularity: Granularity,
        allowed_from: tuple[tuple[int, tuple[int, ...]], ...] = (),
    ) -> EngineInfo:  # fmt: skip
        names = ("quantization", "dtype", "kv_cache_dtype", "attention_backend", "speculative_algorithm")
        options = known(worker.server_args, names)
        paths = known(worker.server_args, ("served_model_name", "speculative_draft_model_path"))
        path, draft_path = str(worker.server_args.model_path), paths["speculative_draft_model_path"]
        loaded = getattr(getattr(_target_runner(worker), "model_config", None), "hf_config", None)
        return EngineInfo(
            name="sglang", model=model_name(path, paths["served_model_name"]),
            gpu=_device_name(str(worker.device)),
            tp=place.ranks, launch_k=launch_k, candidates=candidates, max_batch=max_batch(worker), granularity=granularity,
            holds_batch=False, pid=os.getpid(), allowed_from=allowed_from,
            fingerprint=fingerprint(
                engine=self._engine, target=config_hash(path, loaded), draft=config_hash(draft_path) if draft_path else None,
                target_path=path, draft_path=draft_path, **options,
            ),
        )  # fmt: skip

    def _open_tap(self, info: EngineInfo, place: Place) -> EngineTap:
        settings = self._settings
        self._attention_dp = place.attention_dp > 1
        if not place.agree:
            if place.rank == 0:
                return EngineTap.open(settings.runtime_dir, info, settings.max_age_s)
            return EngineTap(settings.runtime_dir, info, None, settings.max_age_s)
        self._steering = Steering(place.rank, settings.ranks_timeout_s, self._follow)
        self._steering.on_leave = self._ranks_left
        # Rank 0 alone writes the ring and reads the page; of its opened tap only the ring is kept.
        first = EngineTap.open(settings.runtime_dir, info, settings.max_age_s) if place.rank == 0 else None
        ring = first.detach_ring() if first is not None else None
        tap = RankedTap(settings.runtime_dir, info, ring, self._steering, settings.max_age_s)
        if first is not None:
            tap.take_role(first)
        return tap

    # -- several ranks -------------------------------------------------------------------------------------------------

    def _join_ranks(self, place: Place, well: bool) -> None:
        """State this rank's terms, and carry messages with SGLang's requests. A rank that cannot states 0."""
        well = well and self._guarded("attach/ranks", self._hook_broadcast)
        if place.rank == 0 and not well:
            return  # nobody hears from rank 0: all stay with SGLang's own policy
        try:
            notes = self._notes(place, self._terms() if well else 0)
            if self._steering is not None and well:
                self._steering.join(notes)
        except Exception:
            self._guard.failed("attach")

    def _notes(self, place: Place, terms: int) -> Notes:
        from adaptive_spec.engines.sglang.rank_notes import StoreNotes, default_store

        return StoreNotes(lambda: default_store(f"adaptive_spec/{place.first}"), place.rank, place.ranks, terms)

    def _hook_broadcast(self) -> None:
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        tree = installed("sglang")
        missing = unmet(tree, contract.needs_of((contract.RANKS,))) if tree is not None else ["its source"]
        if missing:
            raise RuntimeError(f"{self._engine} lacks {missing[0]}")
        [need] = contract.hooks_of(contract.RANKS)
        HookRegistry.register(need.path, self.broadcast, HookType.AROUND)
        HookRegistry.apply_hooks()

    def broadcast(self, original: Callable[..., Any], receiver: Any, requests: Any, *args: Any, **kwargs: Any) -> Any:
        """Around SGLang's broadcast of the requests it has received: rank 0 adds a message, every rank takes it out."""
        steering, tap = self._steering, self._tap
        if self._first_rank and steering is not None and isinstance(tap, RankedTap):
            message = steering.outgoing(lambda: self._page_policy(tap), time.monotonic())
            if message is not None:
                requests = [*(requests or ()), tuple(message)]
        result = original(receiver, requests, *args, **kwargs)
        if not result or steering is None:
            return result
        kept, messages = carried(result)
        for message in messages:
            steering.incoming(message)
        return kept

    @contextmanager
    def _alike(self, batch: Any) -> Iterator[None]:
        """Around the decision of a step. A rank that cannot take it has no way to follow the others: all leave."""
        steering = self._steering
        try:
            if steering is not None and steering.steers:
                steering.forward_pass = int(batch.forward_iter)
            failures = self._tap.counters.hook_failures if steering is not None and self._tap is not None else 0
            yield
            if steering is not None and self._tap is not None and self._tap.counters.hook_failures != failures:
                raise RuntimeError("the decision of a step failed")
        except Exception as error:
            if steering is not None:
                steering.fail(f"the decision of a step: {type(error).__name__}: {error}")
            raise

    def _page_policy(self, tap: RankedTap) -> Policy | None:
        self._guard.fault("broadcast")
        return tap.page_policy(time.monotonic_ns())

    def _ranks_left(self) -> None:
        self._guard.failures["ranks"] += 1
        if self._guard.closed is not None:
            self.report(self._state, self._reason)
        elif self._steering is not None:
            self.report("observing", f"the ranks left K to the fallback: {self._steering.left}")

    # -- every decode step ---------------------------------------------------------------------------------------------

    @property
    def _inert(self) -> bool:
        """Detached, and no other rank relies on this one: nothing is decided any more."""
        return self._guard.closed is not None and self._steering is None

    def _tap_for(self, worker: Any, batch: Any) -> EngineTap | None:
        """The tap, for a decode step of the attached worker; else None. Any other batch interrupts the steps in flight."""
        if self._tap is None or worker is not self._worker:
            return None
        if not decodes(batch):
            self._in_flight.interrupt()
            return None
        return self._tap

    def _rows_computed(self, batch: Any, rows: int) -> int:
        """Requests of the largest batch in this forward. With attention DP the ranks run one forward together, and each computes
        as many tokens as the rank that has most; SGLang notes the requests of all of them.
        """
        of_all = known(batch, ("global_num_tokens",))["global_num_tokens"] if self._attention_dp else None
        return max(rows, *of_all) if of_all else rows

    def draft_before(self, *args: Any, **kwargs: Any) -> Any:
        return self._clock.now() if self._step is not None else None

    def verify_before(self, *args: Any, **kwargs: Any) -> Any:
        return self._clock.now() if self._step is not None else None

    def step_after(self, step: OpenStep | None, result: Any, worker: Any, *args: Any, **kwargs: Any) -> None:
        self._step = None
        if step is None:
            return
        self._on_launched(step, worker)
        step.ended = self._clock.now()
        setattr(result, STEP_ATTRIBUTE, step)
        self._report_when_due()

    def _on_launched(self, step: OpenStep, worker: Any) -> None:
        """Called when a step was launched."""

    def results_before(self, processor: Any, result: Any, batch: Any) -> list[bool]:
        """Which requests SGLang counts: those that have not ended since the step was launched."""
        return [not (request.is_retracted or request.finished()) for request in batch.reqs]

    def results_after(self, counted: list[bool], tokens: Any, processor: Any, result: Any, batch: Any) -> None:
        step = getattr(result, STEP_ATTRIBUTE, None)
        if step is None:
            return
        delattr(result, STEP_ATTRIBUTE)
        self._in_flight.result(step, result.num_correct_drafts_per_req_cpu, counted, self._verified(result))
        self._on_result(step)

    def _verified(self, result: Any) -> NDArray[np.int64] | None:
        """Draft tokens verified by row [b]; None for all that were drafted."""
        return None

    def _on_result(self, step: OpenStep) -> None:
        """Called when the result of a step was taken."""

    # -- inside --------------------------------------------------------------------------------------------------------

    def _write(self, step: FinishedStep) -> None:
        if self._tap is not None and self._first_rank:
            self._tap.end_step(
                time.monotonic_ns(), step.num_tokens, step.padded_tokens, step.draft_s, step.verify_s, step.draft_extend_s,
                step.step_s, step.confidences, step.verify_len, step.accept_len, step.request_ids, step.flags, step.begun,
            )  # fmt: skip

    @property
    def level(self) -> int | None:
        """What the plugin does now, 0..3, see `contract.LEVELS`: at 0 it only reports. None: no levels."""
        if not self.OPTIONAL_GROUPS:
            return None
        if not self._tap or self._guard.closed is not None:
            return 0
        return 1 + sum(group not in self._guard.lost for group in self.OPTIONAL_GROUPS)

    def _lost(self, group: str) -> None:
        """A group ended, see `Guard.lose`; what it measured is not there from now on."""
        if self._tap is not None:
            self.report(self._state, self._reason)

    def _closed(self) -> None:
        if self._steering is not None:
            self._steering.fail(self._guard.closed or "")
        self.report("detached", self._guard.closed or "")

    def _counters(self) -> dict[str, int]:
        if self._tap is None:
            return {}
        counters = {**self._tap.counters._asdict(), "steps_lost": self._in_flight.lost}
        if self._steering is not None:
            counters |= {"rank_swaps": self._steering.adopted, "rank_refusals": self._steering.refused}
        return counters

    def _report_when_due(self) -> None:
        if self._first_rank and self._writer.due:
            self.report(self._state, self._reason)

    def report(self, state: State, reason: str) -> None:
        """Write the engine report if it has changed, or was deleted or damaged. Never raises."""
        self._state, self._reason = state, reason
        if self._first_rank:
            self._writer.write(
                EngineReport(os.getpid(), self._engine, state, reason, dict(self._guard.failures), self._counters(), self.level)
            )


def rank_of(parallel: Any, name: str) -> int | None:
    """A rank or a width that SGLang may not have set, by the name of the attribute."""
    try:
        value = getattr(parallel, name)
    except Exception:  # SGLang raises various kinds for what is not set
        return None
    return int(value) if value is not None else None


def decodes(batch: Any) -> bool:
    """Whether a batch is a decode step: no prefill is in it, and it is not idle."""
    return not (batch.forward_mode.is_extend() or batch.is_extend_in_batch or batch.forward_mode.is_idle())


def request_id(request: Any) -> int:
    return zlib.crc32(request.rid.encode())


def kv_tokens_of(batch: Any) -> int:
    """Context tokens of the batch, from what the host knows: the same on every rank, and never a wait for the GPU."""
    if batch.seq_lens_sum is not None:
        return int(batch.seq_lens_sum)
    return sum(len(request.origin_input_ids) + len(request.output_ids) for request in batch.reqs)


def waits_on_the_host(batch: Any) -> int:
    """DISTURBED for a batch whose verify stage does work that the latency model does not cover, else 0.

    Grammars: verify waits for the drafted tokens on the host and computes the mask there. Log-probabilities: verify computes
    them over the vocabulary for every accepted token. Hidden states: those of every token are kept and copied to the host.
    """
    other = batch.has_grammar or batch.return_logprob or getattr(batch, "return_hidden_states", False)
    return _DISTURBED if other else 0


def _target_runner(worker: Any) -> Any:
    """The target's model runner, of a speculative worker or of the target's own."""
    return getattr(worker, "_target_worker", worker).model_runner


def max_batch(worker: Any) -> int:
    return min(int(_target_runner(worker).max_running_requests), MAX_BATCH_LIMIT)


def graph_rows(worker: Any) -> list[int]:
    """Batch sizes of the target's captured graphs, ascending; empty without graphs."""
    sizes = getattr(getattr(_target_runner(worker), "decode_cuda_graph_runner", None), "capture_bs", None)
    return sorted(int(size) for size in sizes or ())


def padded_rows(graphs: Sequence[int], rows: int) -> int:
    """Requests after padding to the next graph size; a batch beyond all graphs runs as it is."""
    at = bisect_left(graphs, rows)
    return graphs[at] if at < len(graphs) else rows


def _device_name(device: str) -> str:
    import torch

    from adaptive_spec.engines.torch_device import device_name

    return device_name(torch.device(device))
