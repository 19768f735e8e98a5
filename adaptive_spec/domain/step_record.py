"""StepRecord: what one decode step tells the sidecar. Its form on the wire is `wire/slot.py`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag

import numpy as np
from numpy.typing import NDArray

UNKNOWN_CONFIDENCE = 0.0
"""The value in place of a confidence that was not measured. No probability of a most likely token is 0."""


class StepFlag(IntFlag):
    """Why a step is not an ordinary one."""

    TRIAL = 1
    """The plan was a trial of the controller (sweep or probe), not its policy."""
    FALLBACK = 2
    """The engine ran its launch K because no fresh policy was there."""
    DISTURBED = 4
    """Something else ran inside the step (a prefill, a first graph replay): its times say nothing about decoding."""
    CENSORED = 8
    """accept_len was cut by the engine (a request ended inside the step): last positions carry no label."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One decode step.

    step, time_ns, kv_tokens, policy_version, num_tokens, padded_tokens, batch_size, k, flags: as in the table above.
    draft_s, verify_s, draft_extend_s, step_s: seconds, >= 0; step_s covers the others and the overhead.
    confidences: float32 [rows, k], the draft model's probability of each token it proposed, in (0, 1], or UNKNOWN_CONFIDENCE.
    verify_len: uint8 [rows], draft tokens verified, 0..k. accept_len: uint8 [rows], draft tokens accepted (bonus not
    counted), 0..verify_len. request_ids: uint32 [rows], the engine's own, to follow a request over steps.
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
    confidences: NDArray[np.float32]
    verify_len: NDArray[np.uint8]
    accept_len: NDArray[np.uint8]
    request_ids: NDArray[np.uint32]

    @property
    def output_tokens(self) -> int:
        """Tokens given to the users by this step: accepted draft tokens and one bonus token per request."""
        return int(self.accept_len.sum()) + self.batch_size

    def invalid_reason(self) -> str | None:
        """Say why a decoded record cannot be true, or None. A record that says the impossible is never learnt from."""
        rows = len(self.verify_len)
        if not (0 < rows <= self.batch_size) or self.padded_tokens < self.num_tokens or self.num_tokens < self.batch_size:
            return "counts"
        times = (self.draft_s, self.verify_s, self.draft_extend_s, self.step_s)
        if not all(0.0 <= t < 3600.0 for t in times) or self.verify_s <= 0.0:
            return "times"
        # count_nonzero: half the time of any() and all() on arrays this small, and every record passes here.
        if np.count_nonzero(self.accept_len > self.verify_len) or np.count_nonzero(self.verify_len > self.k):
            return "lengths"
        if np.count_nonzero((self.confidences >= UNKNOWN_CONFIDENCE) & (self.confidences <= 1.0)) != self.confidences.size:
            return "confidences"
        return None
