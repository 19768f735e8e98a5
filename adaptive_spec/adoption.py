"""What becomes of a published policy, told by the engine's records: trials are run, or will not be."""

from __future__ import annotations

from collections.abc import Sequence

from adaptive_spec.policy import Planner, Trial
from adaptive_spec.records import StepFlag, StepRecord


class PendingTrials:
    """The trials of the newest policy, until they were run or it is clear that they will not be. left: steps of them."""

    def __init__(self) -> None:
        self.left = 0
        self._until_s = 0.0
        self._plain = 0

    def begin(self, trials: Sequence[Trial], until_s: float) -> None:
        """A policy with these trials is published; at until_s they are given up."""
        self.left, self._until_s, self._plain = sum(trial.steps for trial in trials), until_s, 0

    def running(self, now_s: float) -> bool:
        return self.left > 0 and now_s < self._until_s

    def ended(self, record: StepRecord, version: int, now_s: float) -> bool:
        """Take one step; whether with it the trials of policy `version` have come to their end."""
        if self.left == 0 or record.policy_version != version:
            return False
        trial = bool(record.flags & StepFlag.TRIAL)
        self.left -= trial
        self._plain = 0 if trial else self._plain + 1
        # The planner waits for a batch that does not come, then skips its trial: such a round ends without them.
        if self._plain > Planner.PATIENCE_STEPS + 8 or now_s > self._until_s:
            self.left = 0
        return self.left <= 0
