"""The adaptive policy without one of its parts, to measure the gain of the part."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from adaptive_spec.config.settings import ControllerSettings, PolicySettings
from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.domain.policy import Granularity
from adaptive_spec.domain.step_record import UNKNOWN_CONFIDENCE, StepFlag, StepRecord
from adaptive_spec.engines.simulated.adaptive import Adaptive, engine_info
from adaptive_spec.engines.simulated.scenario import Scenario

PREFIX = "without-"
FROZEN_AFTER_S = 20.0
"""A part that is fitted once learns from the sweep and this many seconds of traffic."""


class Part(StrEnum):
    """Parts that can be removed."""

    ONLINE_COST = "online-cost"
    ONLINE_CALIBRATION = "online-calibration"
    CONTEXT = "context"
    SLOTS = "slots"
    PROBING = "probing"
    GUARDS = "guards"
    CONFIDENCES = "confidences"


def settings_without(part: Part) -> ControllerSettings:
    """Default settings without the part."""
    if part is Part.PROBING:
        return ControllerSettings(policy=PolicySettings(probe_budget=0.0))
    if part is Part.GUARDS:
        return ControllerSettings(policy=PolicySettings(min_dwell_s=0.0, min_gain=0.0, rollback_loss=1.0))
    return ControllerSettings()


class AdaptiveWithout(Adaptive):
    """Adaptive, with records or an EngineInfo changed so that the part has no effect.

    Online cost: times after the first 20 s are marked as disturbed. Online calibration: outcomes after the first 20 s are
    marked as censored. Context: KV tokens are reported as 0. Slots: one K for all even where verify_len may differ.
    Confidences: all are reported as unknown. Probing, guards: by the controller's settings.
    """

    def __init__(self, scenario: Scenario, part: Part) -> None:
        self._part = part
        super().__init__(scenario, settings_without(part), info=self._info(scenario))

    def _info(self, scenario: Scenario) -> EngineInfo:
        info = engine_info(scenario)
        return replace(info, granularity=Granularity.BATCH) if self._part is Part.SLOTS else info

    def draft_length(self, batch_size: int, kv_tokens: int) -> int:
        return super().draft_length(batch_size, 0 if self._part is Part.CONTEXT else kv_tokens)

    def verify_lengths(self, confidences: NDArray[np.float32]) -> NDArray[np.uint8] | None:
        if self._part is Part.SLOTS:
            return None
        if self._part is Part.CONFIDENCES:
            confidences = np.full_like(confidences, UNKNOWN_CONFIDENCE)
        return super().verify_lengths(confidences)

    def observe(self, record: StepRecord) -> None:
        if self._part is Part.CONTEXT:
            record = replace(record, kv_tokens=0)
        if self._part is Part.CONFIDENCES:
            record = replace(record, confidences=np.full_like(record.confidences, UNKNOWN_CONFIDENCE))
        if record.time_ns * 1e-9 > FROZEN_AFTER_S:
            if self._part is Part.ONLINE_COST:
                record = replace(record, flags=record.flags | StepFlag.DISTURBED)
            elif self._part is Part.ONLINE_CALIBRATION:
                record = replace(record, flags=record.flags | StepFlag.CENSORED)
        super().observe(record)
