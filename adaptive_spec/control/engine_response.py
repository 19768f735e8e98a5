"""What the engine does with a published policy, by its step records: whether trials were run, and whether it runs policies."""

from __future__ import annotations

from collections.abc import Sequence

from adaptive_spec.domain.policy import TRIAL_PATIENCE_STEPS, Trial
from adaptive_spec.domain.step_record import StepFlag, StepRecord

OBSERVE_ONLY = "the engine is observe-only: its steps run none of the policies made for it"
OBSERVE_ONLY_STEPS, OBSERVE_ONLY_S = 128, 5.0
"""Steps in a row without a policy, and the seconds they must last, after which an engine counts as observe-only: twice the steps
it may run before it looks for a new page. The seconds exclude a backlog of old records, which is read in much less time."""
ADOPTION_STEPS = 1200
"""Steps in a row without a published policy after which it counts as lost: a full ring of older records (1024), twice the steps
until the engine looks for a new page (64), and some for ranks to agree."""


class PendingTrials:
    """The trials of the latest policy, until they were run or skipped. Deadlines are decode steps: an idle server loses nothing.

    left: trial steps that remain. overdue: the engine has run `ADOPTION_STEPS` in a row without the policy: it was lost.
    """

    def __init__(self) -> None:
        self.trials: tuple[Trial, ...] = ()
        self.left = 0
        self.overdue = False
        self._ordinary_steps = 0
        self._other_steps = 0

    def begin(self, trials: Sequence[Trial]) -> None:
        """A policy with these trials is published."""
        self.trials, self.left = tuple(trials), sum(trial.steps for trial in trials)
        self.overdue, self._ordinary_steps, self._other_steps = False, 0, 0

    def next_steps(self, count: int) -> list[Trial]:
        """The trial of each of the next `count` trial steps; fewer when fewer are left."""
        steps = [trial for trial in self.trials for _ in range(trial.steps)]
        return steps[len(steps) - self.left :][:count]

    def ended(self, record: StepRecord, version: int) -> bool:
        """Take one step; return whether with it the trials of policy `version` ended. Trials that are overdue have ended."""
        if self.left == 0:
            return False
        if record.policy_version != version:
            self._other_steps += 1
            if self._other_steps >= ADOPTION_STEPS:
                self.left, self.overdue = 0, True
            return self.overdue
        self._other_steps = 0
        # A trial step that the engine could not run exactly also counts.
        trial = bool(record.flags & (StepFlag.TRIAL | StepFlag.LIMITED))
        self.left -= trial
        self._ordinary_steps = 0 if trial else self._ordinary_steps + 1
        # The planner skips a trial whose batch size does not come: the round then ends without it.
        if self._ordinary_steps > TRIAL_PATIENCE_STEPS + 8:
            self.left = 0
        return self.left <= 0


class EngineResponse:
    """Whether the engine runs the policies published for it. observe_only: it does not, by its steps so far.

    One step with a policy shows that it does. Enough steps in a row without one, and without the fallback flag, show that it does
    not. No steps show nothing.
    """

    def __init__(self, observe_only: bool = False) -> None:
        self.observe_only = observe_only
        self._steps = 0
        self._since_s = 0.0

    def changed(self, record: StepRecord, offered: bool, now_s: float) -> bool:
        """Take one step; return whether `observe_only` changed with it. offered: an acting policy is published."""
        if record.policy_version:
            self._steps = 0
            changed, self.observe_only = self.observe_only, False
            return changed
        if not offered:
            self._steps = 0
        if not offered or self.observe_only or record.flags & StepFlag.FALLBACK:
            return False
        if self._steps == 0:
            self._since_s = now_s
        self._steps += 1
        self.observe_only = self._steps >= OBSERVE_ONLY_STEPS and now_s - self._since_s >= OBSERVE_ONLY_S
        return self.observe_only
