"""StepRecord: what the engine reports of one decode step. Its binary form is in `wire/slot.py`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag

import numpy as np

from adaptive_spec.domain.arrays import Float32s, Lengths, RequestIds

UNKNOWN_CONFIDENCE = 0.0
"""The value in place of a confidence that was not measured. No probability of a most likely token is 0."""


LARGEST_BATCH_SIZE = 1 << 14
"""Four times the requests that an engine may announce (`engine_info.LARGEST_BATCH`): a batch beyond those is cut, not refused."""
LARGEST_TOKENS = 1 << 20
"""Of one verification: 64 tokens a request, as in a draft tree, at the largest batch."""
LARGEST_KV_TOKENS = 1 << 40
LARGEST_NUMBER = (1 << 63) - 1
"""Of a step, a time and a policy version: what a signed 64-bit integer holds."""
SHORTEST_S, LONGEST_S = 1e-9, 3600.0
"""A stage that ran takes at least the shortest and less than the longest time."""


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
    """The K that ran is not the one the policy asked for: it is not allowed at this batch size. Or another number of tokens was
    verified than a trial asked for. Such a step is never a TRIAL.
    """
    WHOLE = 64
    """The engine does not time the stages of its steps: verify_s is the whole forward, the other stages are 0."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One decode step.

    step, time_ns, kv_tokens, policy_version, num_tokens, padded_tokens, batch_size, k, flags: see the table in `wire/slot.py`.
    draft_s, verify_s, draft_extend_s, step_s: seconds, >= 0; verify_s and step_s > 0. step_s is the whole step with its overhead.
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
        if not (0 < rows <= self.batch_size <= self.num_tokens <= self.padded_tokens <= LARGEST_TOKENS):
            return "counts"
        if self.batch_size > LARGEST_BATCH_SIZE or self.kv_tokens > LARGEST_KV_TOKENS:
            return "counts"
        if self.step > LARGEST_NUMBER or self.time_ns > LARGEST_NUMBER or self.policy_version > LARGEST_NUMBER:
            return "numbers"
        if not (SHORTEST_S <= self.verify_s < LONGEST_S and SHORTEST_S <= self.step_s < LONGEST_S):
            return "times"
        if not (0.0 <= self.draft_s < LONGEST_S and 0.0 <= self.draft_extend_s < LONGEST_S):
            return "times"
        # count_nonzero takes half the time of any() and all() on such small arrays; this runs for every record.
        if np.count_nonzero(self.accept_len > self.verify_len) or np.count_nonzero(self.verify_len > self.k):
            return "lengths"
        if np.count_nonzero((self.confidences >= UNKNOWN_CONFIDENCE) & (self.confidences <= 1.0)) != self.confidences.size:
            return "confidences"
        return None
