"""The hooks of an EAGLE server, in the order in which a decode step calls them.

    worker, controller, attach      once, while the server starts
    step -> draft, draft_forward -> verify -> draft_extend -> results      every decode step

Exceptions are caught by `hook_guard.Guard`; SGLang then runs the step without the plugin.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from adaptive_spec.domain.acceptance_history import REQUESTS_REMEMBERED, AcceptanceHistory
from adaptive_spec.domain.policy import Granularity
from adaptive_spec.domain.step_record import StepFlag
from adaptive_spec.engine_side.step_choice import chooses, refined_k
from adaptive_spec.engine_side.tap import BegunStep
from adaptive_spec.engines.common.hook_guard import Guard
from adaptive_spec.engines.common.plugin_settings import PluginSettings
from adaptive_spec.engines.common.stage_clock import clock_for
from adaptive_spec.engines.common.steps_in_flight import OpenStep
from adaptive_spec.engines.sglang import contract
from adaptive_spec.engines.sglang.attachment import (
    Attachment,
    Place,
    graph_rows,
    kv_tokens_of,
    max_batch,
    padded_rows,
    request_id,
    waits_on_the_host,
)
from adaptive_spec.engines.sglang.eagle_draft_policy import LAUNCH, SidecarDraftPolicy
from adaptive_spec.engines.sglang.switch_upkeep import SwitchUpkeep, limit_lines

SKIP_EXTEND_VARIABLE = "SGLANG_SPEC_SKIP_ZERO_STEP_DRAFT_EXTEND"
"""Of SGLang: at K = 0 the draft model's cache is not kept up, and the first draft after it starts from zeros."""
STALE_STEPS = 8
"""Steps with a draft after such a one whose acceptance says nothing about the draft model. The first draft is of zeros; then the
tokens that were skipped are missing in its cache. At 3 tokens a step, 8 steps put 24 new tokens there, more than most EAGLE heads
draw on for the next few. An estimate, not measured."""
_CENSORED = int(StepFlag.CENSORED)
_TRIAL, _STEP_CHOICE, _LIMITED = int(StepFlag.TRIAL), int(StepFlag.STEP_CHOICE), int(StepFlag.LIMITED)

log = logging.getLogger("sglang.adaptive_spec")


