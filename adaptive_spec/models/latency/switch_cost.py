"""What a change of K costs: the extra seconds of the first step after it.

    sample = seconds of the first step with another K - seconds of the step after it, with the same K and batch size
    cost   = trimmed mean of the last samples, each divided by the speed factor it was measured at; >= 0

The second step of the same plan is the first one's expectation, so that no error of a latency model enters. A pair counts when
the three steps around the change follow each other without a gap, have the same batch size, and are not disturbed: a batch that
changes has costs of its own.

Regimes: with few samples, or where the mean is within `SIGNIFICANT` standard errors of 0, the cost is unknown and nothing is
charged; otherwise the mean is charged.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptive_spec.domain.policy import Granularity
from adaptive_spec.domain.step_record import StepFlag, StepRecord
from adaptive_spec.models.latency.speed_factor import SpeedFactor
from adaptive_spec.models.plausible import LARGEST_WEIGHT, plausible

MEMORY_SAMPLES = 256
"""Latest samples the mean is taken over. With step times that vary by 3 % it is then known to 0.3 % of a step."""
MIN_SAMPLES = 16
TRIMMED = 0.1
"""Share of the samples left out at each end: a spike of one step is up to a hundred times a change of K."""
SIGNIFICANT = 4.0
"""Standard errors above 0 from which on the cost is known: every refit tests it, so 2 or 3 would soon be passed by chance."""


class SwitchCost:
    """Learns the cost from consecutive records.

    mean_s, error_s: mean and its standard error at speed factor 0, as of the last `refit`; None: too few samples.
    """

    def __init__(self, granularity: Granularity, speed_factor: SpeedFactor) -> None:
        self._verify_varies = granularity is Granularity.REQUEST
        self._speed_factor = speed_factor
        self._samples: deque[float] = deque(maxlen=MEMORY_SAMPLES)
        self._before: StepRecord | None = None
        self._first: StepRecord | None = None
        """The first step after a change of K, while its second is awaited."""
        self.mean_s: float | None = None
        self.error_s: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds to charge for a change of K at the present speed factor; 0 while the cost is unknown."""
        if self.mean_s is None or self.error_s is None or self.mean_s <= SIGNIFICANT * self.error_s:
            return 0.0
        return self.mean_s * math.exp(self._speed_factor.value)

    @property
    def measured_s(self) -> float | None:
        """Mean seconds that a change of K costs at the present speed factor, significant or not; None: too few samples."""
        return None if self.mean_s is None else self.mean_s * math.exp(self._speed_factor.value)

    def observe(self, record: StepRecord) -> bool:
        """Take one step, in order; return whether it is the first one after a change of K."""
        before, first = self._before, self._first
        self._before, self._first = record, None
        if before is None or record.step != before.step + 1:
            return False
        same_batch = record.batch_size == before.batch_size and not (record.flags | before.flags) & StepFlag.DISTURBED
        if record.k != before.k:
            self._first = record if same_batch else None
            return True
        if first is not None and same_batch:
            extra_s = self._comparable_s(first) - self._comparable_s(record)
            self._samples.append(extra_s * math.exp(-self._speed_factor.value))
        return False

    def _comparable_s(self, record: StepRecord) -> float:
        """Seconds that are the same for two steps of one plan but for the change of K."""
        # With ragged verification the number of verified tokens differs from step to step.
        return record.step_s - record.verify_s if self._verify_varies else record.step_s

    def refit(self) -> None:
        """Take the trimmed mean of the samples and its standard error (winsorised variance; Tukey & McLaughlin, 1963)."""
        if len(self._samples) < MIN_SAMPLES:
            return
        ordered = np.sort(np.array(self._samples))
        cut = int(TRIMMED * len(ordered))
        kept = ordered[cut : len(ordered) - cut]
        winsorised = np.clip(ordered, kept[0], kept[-1])
        self.mean_s = max(float(kept.mean()), 0.0)
        self.error_s = float(winsorised.std(ddof=1)) / ((1.0 - 2.0 * TRIMMED) * math.sqrt(len(ordered)))

    def state(self) -> NDArray[np.float64]:
        """The samples at the present speed factor, seconds [n]."""
        return np.array(self._samples, dtype=np.float64) * math.exp(self._speed_factor.value)

    def restore(self, state: NDArray[Any]) -> None:
        """Take over `state()`. Raises ValueError unless it is one row of at most `MEMORY_SAMPLES` finite seconds."""
        samples = np.asarray(state, dtype=np.float64)
        plausible("switch_cost", samples, (None,), -LARGEST_WEIGHT, LARGEST_WEIGHT)
        if len(samples) > MEMORY_SAMPLES:
            raise ValueError(f"switch_cost: must be at most {MEMORY_SAMPLES} finite seconds, got {len(samples)}")
        self._samples = deque((samples * math.exp(-self._speed_factor.value)).tolist(), maxlen=MEMORY_SAMPLES)
        self.refit()
