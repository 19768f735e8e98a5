"""The planner: K and the verify lengths of each step, from a policy."""

from __future__ import annotations

import numpy as np

from adaptive_spec.domain.arrays import Float32s, Lengths
from adaptive_spec.domain.plan_search import best_lengths, best_slots
from adaptive_spec.domain.policy import TRIAL_PATIENCE_STEPS, Granularity, Policy, Trial


class Planner:
    """Executes a policy step by step: its trials first, then its table of K; where allowed, verify lengths by request.

    launch_k: K the engine was started with, used while no policy acts. max_k: largest K the engine can run. A trial whose batch
    size does not occur within `TRIAL_PATIENCE_STEPS` steps is skipped, so that a sweep always ends.
    """

    def __init__(self, launch_k: int, max_k: int) -> None:
        self.launch_k = launch_k
        self.max_k = max_k
        self.policy: Policy | None = None
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
        self.policy = policy
        self._trial = self._trial_steps = self._waited = 0

    def draft_length(self, batch_size: int, kv_tokens: int) -> int:
        """Choose K of the coming step, 0..max_k: launch K without an acting policy, else the trial's, else the table's."""
        self._kv_tokens, self._running = kv_tokens, None
        policy = self.policy
        if policy is None or not policy.acting:
            self._k = self.launch_k
            return self._k
        trial = self._current_trial()
        if trial is not None:
            if trial.batch_size in (0, batch_size):
                self._running = trial
                self._trial_steps += 1
                self._k = min(trial.k, self.max_k)
                return self._k
            self._waited += 1
        self._k = min(policy.draft_length(batch_size, kv_tokens), self.max_k)
        return self._k

    def verify_lengths(self, confidences: Float32s) -> Lengths:
        """Choose verify_len [b] for the confidences [b, k] drafted in the step of the last `draft_length`."""
        b, k = confidences.shape
        policy = self.policy
        if policy is None or not policy.acting or k == 0:
            return np.full(b, k, dtype=np.uint8)
        if self._running is not None:
            wanted = self._running.num_tokens
            if wanted == 0 or policy.granularity is Granularity.BATCH:
                return np.full(b, k, dtype=np.uint8)
            return best_slots(policy.survival.survival(confidences), min(max(wanted - b, 0), b * k))
        if policy.verify_all or b * (k + 1) >= len(policy.verify_s):
            return np.full(b, k, dtype=np.uint8)
        survival = policy.survival.survival(confidences)
        fixed = float(policy.fixed_s[k, min(b, policy.fixed_s.shape[1] - 1)]) + policy.context_s_per_token * self._kv_tokens
        return best_lengths(survival, fixed, policy.verify_s)

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