class EagleAttachment(Attachment):
    """One per process. Decides K in mode active; observes in mode shadow and where K cannot change."""

    REQUIRED_GROUPS = (contract.COUNTS_AND_K,)
    OPTIONAL_GROUPS = (contract.STAGE_TIMES, contract.CONFIDENCES)
    PARTS: ClassVar[Mapping[str, str]] = {"confidences": contract.CONFIDENCES}

    def __init__(self, settings: PluginSettings, guard: Guard, engine: str) -> None:
        super().__init__(settings, guard, engine)
        self._policy: SidecarDraftPolicy | None = None
        self._history: AcceptanceHistory | None = None
        self._confidences: Any = None
        self._undecided: int | None = LAUNCH if settings.fallback == "launch" else None
        """Who chooses K of a step on which no policy of the sidecar acts; see `SidecarDraftPolicy`."""
        self._decided = self._undecided
        self._begun: BegunStep | None = None
        """Decision of the step that is about to run."""
        self._ids: list[int] | None = None
        """Numbers of its requests, where they were needed already."""
        self._upkeep: SwitchUpkeep | None = None
        self._skips_extend = os.environ.get(SKIP_EXTEND_VARIABLE, "").strip().lower() in ("true", "1", "yes", "y")
        self._stale_steps = 0
        self._tree_tokens = 0
        """Tokens of each request in a verify forward with topk > 1, 0 for a chain."""
        self._graph_rows: list[int] = []
        """Where K cannot change; else the policy knows them."""

    # -- once ----------------------------------------------------------------------------------------------------------

    def own_hooks(self) -> dict[str, Callable[..., None]]:
        return {**super().own_hooks(), "controller": self.controller}

    def controller(
        self, original: Callable[..., None], controller: Any, worker: Any, policy: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Around the constructor of SGLang's AdaptiveController: give it the sidecar's policy."""
        chosen = policy
        try:
            chosen = self.draft_policy(worker, policy)
        except Exception:
            self._guard.failed("controller")
        original(controller, worker, chosen, *args, **kwargs)

    def draft_policy(self, worker: Any, stock: Any) -> Any:
        """The policy AdaptiveController is given in place of SGLang's own."""
        if self._guard.closed is not None or not self._supported:
            return stock
        self._guard.fault("controller")
        if self._settings.mode == "active":
            limit_lines()
            self._upkeep = SwitchUpkeep()
        self._policy = SidecarDraftPolicy(stock, int(worker.speculative_num_steps), self._k_decided)
        return self._policy

    def _before_capture(self, worker: Any) -> None:
        """The computation of the confidences must become part of the CUDA graphs."""
        import torch

        device = torch.device(str(worker.device))
        self._clock = clock_for(device.type)
        if int(worker.topk) > 1:  # of a tree SGLang keeps the probabilities of all branches, not of one chain
            self._tree_tokens = int(worker.speculative_num_draft_tokens)
            return
        if self._settings.confidences == "on" and contract.CONFIDENCES not in self._guard.lost:
            from adaptive_spec.engines.sglang.confidences import ConfidenceTap

            captured = self._policy.captured if self._policy is not None else (int(worker.speculative_num_steps),)
            make = self._guard.part
            self._confidences = make("confidences", ConfidenceTap, worker._draft_worker, max_batch(worker), max(captured), device)
            if self._confidences is None:
                self._guard.lose(contract.CONFIDENCES, "they could not be set up")

    def _begin(self, worker: Any, place: Place) -> None:
        """All states are captured: publish the engine's abilities and open the tap."""
        controller = worker.adaptive_controller
        launch_k = int(worker.speculative_num_steps)
        candidates = tuple(sorted(int(k) for k in controller._states)) if controller is not None else (launch_k,)
        if self._supported and (self._policy is None or controller is None or controller.params is not self._policy):
            self._policy, self._reason = None, f"SGLang's {type(controller).__name__} does not ask the plugin's policy for K"
            log.warning("adaptive-spec: K is not decided here: %s", self._reason)
        if self._policy is not None:
            self._policy.captured = candidates
        else:
            self._graph_rows = graph_rows(worker)
        allowed_from = self._policy.allowed_from(max_batch(worker)) if self._policy is not None else ()
        info = self._info(worker, place, launch_k, candidates, Granularity.BATCH, allowed_from)
        self._first_rank = place.rank == 0
        # With several ranks a result that one of them misses would leave it with another history, and another K.
        if self._settings.batch_scores != "off" and place.ranks == 1:
            self._history = AcceptanceHistory(max(candidates[-1], 1), REQUESTS_REMEMBERED)
        self._tap = self._open_tap(info, place)
        self._worker = worker
        if self._policy is not None:
            self.report("attached", "")
            log.info("adaptive-spec: attached, mode %s, K %d at launch, candidates %s", self._settings.mode, launch_k, candidates)
        else:
            self.report("observing", self._reason)

    def _may_steer(self) -> bool:
        return self._policy is not None and len(self._policy.captured) > 1

    def _terms(self) -> int:
        """Checksum of everything beside the policy that K depends on; never 0."""
        policy = self._policy
        ranges = policy.allowed_from(max_batch(self._worker)) if policy is not None and self._worker is not None else None
        return self._crc(
            self._history is not None,
            policy.captured if policy is not None else None,
            ranges,
            self._undecided,
            self._settings.confidences,
        )

    # -- every decode step ---------------------------------------------------------------------------------------------

    def step_first(self, worker: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
        """Decide K of the step: on every rank alike, whatever else fails on one of them."""
        self._step, self._begun, self._ids, self._decided = None, None, None, self._at_rest()
        if self._inert:
            return
        with self._alike(batch):
            tap = self._tap_for(worker, batch)
            if tap is None:
                return
            rows, kv_tokens = len(batch.reqs), kv_tokens_of(batch)
            k = tap.begin_step(rows, kv_tokens, time.monotonic_ns())
            begun, policy = tap.begun, self._policy
            if policy is None or self._settings.mode != "active":
                # The policy does not act on this step, so the record names none.
                begun = BegunStep(begun.step, k, rows, kv_tokens, 0, 0)
            elif begun.policy_version:
                begun = self._decide(policy, begun, batch)
            self._begun = begun

    def step_before(self, worker: Any, batch: Any, *args: Any, **kwargs: Any) -> OpenStep | None:
        begun, policy = self._begun, self._policy
        if begun is None:
            return None
        started = self._clock.now()
        ids = self._ids or [request_id(request) for request in batch.reqs]
        padded = (
            policy.padded_rows(begun.batch_size)
            if policy is not None
            else padded_rows(self._graph_rows, self._rows_computed(batch, len(ids)))
        )
        self._step = OpenStep(begun, begun.k, np.array(ids, np.uint32), padded, started, flags=waits_on_the_host(batch))
        if self._tree_tokens:
            self._step.num_tokens, self._step.padded_tokens = len(ids) * self._tree_tokens, padded * self._tree_tokens
        self._step.staged = contract.STAGE_TIMES not in self._guard.lost
        self._in_flight.begin(self._step)
        return self._step

    def _on_launched(self, step: OpenStep, worker: Any) -> None:
        step.k = int(worker.speculative_num_steps)
        if self._decided is not None and self._decided not in (LAUNCH, step.k):
            step.begun = step.begun._replace(flags=step.begun.flags & ~(_TRIAL | _STEP_CHOICE) | _LIMITED)
        if self._steering is None:
            self._decided = self._undecided
        if step.k == 0:
            self._stale_steps = STALE_STEPS if self._skips_extend else 0
        elif self._stale_steps:
            self._stale_steps -= 1
            step.flags |= _CENSORED

    def draft_after(self, started: Any, verify_input: Any, draft_worker: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
        step = self._step
        if step is None or started is None:
            return
        step.stages["draft"] = (started, self._clock.now())
        if self._confidences is not None:
            first, k = batch.spec_info.topk_p, int(draft_worker.speculative_num_steps)
            step.confidences = self._guard.part("confidences", self._confidences.after_draft, first, k)

    def draft_forward_before(self, draft_worker: Any, forward_batch: Any) -> None:
        if self._confidences is not None:
            self._confidences.before_draft_forward()

    def draft_forward_after(self, note: None, result: Any, draft_worker: Any, forward_batch: Any) -> None:
        if self._confidences is not None and not forward_batch.forward_mode.is_idle():
            self._confidences.after_draft_forward()

    def verify_after(self, started: Any, *args: Any, **kwargs: Any) -> None:
        if self._step is not None and started is not None:
            self._step.stages["verify"] = (started, self._clock.now())

    def draft_extend_before(self, *args: Any, **kwargs: Any) -> Any:
        if self._step is None:
            return None
        if self._confidences is not None:
            self._guard.part("confidences", self._confidences.before_extend)
        return self._clock.now()

    def draft_extend_after(
        self, started: Any, result: Any, draft_worker: Any, batch: Any, batch_result: Any, *args: Any, **kwargs: Any
    ) -> None:
        if self._step is None or started is None:
            return
        self._step.stages["draft_extend"] = (started, self._clock.now())
        if self._confidences is not None:
            self._guard.part("confidences", self._confidences.after_extend, batch_result.next_draft_input)

    def _on_result(self, step: OpenStep) -> None:
        if self._history is not None and not step.flags & _CENSORED and step.accept_len is not None and step.counted is not None:
            ids, accept_len = step.request_ids, step.accept_len
            if not step.all_counted:
                ids, accept_len = ids[step.counted], accept_len[step.counted]
            self._history.observe(ids.tolist(), accept_len, step.k)

    def switch_after(self, note: None, result: None, worker: Any, state: Any) -> None:
        """K was switched, by whichever policy."""
        if self._upkeep is not None:
            self._upkeep()

    def _lost(self, group: str) -> None:
        if group == contract.CONFIDENCES:
            self._confidences = None
        super()._lost(group)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _k_decided(self) -> int | None:
        """See `SidecarDraftPolicy`. Never raises."""
        if self._policy is None or self._tap is None or self._settings.mode != "active":
            return None
        if self._inert:
            return self._undecided
        return self._decided

    def _at_rest(self) -> int | None:
        """Who decides without a policy. Ranks have the same setting only once rank 0 has begun."""
        return self._undecided if self._steering is None or self._steering.steers else None

    def _decide(self, policy: SidecarDraftPolicy, begun: BegunStep, batch: Any) -> BegunStep:
        """Decide K of a step on which the sidecar's policy acts: never one that is not allowed at its batch size."""
        k = policy.nearest(begun.batch_size, begun.k)
        flags = begun.flags if k == begun.k else begun.flags & ~_TRIAL | _LIMITED
        self._decided = k
        chosen = self._by_scores(policy, batch, k, begun.kv_tokens)
        self._decided = chosen
        return begun._replace(k=chosen, flags=flags if chosen == k else flags | _STEP_CHOICE)

    def _by_scores(self, policy: SidecarDraftPolicy, batch: Any, k: int, kv_tokens: int) -> int:
        """The step choice: K of this step from the acceptance history and the known scores of its requests."""
        if self._history is None or self._tap is None or not chooses(self._tap.planner):
            return k
        self._ids = ids = [request_id(request) for request in batch.reqs]
        candidates = policy.allowed(len(ids))
        # Without the tap topk_p is SGLang's constant 1.0.
        first = batch.spec_info.topk_p if self._confidences is not None else None
        # On a GPU the host would have to wait for the score; there the history alone is used.
        known = first.reshape(-1).numpy() if first is not None and first.device.type == "cpu" and len(first) == len(ids) else None
        return refined_k(self._history, self._tap.planner, ids, known, k, kv_tokens, policy.padded_rows(len(ids)), candidates)
