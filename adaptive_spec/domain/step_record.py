"""StepRecord: what the engine reports of one decode step. Its binary form is in `wire/slot.py`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag

import numpy as np

from adaptive_spec.domain.arrays import Float32s, Lengths, RequestIds

UNKNOWN_CONFIDENCE = 0.0
"""The value in place of a confidence that was not measured. No probability of a most likely token is 0."""


class StepFlag(IntFlag):
    """Properties of a step that change how it is used."""

    TRIAL = 1
    """K came from a trial of the controller (sweep or probe), not from the policy's table."""
    FALLBACK = 2
    """The engine had no fresh policy: its fallback decided K."""
    DISTURBED = 4
    """Other work ran inside the step (a prefill, a first graph replay): its times are not used."""
    CENSORED = 8
    """The engine cut accept_len (a request ended inside the step): the positions behind it have no label."""
    STEP_CHOICE = 16
    """The step choice moved K from the policy's table."""
    LIMITED = 32
    """The K that ran is not the one the policy asked for: it is not allowed at this batch size. Such a step is never a TRIAL."""
    WHOLE = 64
    """The engine does not time the stages of its steps: verify_s is the whole forward, the other stages are 0."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One decode step.

    step, time_ns, kv_tokens, policy_version, num_tokens, padded_tokens, batch_size, k, flags: see the table in `wire/slot.py`.
    draft_s, verify_s, draft_extend_s, step_s: seconds, >= 0; step_s is the whole step, overhead included.
    confidences: float32 [rows, k], the draft model's probability of each token it proposed, in (0, 1], or UNKNOWN_CONFIDENCE.
    verify_len: uint8 [rows], draft tokens verified, 0..k. accept_len: uint8 [rows], draft tokens accepted (bonus not
    counted), 0..verify_len. request_ids: uint32 [rows], the engine's own number of each request, the same in all its steps.
    """

    step: int
    time_ns: int
    kv_tokens: int
    policy_version: int
    num_tokens: int
    padded_tokens: int
    batch_size: int
    k: int
    flags: int
    draft_s: float
    verify_s: float
    draft_extend_s: float
    step_s: float
    confidences: Float32s
    verify_len: Lengths
    accept_len: Lengths
    request_ids: RequestIds

    @property
    def output_tokens(self) -> int:
        """Tokens this step produced: accepted draft tokens and one bonus token per request."""
        return int(self.accept_len.sum()) + self.batch_size

    def invalid_reason(self) -> str | None:
        """Name the first group of fields with an impossible value, None when all are valid. Readers drop invalid records."""
        rows = len(self.verify_len)
        if not (0 < rows <= self.batch_size) or self.padded_tokens < self.num_tokens or self.num_tokens < self.batch_size:
            return "counts"
        times = (self.draft_s, self.verify_s, self.draft_extend_s, self.step_s)
        if not all(0.0 <= t < 3600.0 for t in times) or self.verify_s <= 0.0:
            return "times"
        # count_nonzero takes half the time of any() and all() on such small arrays; this runs for every record.
        if np.count_nonzero(self.accept_len > self.verify_len) or np.count_nonzero(self.verify_len > self.k):
            return "lengths"
        if np.count_nonzero((self.confidences >= UNKNOWN_CONFIDENCE) & (self.confidences <= 1.0)) != self.confidences.size:
            return "confidences"
        return None
