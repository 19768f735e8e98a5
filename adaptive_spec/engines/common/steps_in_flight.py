"""Decode steps in flight: matches the measurements of each step with its own result.

An overlap (SGLang) or asynchronous (vLLM) scheduler launches step n + 1 before it reads the result of step n, and requests join
and leave in between. A step is therefore attached to its result object, not found by position or batch. A record is written as
soon as the result and, on a GPU, all event times are known.

    step_s = start of the next step - start of this one          where the next step has begun already (overlap scheduler)
           = end - start + mean pause after such a batch         otherwise; prefills and idle times are not pauses

Reads no clock, imports neither torch nor an engine: moments and confidences are objects whose values may not be known yet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from adaptive_spec.domain.step_record import UNKNOWN_CONFIDENCE, StepFlag
from adaptive_spec.engine_side.tap import BegunStep

MOST_OPEN = 8
"""Most steps that wait for results; an older one is dropped and counted as lost."""
PAUSE_RATE = 0.05
_TRIAL, _LIMITED = int(StepFlag.TRIAL), int(StepFlag.LIMITED)
LONGEST_PAUSE_S = 1.0


class Moment(Protocol):
    """A point in time, on the host's or the GPU's clock."""

    def seconds_to(self, later: Moment) -> float | None:
        """Seconds from this moment to a later one; None while it is not known. Never waits."""
        ...


class Confidences(Protocol):
    """Draft confidences of a step, whose copy to the host may not be complete."""

    def ready(self) -> NDArray[np.float32] | None:
        """float32 [b, k], values outside (0, 1] are unknown; None until the copy is complete. Never waits."""
        ...


@dataclass(frozen=True)
class KnownConfidences:
    """Confidences already on the host."""

    values: NDArray[np.float32]

    def ready(self) -> NDArray[np.float32] | None:
        return self.values


@dataclass
class OpenStep:
    """One decode step. Stages are pairs of moments. request_ids: uint32 [b]. padded_rows: requests after graph padding.

    num_tokens, padded_tokens: of the verify forward, where they do not follow from k and the rows. verify_len: draft tokens
    verified [b], None for k each. flags: of `StepFlag`, known when the step is launched. staged: whether its stages are timed;
    if not, the record has the time of the whole forward as verify_s and the flag WHOLE. drafts_next: where an engine drafts at
    the end of a step for the next one (vLLM), that drafting: the whole step counts the "draft" stage, in which the drafts of
    this step were made, in its place. asked_tokens: of the verify forward, where a trial asks for a number: a step that ran
    another one was no such trial. None: no number is asked for.
    """

    begun: BegunStep
    k: int
    request_ids: NDArray[np.uint32]
    padded_rows: int
    started: Moment
    stages: dict[str, tuple[Moment, Moment]] = field(default_factory=dict)
    ended: Moment | None = None
    next_started: Moment | None = None
    confidences: Confidences | None = None
    """None: not measured, all unknown."""
    flags: int = 0
    staged: bool = True
    drafts_next: tuple[Moment, Moment] | None = None
    num_tokens: int | None = None
    padded_tokens: int | None = None
    asked_tokens: int | None = None
    verify_len: NDArray[np.uint8] | None = None
    accept_len: NDArray[np.uint8] | None = None
    counted: NDArray[np.bool_] | None = None
    """[b], which rows the engine counts: not those of requests that had already ended when the step was launched."""
    all_counted: bool = False


class FinishedStep(NamedTuple):
    """What a record needs; see `EngineTap.end_step`. Only counted rows."""

    begun: BegunStep
    num_tokens: int
    padded_tokens: int
    draft_s: float
    verify_s: float
    draft_extend_s: float
    step_s: float
    confidences: NDArray[np.float32]
    verify_len: NDArray[np.uint8]
    accept_len: NDArray[np.uint8]
    request_ids: NDArray[np.uint32]
    flags: int


class StepsInFlight:
    """Steps in flight, oldest first. write: takes each finished step. lost: steps dropped without a record."""

    def __init__(self, write: Callable[[FinishedStep], None]) -> None:
        self._write = write
        self._open: deque[OpenStep] = deque()
        self._last: OpenStep | None = None
        self._pauses_s: dict[int, float] = {}
        self.lost = 0

    def begin(self, step: OpenStep) -> None:
        """A decode step starts; the previous one ends now if the two share a request."""
        previous, self._last = self._last, step
        if previous is not None and previous.ended is not None and _share(previous.request_ids, step.request_ids):
            previous.next_started = step.started
            self._learn_pause(len(previous.request_ids), previous.ended.seconds_to(step.started))
        self._open.append(step)
        if len(self._open) > MOST_OPEN:
            self._open.popleft()
            self.lost += 1
        self.settle()

    def abandon(self, step: OpenStep) -> None:
        """Drop a step that has no result."""
        if step in self._open:
            self._open.remove(step)

    def interrupt(self) -> None:
        """Something other than decoding runs now: a prefill, or idle time."""
        self._last = None
        self.settle()

    def result(
        self, step: OpenStep, accept_len: Sequence[int], counted: Sequence[bool], verify_len: NDArray[np.int64] | None = None
    ) -> None:
        """Take the result of a step. accept_len: accepted draft tokens by row. counted, verify_len: see `OpenStep`."""
        rows = len(step.request_ids)
        if len(accept_len) != rows or len(counted) != rows or (verify_len is not None and len(verify_len) != rows):
            self.abandon(step)
            raise ValueError(f"result of {len(accept_len)} requests for a step of {rows}")
        # On the engine's hot path: ufuncs, as `clip` and `full` take several microseconds each.
        verified: int | NDArray[np.int64] = step.k
        if verify_len is None:
            step.num_tokens = rows * (step.k + 1) if step.num_tokens is None else step.num_tokens
        else:
            verified = np.maximum(np.minimum(np.asarray(verify_len, np.int64), step.k), 0)
        accepted = np.array(accept_len, np.int64)
        np.maximum(np.minimum(accepted, verified, out=accepted), 0, out=accepted)
        step.accept_len = accepted.astype(np.uint8)
        step.verify_len = np.empty(rows, np.uint8)
        step.verify_len[:] = verified
        step.counted = np.array(counted, bool)
        step.all_counted = all(counted)
        self.settle()

    def settle(self) -> None:
        """Write the oldest steps of which everything is known, in order."""
        while self._open:
            step = self._open[0]
            if step.accept_len is None:
                return
            finished = self._finish(step)
            if finished is None:
                return
            self._open.popleft()
            if len(finished.accept_len):
                self._write(finished)

    def _finish(self, step: OpenStep) -> FinishedStep | None:
        """None while something is not known yet."""
        assert step.accept_len is not None  # `settle` asks for no other
        assert step.counted is not None
        assert step.verify_len is not None
        seconds = {}
        for name in ("draft", "verify", "draft_extend"):
            stage = step.stages.get(name)
            seconds[name] = stage[0].seconds_to(stage[1]) if stage is not None else 0.0
        forward_s = step.started.seconds_to(step.ended) if step.ended is not None else 0.0
        whole_s = step.started.seconds_to(step.next_started) if step.next_started is not None else 0.0
        values = step.confidences.ready() if step.confidences is not None else np.zeros((len(step.request_ids), 0), np.float32)
        next_draft_s = step.drafts_next[0].seconds_to(step.drafts_next[1]) if step.drafts_next is not None else 0.0
        if forward_s is None or whole_s is None or next_draft_s is None or values is None or None in seconds.values():
            return None
        stages = {name: s or 0.0 for name, s in seconds.items()}
        if step.next_started is None:
            whole_s = forward_s + self._pause_s(len(step.request_ids))
        if step.drafts_next is not None:
            whole_s = max(whole_s - next_draft_s, 0.0) + stages["draft"]
        flags = step.flags
        if values.shape != (len(step.request_ids), step.k):
            values = np.full((len(step.request_ids), step.k), UNKNOWN_CONFIDENCE, np.float32)
        verify_len, accept_len, request_ids = step.verify_len, step.accept_len, step.request_ids
        if not step.all_counted:
            rows = step.counted
            values, verify_len, accept_len, request_ids = values[rows], verify_len[rows], accept_len[rows], request_ids[rows]
        if values.size and not (np.minimum.reduce(values, axis=None) > 0.0 and np.maximum.reduce(values, axis=None) <= 1.0):
            values = np.where((values > 0.0) & (values <= 1.0), values, np.float32(UNKNOWN_CONFIDENCE))
        if stages["verify"] <= 0.0:
            flags |= int(StepFlag.DISTURBED if step.staged else StepFlag.WHOLE)
            stages = {"draft": 0.0, "verify": max(forward_s, 1e-9), "draft_extend": 0.0}
        tokens = int(step.verify_len.sum()) + len(step.verify_len) if step.num_tokens is None else step.num_tokens
        padded = step.padded_rows * (step.k + 1) if step.padded_tokens is None else step.padded_tokens
        begun = step.begun
        if step.asked_tokens is not None and step.asked_tokens != tokens:
            begun = begun._replace(flags=begun.flags & ~_TRIAL | _LIMITED)
        return FinishedStep(
            begun, tokens, max(padded, tokens), stages["draft"], stages["verify"],
            stages["draft_extend"], max(whole_s, sum(stages.values())), np.ascontiguousarray(values, np.float32),
            verify_len, accept_len, request_ids, flags,
        )  # fmt: skip

    def _learn_pause(self, rows: int, pause_s: float | None) -> None:
        if pause_s is not None:
            pause_s = min(max(pause_s, 0.0), LONGEST_PAUSE_S)
            usual_s = self._pauses_s.get(rows)
            self._pauses_s[rows] = pause_s if usual_s is None else usual_s + PAUSE_RATE * (pause_s - usual_s)

    def _pause_s(self, rows: int) -> float:
        """Mean pause after a batch of `rows` requests, in seconds; of the nearest known size, 0 before any is known."""
        nearest = min(self._pauses_s, key=lambda known: abs(known - rows), default=None)
        return 0.0 if nearest is None else self._pauses_s[nearest]


def _share(a: NDArray[np.uint32], b: NDArray[np.uint32]) -> bool:
    """Whether a request is in both: then the scheduler cannot have been idle in between."""
    return not set(a.tolist()).isdisjoint(b.tolist())
