"""What becomes of a published policy, told by the engine's records: trials are run, policies are followed, or not."""

from __future__ import annotations

from collections.abc import Sequence

from adaptive_spec.domain.policy import TRIAL_PATIENCE_STEPS, Trial
from adaptive_spec.domain.step_record import StepFlag, StepRecord

WATCHED = "the engine only lets itself be watched: its steps run none of the policies made for it"
IGNORED_STEPS, IGNORED_S = 128, 5.0
"""Steps in a row by no policy, and the seconds they last at least, after which an engine counts as one that only lets itself be
watched: twice the steps it may run before it looks for a new page; a backlog from before the policy is read much sooner."""


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
        if self._plain > TRIAL_PATIENCE_STEPS + 8 or now_s > self._until_s:
            self.left = 0
        return self.left <= 0


class EngineResponse:
    """Whether the engine runs what is published for it. ignored: it only lets itself be watched, as far as its steps tell.

    A step by a policy tells that it does. A step by none, of an engine that does not call it a fallback, tells that it does not,
    if enough of them follow on one another. An idle engine tells nothing.
    """

    def __init__(self, ignored: bool = False) -> None:
        self.ignored = ignored
        self._steps = 0
        self._since_s = 0.0

    def changed(self, record: StepRecord, offered: bool, now_s: float) -> bool:
        """Take one step; whether with it `ignored` has changed. offered: there is a policy that wants to act."""
        if record.policy_version:
            self._steps = 0
            followed, self.ignored = self.ignored, False
            return followed
        if not offered:
            self._steps = 0
        if not offered or self.ignored or record.flags & StepFlag.FALLBACK:
            return False
        if self._steps == 0:
            self._since_s = now_s
        self._steps += 1
        self.ignored = self._steps >= IGNORED_STEPS and now_s - self._since_s >= IGNORED_S
        return self.ignored
