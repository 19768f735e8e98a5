"""The hooks of vLLM's worker, which measure and change nothing.

    execute -> sample -> draft -> greedy      every step

Times and confidences of a step travel to EngineCore as a note on its output, see `step_notes`. On a CPU they are known when the
output is made. On a GPU they are CUDA events and copies to pinned memory that nothing waits for, and come with a later output.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any

from adaptive_spec.engines.common.hook_guard import Guard
from adaptive_spec.engines.common.plugin_settings import PluginSettings
from adaptive_spec.engines.common.stage_clock import HostClock, StageClock
from adaptive_spec.engines.common.steps_in_flight import Confidences, Moment
from adaptive_spec.engines.vllm import contract
from adaptive_spec.engines.vllm.cost_curves import LiveCurves
from adaptive_spec.engines.vllm.step_notes import CURVES_ATTRIBUTE, NOTES_ATTRIBUTE, STEP_ATTRIBUTE, Note

MOST_PENDING = 8
"""Most steps whose times have not come; an older one is sent without them."""

log = logging.getLogger("vllm.adaptive_spec")


class MeasuredStep:
    """One step in the worker."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.execute: tuple[Moment, Moment] | None = None
        self.sample: tuple[Moment, Moment] | None = None
        self.draft: tuple[Moment, Moment] | None = None
        self.confidences: Confidences | None = None
        self.request_ids: list[str] = []

    def note(self) -> Note | None:
        """The note, None while something is not known."""
        note: Note = {"step": self.number}
        seconds = {}
        for stage in ("execute", "sample", "draft"):
            pair = getattr(self, stage)
            if pair is not None:
                seconds[stage] = pair[0].seconds_to(pair[1])
        if None in seconds.values():
            return None
        if "execute" in seconds:
            note["verify"] = seconds["execute"] + max(seconds.get("sample", 0.0) - seconds.get("draft", 0.0), 0.0)
        if "draft" in seconds:
            note["draft"] = seconds["draft"]
        if self.confidences is not None:
            values = self.confidences.ready()
            if values is None:
                return None
            note["confidences"] = dict(zip(self.request_ids, values.tolist(), strict=False))
        return note


