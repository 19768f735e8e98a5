"""The control arm: the launch K on a small share of steps, so that the gain over it is measured and not forecast.

    gain = (sum tokens / sum seconds of the policy's steps) / (the same of the launch K's steps) - 1

A block is `STEPS` ordinary steps and, right after them, as many with the launch K at the same batch size; the first step with
the launch K is left out, because it has the cost of a change of K in it. The standard error is that of a jackknife over blocks
(Tukey, 1958): blocks, not steps, are independent, since load and speed of the machine change slowly. Where the policy's K is
the launch K nothing has to be run: a block with gain 0. Pure: no clock.
"""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

import numpy as np

from adaptive_spec.domain.policy import Trial
from adaptive_spec.domain.step_record import StepFlag, StepRecord

STEPS = 3
"""Steps of each arm in a block."""
MEMORY_BLOCKS = 128
MIN_BLOCKS = 8
"""Blocks below which the jackknife says little; the gain is then not known."""
_OTHER = StepFlag.TRIAL | StepFlag.FALLBACK | StepFlag.DISTURBED


class _Step(NamedTuple):
    batch_size: int
    tokens: int
    seconds: float


class ControlArm:
    """share: of the decode steps that run the launch K for comparison, 0..; 0: none, and the gain stays unknown."""

    def __init__(self, share: float, launch_k: int) -> None:
        self._every = math.inf if share <= 0.0 else (STEPS + 1) / share
        self._launch_k = launch_k
        self._since = 0
        self._ordinary: deque[_Step] = deque(maxlen=STEPS)
        self._before: tuple[_Step, ...] = ()
        self._run: list[_Step] = []
        self._version = 0
        self._blocks: deque[tuple[float, float, float, float]] = deque(maxlen=MEMORY_BLOCKS)
        """(tokens, seconds) of the policy's steps and of the launch K's."""

    @property
    def due(self) -> bool:
        """Whether a block is to be measured now."""
        same = len({step.batch_size for step in self._ordinary}) == 1
        return self._since >= self._every and len(self._ordinary) == STEPS and same

    @property
    def trial(self) -> Trial:
        """The launch K at the batch size of the latest steps."""
        return Trial(self._ordinary[-1].batch_size, self._launch_k, 0, STEPS + 1)

    def begin(self, version: int) -> None:
        """`trial` is part of policy `version`."""
        self._since, self._version, self._run, self._before = 0, version, [], tuple(self._ordinary)

    def count_same(self) -> None:
        """The policy's K is the launch K: a block without a difference."""
        tokens, seconds = float(sum(s.tokens for s in self._ordinary)), sum(s.seconds for s in self._ordinary)
        self._since = 0
        self._blocks.append((tokens, seconds, tokens, seconds))

    def observe(self, record: StepRecord) -> None:
        """Take one step, in order."""
        self._since += 1
        step = _Step(record.batch_size, record.output_tokens, record.step_s)
        if record.flags & StepFlag.TRIAL and record.policy_version == self._version and record.k == self._launch_k:
            if not record.flags & StepFlag.DISTURBED:
                self._run.append(step)
            if len(self._run) == STEPS + 1:
                self._close_block()
        elif record.policy_version and not record.flags & _OTHER:
            if not self._run:
                self._before = (*self._before, step)[-STEPS:]  # the policy with the trial is adopted some steps later
            self._ordinary.append(step)

    def _close_block(self) -> None:
        run, before = self._run[1:], self._before
        self._version, self._run = 0, []
        if len(before) == STEPS and len({step.batch_size for step in (*run, *before)}) == 1:
            ours = float(sum(s.tokens for s in before)), sum(s.seconds for s in before)
            theirs = float(sum(s.tokens for s in run)), sum(s.seconds for s in run)
            self._blocks.append((*ours, *theirs))

    def gain(self) -> tuple[float, float] | None:
        """(gain over the launch K, its standard error), 0 = none; None with too few blocks."""
        if len(self._blocks) < MIN_BLOCKS:
            return None
        blocks = np.array(self._blocks)
        total = blocks.sum(axis=0)
        rest = total - blocks
        if (total <= 0.0).any() or (rest <= 0.0).any():
            return None
        without = rest[:, 0] / rest[:, 1] * rest[:, 3] / rest[:, 2]
        n = len(blocks)
        error = math.sqrt((n - 1) / n * float(((without - without.mean()) ** 2).sum()))
        return float(total[0] / total[1] * total[3] / total[2]) - 1.0, error
