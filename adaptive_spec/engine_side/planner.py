"""The planner: K and the verify lengths of each step, from a policy."""

from __future__ import annotations

import numpy as np

from adaptive_spec.domain.allowed import runnable_table
from adaptive_spec.domain.arrays import Bools, Float32s, Floats, Lengths
from adaptive_spec.domain.plan_search import best_lengths, best_slots
from adaptive_spec.domain.policy import TRIAL_PATIENCE_STEPS, Granularity, Policy, Trial
from adaptive_spec.domain.step_record import UNKNOWN_CONFIDENCE
from adaptive_spec.domain.survival import SurvivalMap


class Planner:
    """Executes a policy step by step: its trials first, then its table of K; where allowed, verify lengths by request.

    launch_k: K the engine was started with, used while no policy acts. max_k: largest K the engine can run. allowed: the K it
    runs at each batch size, [max_batch + 1, max_k + 1]; None: all. No other K is ever returned. A trial that cannot run exactly
    as asked waits like one whose batch size does not occur; after `TRIAL_PATIENCE_STEPS` steps it is skipped, so that a sweep
    always ends.

    limited: the K of this step is not the one the policy's table asked for. moved: the step choice replaced the table's K.
    tables: how many different K tables were adopted one after another.
    last_k, last_moved: K of the step before, and whether the step choice had chosen it. stayed: steps in a row with last_k.
    """

    def __init__(self, launch_k: int, max_k: int, allowed: Bools | None = None) -> None:
        self.launch_k = launch_k
        self.max_k = max_k
        self.policy: Policy | None = None
        self.limited = self.moved = self.last_moved = False
        self.last_k = launch_k
        self.stayed = 0
        self.tables = 0
        self._runnable = runnable_table(np.ones((1, max_k + 1), np.bool_) if allowed is None else allowed)
        self._one_k = bool((self._runnable == self._runnable[0, 0]).all())
        """Whether the engine always drafts the same K: the rails are then those of what is verified of it."""
        self._running: Trial | None = None
        self._trial = 0
        self._trial_steps = 0
        self._waited = 0
        self._k = launch_k
        self._kv_tokens = 0

    @property
    def version(self) -> int:
        """Version of the policy in use, 0 on the launch K."""
        return self.policy.version if self.policy is not None and self.policy.acting else 0

    @property
    def in_trial(self) -> bool:
        """Whether the last step of `draft_length` is a trial."""
        return self._running is not None

    @property
    def trial_tokens(self) -> int:
        """Tokens to verify in the trial of this step; 0: all of them, or no trial."""
        return self._running.num_tokens if self._running is not None else 0

    @property
    def held_batch_size(self) -> int:
        """Batch size that the next trial is for, 0 when any will do or there is none."""
        trial = self._current_trial()
        return trial.batch_size if trial is not None else 0

    def adopt(self, policy: Policy | None) -> None:
        """Use a new policy from now on (None: the launch K). Its trials begin with the first."""
        if policy is not None and (self.policy is None or not np.array_equal(self.policy.k_table, policy.k_table)):
            self.tables += 1
        self.policy = policy
        self._trial = self._trial_steps = self._waited = 0

    def draft_length(self, batch_size: int, kv_tokens: int) -> int:
        """Choose K of the coming step, 0..max_k: launch K without an acting policy, else the trial's, else the table's."""
        self.stayed = self.stayed + 1 if self._k == self.last_k else 1
        self.last_k, self.last_moved = self._k, self.moved
        self._kv_tokens, self._running, self.limited, self.moved = kv_tokens, None, False, False
        policy = self.policy
        if policy is None or not policy.acting:
            self._k = self.launch_k
            return self._k
        trial = self._current_trial()
        if trial is not None:
            if trial.batch_size in (0, batch_size) and self._runs(trial.k, batch_size):
                self._running = trial
                self._trial_steps += 1
                self._k = trial.k
                return self._k
            self._waited += 1
        asked = policy.draft_length(batch_size, kv_tokens)
        self._k = self._runnable_k(asked, batch_size)
        self.limited = self._k != asked
        return self._k

    def move(self, k: int) -> None:
        """The step choice runs another K than `draft_length` returned: k, one that the engine runs at this batch size."""
        self.moved = k != self._k
        self._k = k

    def verify_lengths(self, confidences: Float32s, expected: Floats | None = None) -> Lengths:
        """Choose verify_len [b] for the confidences [b, k] drafted in the step of the last `draft_length`.

        A request with an unknown confidence counts by its row of `expected`, survival [b, k] from its history; without that, as
        the mean of the requests without an unknown one; if all have one, all count alike.
        """
        lengths, policy = self._lengths(confidences, expected), self.policy
        if not self._one_k or policy is None or not policy.acting or policy.granularity is Granularity.BATCH:
            return lengths
        b, k = confidences.shape
        least, most = policy.verified_rails(k)
        count = int(lengths.sum())
        if b * least <= count <= b * most:
            return lengths
        return best_slots(_survival(policy.survival, confidences, expected), min(max(count, b * least), b * most))

    def _lengths(self, confidences: Float32s, expected: Floats | None) -> Lengths:
        """`verify_lengths` without the rails."""
        b, k = confidences.shape
        policy = self.policy
        if policy is None or not policy.acting or k == 0:
            return np.full(b, k, dtype=np.uint8)
        if self._running is not None:
            wanted = self._running.num_tokens
            if wanted == 0 or policy.granularity is Granularity.BATCH:
                return np.full(b, k, dtype=np.uint8)
            return best_slots(_survival(policy.survival, confidences, expected), min(max(wanted - b, 0), b * k))
        if policy.verify_all or b * (k + 1) >= len(policy.verify_s):
            return np.full(b, k, dtype=np.uint8)
        survival = _survival(policy.survival, confidences, expected)
        fixed = float(policy.fixed_s[k, min(b, policy.fixed_s.shape[1] - 1)]) + policy.context_s_per_token * self._kv_tokens
        return best_lengths(survival, fixed, policy.verify_s)

    def _runs(self, k: int, batch_size: int) -> bool:
        return k <= self.max_k and self._runnable_k(k, batch_size) == k

    def _runnable_k(self, k: int, batch_size: int) -> int:
        return int(self._runnable[min(batch_size, len(self._runnable) - 1), min(k, self.max_k)])

    def _current_trial(self) -> Trial | None:
        if self.policy is None or not self.policy.acting:
            return None
        trials = self.policy.trials
        while self._trial < len(trials):
            if self._trial_steps < trials[self._trial].steps and self._waited < TRIAL_PATIENCE_STEPS:
                return trials[self._trial]
            self._trial += 1
            self._trial_steps = self._waited = 0
        return None


def _survival(calibration: SurvivalMap, confidences: Float32s, expected: Floats | None) -> Floats:
    """Survival [b, k], with what `Planner.verify_lengths` says of unknown confidences.

    Where most are unknown the sidecar's calibration is the rates of the positions, whatever the confidence.
    """
    if np.count_nonzero(confidences) == confidences.size:
        return calibration.survival(confidences)
    unknown = confidences == UNKNOWN_CONFIDENCE
    survival = calibration.survival(np.where(unknown, np.float32(0.5), confidences))
    known = ~unknown.any(axis=1)
    if expected is not None:
        survival[~known] = expected[~known]
    elif known.any():
        survival[~known] = survival[known].mean(axis=0)
    return survival