class WorkerAttachment:
    """One per worker process."""

    def __init__(self, settings: PluginSettings, guard: Guard) -> None:
        self._settings, self._guard = settings, guard
        guard.optional = (contract.STAGE_TIMES, contract.CONFIDENCES)
        groups = (*guard.optional, contract.ADAPTIVE_VERIFICATION)
        guard.groups = {need.hook: need.group for group in groups for need in contract.hooks_of(group)}
        self._clock: StageClock | None = None
        self._tap: Any = None
        """`draft_logits.DraftLogits`, once the first step has run."""
        self._step: MeasuredStep | None = None
        self._pending: deque[MeasuredStep] = deque()
        self._live = LiveCurves()
        self._budget: Note | None = None
        """Note of a step in which vLLM itself chooses what is verified."""
        self._told: tuple[int, int] | None = None

    # -- stage times ---------------------------------------------------------------------------------------------------

    def execute_before(self, runner: Any, output: Any, *args: Any, **kwargs: Any) -> Any:
        number = output.__dict__.get(STEP_ATTRIBUTE)
        self._step = None
        if number is None:
            return None
        if self._clock is None:
            self._start(runner)
        self._step = MeasuredStep(int(number))
        return self._now()

    def execute_after(self, started: Any, result: Any, *args: Any, **kwargs: Any) -> None:
        if self._step is not None and started is not None:
            self._step.execute = (started, self._now())

    def sample_before(self, *args: Any, **kwargs: Any) -> Any:
        return self._now() if self._step is not None else None

    def sample_after(self, started: Any, result: Any, *args: Any, **kwargs: Any) -> None:
        """The output is made: attach the notes that are complete."""
        step, self._step = self._step, None
        if step is None or started is None:
            return
        step.sample = (started, self._now())
        self._pending.append(step)
        inner = getattr(result, "_model_runner_output", result)  # asynchronous scheduling wraps it
        if hasattr(inner, "sampled_token_ids"):
            inner.__dict__[NOTES_ATTRIBUTE] = self._complete()

    def draft_before(self, runner: Any, *args: Any, **kwargs: Any) -> Any:
        if self._step is None:
            return None
        if self._tap is not None:
            self._tap.listen()
        return self._now()

    def draft_after(self, started: Any, result: Any, runner: Any, *args: Any, **kwargs: Any) -> None:
        step = self._step
        if step is None or started is None:
            return
        step.draft = (started, self._now())
        if self._tap is not None:
            step.request_ids = list(runner.input_batch.req_ids)
            step.confidences = self._guard.part("greedy", self._tap.take, len(step.request_ids))

    # -- confidences ---------------------------------------------------------------------------------------------------

    def greedy(self, original: Callable[..., Any], proposer: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        """Around the choice of one greedy draft token: the same choice, from logits that are looked at too."""
        tap = self._tap
        if tap is None or not tap.listening or not (tap.seeing or self._guard.part("greedy", tap.unseen, proposer) is False):
            return original(proposer, hidden_states, *args, **kwargs)
        logits = proposer.model.compute_logits(hidden_states)
        self._guard.part("greedy", tap.look, logits)
        return logits.argmax(dim=-1)

    # -- vLLM's own adaptive verification ------------------------------------------------------------------------------

    def curves_before(self, worker: Any, output: Any, *args: Any, **kwargs: Any) -> None:
        number = output.__dict__.get(STEP_ATTRIBUTE)
        manager = getattr(worker.model_runner, "adaptive_verification", None) if number is not None else None
        self._budget = {"step": int(number)} if manager is not None else None
        curves = output.__dict__.get(CURVES_ATTRIBUTE)
        if manager is not None and curves is not None:
            self._live.put(manager, curves)

    def budget_after(self, note: None, tokens: int, *args: Any, **kwargs: Any) -> None:
        """vLLM has chosen how many tokens are verified in this step."""
        if self._budget is not None:
            self._budget["tokens"] = int(tokens)

    def outcome_after(self, note: None, result: Any, *args: Any, **kwargs: Any) -> None:
        budget, self._budget = self._budget, None
        inner = getattr(result, "model_runner_output", result)  # `AsyncOutput` of the V2 model runner wraps it
        if budget is not None and "tokens" in budget and hasattr(inner, "sampled_token_ids"):
            inner.__dict__[NOTES_ATTRIBUTE] = [budget]

    # -- inside --------------------------------------------------------------------------------------------------------

    def _start(self, runner: Any) -> None:
        from adaptive_spec.engines.common.stage_clock import clock_for

        self._clock = clock_for(runner.device.type)
        if self._settings.confidences == "on" and contract.CONFIDENCES not in self._guard.lost:
            from adaptive_spec.engines.vllm.draft_logits import DraftLogits

            self._tap = self._guard.part("greedy", DraftLogits, runner.device)
            if self._tap is None:
                self._guard.lose(contract.CONFIDENCES, "they could not be set up")

    def _now(self) -> Moment:
        return (self._clock or HostClock()).now()

    def _complete(self) -> list[Note]:
        """Notes of the steps that are complete, oldest first; the oldest is sent as it is when too many wait."""
        notes: list[Note] = []
        while self._pending:
            note = self._pending[0].note()
            if note is None and len(self._pending) > MOST_PENDING:
                note = {"step": self._pending[0].number}
            if note is None:
                break
            self._pending.popleft()
            notes.append(note)
        told = (sum(self._guard.failures.values()), len(self._guard.lost))
        if notes and told != self._told and (any(told) or self._told is not None):
            notes[-1] |= {"failures": dict(self._guard.failures), "lost": tuple(self._guard.lost)}
            self._told = told
        return notes
