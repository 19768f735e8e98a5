"""The hooks of a DSPARK server, in the order in which a decode step calls them.

    attach                                          once, while the server starts
    plan -> step -> draft -> verify -> results      every decode step; no `plan` without the overlap scheduler

DSpark always drafts gamma tokens; what varies is how many of each request are verified. So K is gamma, the granularity is by
request, and a policy acts through SGLang's own planner: its SPS table and temperatures, the rails of what it verifies
(`DSparkSwap`), and, for trials of a sweep or probe and for a pinned K, the number of draft tokens it verifies. A step is decided
where SGLang plans its budget: in `plan` under the overlap scheduler, else in `step`; in both before the hooks that may fail
(`Guard.around`, `first`). A trial of which another number of tokens ran is recorded as LIMITED, not as a trial.

Exceptions are caught by `hook_guard.Guard`; SGLang then runs the step without the plugin.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from adaptive_spec.domain.policy import Granularity, Mode, Policy
from adaptive_spec.domain.step_record import StepFlag
from adaptive_spec.engine_side.tap import BegunStep, EngineTap
from adaptive_spec.engines.common.hook_guard import Guard
from adaptive_spec.engines.common.plugin_settings import PluginSettings
from adaptive_spec.engines.common.stage_clock import clock_for
from adaptive_spec.engines.common.steps_in_flight import OpenStep
from adaptive_spec.engines.sglang import contract
from adaptive_spec.engines.sglang.attachment import Attachment, Place, decodes, kv_tokens_of, max_batch, request_id
from adaptive_spec.engines.sglang.dspark_swap import DSparkSwap, launch_temperatures, nothing_to_swap

SHARED_PLAN = (
    "attention DP: its ranks verify in one forward, whose size is the largest of their plans or all that is drafted, so no rank "
    "can choose its own (SGLang would have to plan one budget for all ranks)"
)
"""Why a rank with attention DP is not steered."""

log = logging.getLogger("sglang.adaptive_spec")


class _Decided(NamedTuple):
    """A step that is decided and not launched yet. asked_tokens: see `OpenStep`."""

    batch: Any
    begun: BegunStep
    asked_tokens: int | None = None


class DSparkAttachment(Attachment):
    """One per process. Swaps the SPS table in mode active where the planner uses one; observes otherwise."""

    REQUIRED_GROUPS = (contract.DSPARK,)

    def __init__(self, settings: PluginSettings, guard: Guard, engine: str) -> None:
        super().__init__(settings, guard, engine)
        self._planner: Any = None
        self._gamma = 0
        self._swap: DSparkSwap | None = None
        self._confidences: Any = None
        self._begun: _Decided | None = None

    # -- once ----------------------------------------------------------------------------------------------------------

    def worker_after(self, note: None, worker_class: Any, algorithm: Any, server_args: Any) -> None:
        """SGLang has chosen its DSPARK worker: find out whether it can be observed, and report it if not."""
        from adaptive_spec.engines.sglang.supported_servers import dspark_unsupported_reason

        reason = dspark_unsupported_reason(server_args)
        if reason is not None:
            log.warning("adaptive-spec: not attached: %s", reason)
            self.refuse(reason)

    def _before_capture(self, worker: Any) -> None:
        import torch

        from adaptive_spec.engines.sglang.confidences import LogitConfidences

        self._gamma, self._planner = int(worker.gamma), worker._verify_planner
        device = torch.device(str(worker.device))
        self._clock = clock_for(device.type)
        self._confidences = LogitConfidences(launch_temperatures(self._planner), max_batch(worker), self._gamma, device)

    def _begin(self, worker: Any, place: Place) -> None:
        self._first_rank = place.rank == 0
        reason = SHARED_PLAN if place.attention_dp > 1 else nothing_to_swap(self._planner)
        if reason is None and self._settings.mode == "active":
            self._swap = DSparkSwap(self._planner, self._gamma, self._confidences.temperatures)
        self._tap = self._open_tap(self._info(worker, place, self._gamma, (self._gamma,), Granularity.REQUEST), place)
        self._worker = worker
        self.report("attached" if reason is None else "observing", reason or "")
        log.info("adaptive-spec: DSPARK %s, mode %s, gamma %d. %s", self._state, self._settings.mode, self._gamma, reason or "")

    def _may_steer(self) -> bool:
        return self._swap is not None

    def _follow(self, policy: Policy) -> None:
        super()._follow(policy)
        if self._swap is not None:
            self._swap.check(policy)

    def _terms(self) -> int:
        return self._crc("dspark", self._gamma, self._swap.sizes if self._swap is not None else None)

    # -- every decode step ---------------------------------------------------------------------------------------------

    def plan_first(self, planner: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
        self._begun = None
        if self._inert:
            return
        if self._tap is not None and planner is self._planner and decodes(batch):
            with self._alike(batch):
                self._decide(self._tap, batch)

    def step_first(self, worker: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
        self._step, planned = None, self._begun
        self._begun = None
        if self._inert:
            return
        with self._alike(batch):
            tap = self._tap_for(worker, batch)
            if tap is None:
                return
            if planned is not None and planned.batch is batch:
                self._begun = planned
            else:
                self._decide(tap, batch)
            if self._swap is not None:
                self._swap.at_forward()

    def step_before(self, worker: Any, batch: Any, *args: Any, **kwargs: Any) -> OpenStep | None:
        if self._begun is None:
            return None
        decided, self._begun, started = self._begun, None, self._clock.now()
        ids = np.array([request_id(request) for request in batch.reqs], np.uint32)
        # The padding of the verify forward is not known yet.
        self._step = OpenStep(
            decided.begun, self._gamma, ids, len(ids), started, padded_tokens=0, asked_tokens=decided.asked_tokens
        )
        self._in_flight.begin(self._step)
        return self._step

    def draft_after(self, started: Any, proposal: Any, *args: Any, **kwargs: Any) -> None:
        if self._step is None or started is None:
            return
        self._step.stages["draft"] = (started, self._clock.now())
        if proposal.confidence_raw is not None:  # None in static mode, which has no confidence head
            self._step.confidences = self._confidences.send(proposal.confidence_raw)

    def verify_after(self, started: Any, result: Any, executor: Any, *args: Any, **kwargs: Any) -> None:
        """After the packed verify forward. num_tokens follows from verify_len, which comes with the result."""
        if self._step is None or started is None:
            return
        self._step.stages["verify"] = (started, self._clock.now())
        self._step.padded_tokens = int(kwargs["layout"].graph_num_tokens)

    verify_all_before = Attachment.verify_before

    def verify_all_after(self, started: Any, result: Any, executor: Any, *args: Any, **kwargs: Any) -> None:
        """After the verify forward over all drafted tokens."""
        step = self._step
        if step is None or started is None:
            return
        step.stages["verify"] = (started, self._clock.now())
        width, rows = self._gamma + 1, len(step.request_ids)
        computed = self._rows_computed(kwargs["batch"], rows)
        step.num_tokens, step.padded_tokens = rows * width, _padded_rows(executor, result, computed) * width

    def _verified(self, result: Any) -> NDArray[np.int64] | None:
        # cap_lens counts the bonus token. SGLang has copied it to the host with the accepted lengths.
        return None if result.cap_lens is None else result.cap_lens.numpy().astype(np.int64) - 1

    # -- inside --------------------------------------------------------------------------------------------------------

    def _decide(self, tap: EngineTap, batch: Any) -> None:
        """Begin a step and set the planner for it."""
        rows, kv_tokens = len(batch.reqs), kv_tokens_of(batch)
        tap.begin_step(rows, kv_tokens, time.monotonic_ns())
        begun = tap.begun
        if self._swap is None:
            # The policy does not act on this step, so the record names none.
            begun = BegunStep(begun.step, self._gamma, rows, kv_tokens, 0, 0)
        self._begun = _Decided(batch, begun)
        if self._swap is None:
            return
        planner, refused = tap.planner, self._swap.refused
        policy = planner.policy if not begun.flags & StepFlag.FALLBACK else None
        self._swap.at_plan(policy, kv_tokens / max(rows, 1))
        if self._steering is not None and self._swap.refused != refused:
            self._steering.fail(f"a policy that all ranks had accepted was refused: {self._swap.reason}")
        drafted, wanted = rows * self._gamma, None
        if policy is not None and policy.acting:
            if planner.in_trial:
                asked = planner.trial_tokens or rows + drafted
                wanted = self._swap.within(min(max(asked - rows, 0), drafted), rows)
                as_asked = asked == rows + wanted
                self._begun = _Decided(batch, begun, self._swap.tokens(wanted, rows) if as_asked else asked)
            elif policy.mode is Mode.PINNED:
                wanted = self._swap.within(drafted, rows)
        self._swap.force(wanted, rows)

    def _closed(self) -> None:
        # With several ranks the planner keeps the policy in use until all ranks leave in the same step.
        if self._swap is not None and self._steering is None:
            try:
                self._swap.force(None, 1)
                self._swap.restore()
                self._swap.at_forward()
            except Exception as error:
                log.warning("adaptive-spec: the planner could not be restored: %s", error)
        super()._closed()

    def _counters(self) -> dict[str, int]:
        counters = super()._counters()
        if self._swap is not None:
            counters |= {"sps_swaps": self._swap.swaps, "sps_refusals": self._swap.refused}
        return counters


def _padded_rows(executor: Any, result: Any, rows: int) -> int:
    """Requests after padding to the graph that ran, if one did."""
    runner = executor.model_runner.decode_cuda_graph_runner
    if not result.can_run_cuda_graph or runner is None or runner.ragged_verify_mode:
        return rows
    at = bisect_left(runner.capture_bs, rows)
    return int(runner.capture_bs[at]) if at < len(runner.capture_bs) else rows
