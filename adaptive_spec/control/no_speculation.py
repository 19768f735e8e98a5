"""The measured gain over no speculation: recent steps against what the same server took without a draft.

    gain = sum over steps of output_tokens * step_s(batch size) / batch size      seconds without speculation for the same tokens
           ------------------------------------------------------------------ - 1
           sum over steps of their own seconds

step_s is from the profile of the same engine run without speculation, where one token per request comes out of a step. So it is
measured, but not at the same time: slowness of the machine that came or went in between is in the gain. K = 0 of a speculative
server is no such measurement: its steps still keep up the draft's cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptive_spec.config.settings import ControllerSettings
from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.domain.policy import Granularity
from adaptive_spec.domain.step_record import StepFlag, StepRecord
from adaptive_spec.models.model_set import ModelSet

OF_THE_DRAFT = ("draft", "speculative_algorithm")
"""Fields of the fingerprint that an engine without speculation does not have."""
MEMORY_STEPS = 512
"""Steps after which a step counts 1/e: as many as some seconds to a minute of decoding, so that the gain is that of the present
traffic. Fewer make it follow faster and vary more."""
LEAST_STEPS = 64
"""Steps before a gain is told: an eighth of the memory."""


def without_speculation(info: EngineInfo) -> EngineInfo:
    """Return the same engine without speculation: its model, hardware and options, no draft, K = 0."""
    fingerprint = tuple((name, value) for name, value in info.fingerprint if name not in OF_THE_DRAFT)
    return replace(
        info,
        launch_k=0,
        candidates=(0,),
        granularity=Granularity.BATCH,
        holds_batch=False,
        allowed_from=(),
        fingerprint=fingerprint,
    )


class GainOverNoSpeculation:
    """See the module. gain: 0 = none; None before LEAST_STEPS steps of batch sizes that were measured without speculation."""

    def __init__(
        self, settings: ControllerSettings, plain: EngineInfo, latency: Mapping[str, NDArray[Any]],
        calibration: Mapping[str, NDArray[Any]],
    ) -> None:  # fmt: skip
        """plain: `without_speculation` of the engine. latency, calibration: arrays of its profile. Raises ValueError."""
        models = ModelSet(settings, plain)
        models.take(latency, calibration)
        models.fit()
        measured = models.measured_counts().by_padded
        if models.forecast is None or not measured:
            raise ValueError("the profile has no step times")
        self._forecast = models.forecast
        self._largest = min(max(measured), plain.max_batch)
        self._plain_s = self._own_s = 0.0
        self._steps = 0

    def observe(self, record: StepRecord) -> None:
        """Count a step, unless its time is not the model's or its batch size was not measured without speculation."""
        b = record.batch_size
        if record.flags & StepFlag.DISTURBED or b > self._largest or record.step_s <= 0.0:
            return
        forecast = self._forecast
        context = int(np.searchsorted(forecast.context_edges, record.kv_tokens / b, side="right"))
        tokens_per_s = float(forecast.goodput[b, context, 0])
        keep = 1.0 - 1.0 / MEMORY_STEPS
        self._plain_s = keep * self._plain_s + record.output_tokens / tokens_per_s
        self._own_s = keep * self._own_s + record.step_s
        self._steps += 1

    @property
    def gain(self) -> float | None:
        return self._plain_s / self._own_s - 1.0 if self._steps >= LEAST_STEPS else None
