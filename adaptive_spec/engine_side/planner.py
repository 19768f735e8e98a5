"""Executes policies step by step inside the engine: trials first, then the table, then the per-request search."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from adaptive_spec.domain.arrays import Floats
from adaptive_spec.domain.plan_search import best_lengths, best_slots
from adaptive_spec.domain.policy import TRIAL_PATIENCE_STEPS, Granularity, Policy, Trial
from adaptive_spec.domain.step_record import UNKNOWN_CONFIDENCE
from adaptive_spec.domain.survival import SurvivalMap


class Planner:
    """Executes policies step by step inside the engine: trials first, then the table, then the per-request search.

    launch_k: K the engine was started with, used whenever no policy is acting. max_k: largest K it can run. A trial waits
    at most `TRIAL_PATIENCE_STEPS` for its batch size, so that a sweep cannot hang on a batch that never comes.
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
        """Version of the policy this planner acts on, 0 on the launch K."""
        return self.policy.version if self.policy is not None and self.policy.acting else 0

    @property
    def in_trial(self) -> bool:
        """Whether the step `draft_length` was last asked for is a trial."""
        return self._running is not None

    @property
    def trial_tokens(self) -> int:
        """Tokens the trial `in_trial` speaks of wants verified, 0 for all; 0 outside a trial too."""
        return self._running.num_tokens if self._running is not None else 0

    @property
    def held_batch_size(self) -> int:
        """Batch size the current trial wants, 0 when any will do."""
        trial = self._current_trial()
        return trial.batch_size if trial is not None else 0

    def adopt(self, policy: Policy | None) -> None:
        """Take a new policy (None: back to the launch K); its trials start from the first."""
        self.policy = policy
        self._trial = self._trial_steps = self._waited = 0

    def draft_length(self, batch_size: int, kv_tokens: int) -> int:
        """Return K of the coming step, 0..max_k."""
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

    def verify_lengths(self, confidences: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Return verify_len [b] for the drafted confidences [b, k] of the step `draft_length` was asked for.

        A request with an unknown confidence counts as the mean of those without; where there are none, all count alike.
        """
        b, k = confidences.shape
        policy = self.policy
        if policy is None or not policy.acting or k == 0:
            return np.full(b, k, dtype=np.uint8)
        if self._running is not None:
            wanted = self._running.num_tokens
            if wanted == 0 or policy.granularity is Granularity.BATCH:
                return np.full(b, k, dtype=np.uint8)
            return best_slots(_survival(policy.survival, confidences), min(max(wanted - b, 0), b * k))
        if policy.verify_all or b * (k + 1) >= len(policy.verify_s):
            return np.full(b, k, dtype=np.uint8)
        survival = _survival(policy.survival, confidences)
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


def _survival(calibration: SurvivalMap, confidences: NDArray[np.float32]) -> Floats:
    """Survival [b, k], with what `Planner.verify_lengths` says of unknown confidences.

    Where most are unknown the sidecar's calibration is the rates of the positions, whatever the confidence.
    """
    if np.count_nonzero(confidences) == confidences.size:
        return calibration.survival(confidences)
    unknown = confidences == UNKNOWN_CONFIDENCE
    survival = calibration.survival(np.where(unknown, np.float32(0.5), confidences))
    known = ~unknown.any(axis=1)
    if known.any():
        survival[~known] = survival[known].mean(axis=0)
    return survival
