"""What a worker tells EngineCore of its steps: attributes beside the fields of vLLM's own messages, which survive their pickling.

    SchedulerOutput.adaptive_spec_step      EngineCore -> worker: the number of the step, and new step times for vLLM's own
                                            adaptive verification where that is on
    ModelRunnerOutput.adaptive_spec_notes   worker -> EngineCore: notes of this step, or of steps before, where a GPU's times come
                                            late

A note is a plain dictionary, because it is pickled in every step.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptive_spec.domain.step_record import UNKNOWN_CONFIDENCE
from adaptive_spec.engines.common.steps_in_flight import Moment

STEP_ATTRIBUTE = "adaptive_spec_step"
CURVES_ATTRIBUTE = "adaptive_spec_curves"
NOTES_ATTRIBUTE = "adaptive_spec_notes"
MOST_NOTES = 64
"""Most steps whose notes are kept; a step that has none by then never gets any."""

Note = dict[str, Any]
"""step: its number. verify, draft: seconds; draft is missing in a step that drafted nothing. confidences: by request id, lists of
K. failures: by hook, where there are any. lost: groups that the worker no longer measures. Where vLLM's own adaptive verification
is on, a note has step and tokens alone: tokens of the verification, which vLLM chose in the worker."""


class StepNotes:
    """Notes by step number. lost: groups that workers no longer measure, and failures by hook, as last told."""

    def __init__(self) -> None:
        self._notes: dict[int, Note] = {}
        self._tokens: dict[int, int] = {}
        self.failures: dict[str, int] = {}
        self.lost: frozenset[str] = frozenset()
        self.come = False
        """Whether the worker sends any that measure stages."""

    def take(self, notes: list[Note]) -> None:
        for note in notes:
            if "tokens" in note:
                self._tokens = {note["step"]: int(note["tokens"])}
                continue
            self.come = True
            self._notes[note["step"]] = note
            if "failures" in note:
                self.failures, self.lost = dict(note["failures"]), frozenset(note["lost"])
        while len(self._notes) > MOST_NOTES:
            self._notes.pop(next(iter(self._notes)))

    def tokens(self, step: int) -> int | None:
        """Tokens verified in a step whose result has just come, where vLLM chose them in the worker; None where not known."""
        return self._tokens.get(step)

    def seconds(self, step: int, stage: str) -> float | None:
        """Seconds of a stage; 0.0 where the step did not have it, None while there is no note."""
        note = self._notes.get(step)
        return None if note is None else float(note.get(stage, 0.0))

    def drafted(self, step: int) -> bool:
        """Whether a step ran its draft model, as far as is known."""
        note = self._notes.get(step)
        return note is None or "draft" in note

    def has(self, step: int) -> bool:
        return step in self._notes

    def confidences(self, step: int, request_ids: list[str], k: int) -> NDArray[np.float32]:
        """Confidences [b, k] of the tokens drafted in a step; UNKNOWN_CONFIDENCE where they are not known."""
        found = np.full((len(request_ids), k), UNKNOWN_CONFIDENCE, np.float32)
        of_step = self._notes.get(step, {}).get("confidences") or {}
        for row, request in enumerate(request_ids):
            values = of_step.get(request)
            if values is not None and len(values) == k:
                found[row] = values
        return found


class NotedTime:
    """The end of a stage that began at 0, on the worker's clock: known once the note of the step has come."""

    def __init__(self, notes: StepNotes, step: int, stage: str) -> None:
        self._notes, self._step, self._stage = notes, step, stage

    def seconds_to(self, later: Moment) -> float | None:
        """Seconds of the stage; `later` is the other half of the pair and has no time of its own."""
        return self._notes.seconds(self._step, self._stage)


class NotedConfidences:
    """Confidences of the drafts of a step, which come with its note."""

    def __init__(self, notes: StepNotes, step: int, request_ids: list[str], k: int) -> None:
        self._notes, self._step, self._ids, self._k = notes, step, request_ids, k

    def ready(self) -> NDArray[np.float32] | None:
        return self._notes.confidences(self._step, self._ids, self._k) if self._notes.has(self._step) else None
