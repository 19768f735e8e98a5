"""Offline cost and offline calibration: DSpark as it is configured from files.

The cost table is the scenario's own curve at its start, without error; the calibration is fitted to 400 recorded steps of the
first phase at the longest draft. Both are taken from files and never change. Batch granularity: K of most expected tokens
per second for each batch size, from the recorded mean acceptance. Request granularity: the whole block is drafted and the
slots of most expected tokens per second are verified. The best a careful engineer can do by hand for the first hour.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from adaptive_spec.domain.plan_search import best_lengths
from adaptive_spec.domain.step_record import StepRecord
from adaptive_spec.domain.survival import SurvivalMap
from adaptive_spec.engines.simulated.decider import PlainDecider, Static
from adaptive_spec.engines.simulated.plans import Costs
from adaptive_spec.engines.simulated.scenario import Scenario
from adaptive_spec.engines.simulated.server import SimulatedServer
from adaptive_spec.models.acceptance.online import AcceptanceModel

RECORDED_STEPS = 400


class Recorder(Static):
    """Drafts K for all and keeps what happened."""

    reads_scores = True
    reads_records = True

    def __init__(self, k: int) -> None:
        super().__init__(k)
        self.records: list[StepRecord] = []

    def observe(self, record: StepRecord) -> None:
        if len(self.records) < RECORDED_STEPS:
            self.records.append(record)


def record_first_phase(scenario: Scenario, seed: int) -> list[StepRecord]:
    """Steps at the longest draft in the scenario's first phase, on other requests than those of the run."""
    end_s = min([*scenario.phase_starts[1:2], scenario.file.duration_s])
    recorder = Recorder(scenario.max_k)
    server = SimulatedServer(scenario, seed + 1_000_003)
    while server.time_s < end_s and len(recorder.records) < RECORDED_STEPS:
        server.run(recorder, min(server.time_s + 1.0, end_s))
    return recorder.records


def calibration(records: list[StepRecord], max_k: int) -> SurvivalMap:
    """Fit the calibration to recorded steps, forgetting nothing."""
    model = AcceptanceModel(max_k, np.inf)
    for record in records:
        model.observe(record)
        model.learn()
    model.refit()
    return model.survival


class OfflineFiles(PlainDecider):
    """See the module."""

    def __init__(self, scenario: Scenario, seed: int) -> None:
        super().__init__()
        self._ragged = self.reads_scores = scenario.ragged
        self._max_k = scenario.max_k
        costs, records = Costs(scenario), record_first_phase(scenario, seed)
        self._verify_ms, self._fixed_ms = costs.verify_ms, costs.draft_ms + costs.overhead_ms
        self._survival = calibration(records, scenario.max_k) if scenario.ragged else None
        position = np.arange(self._max_k)
        mean = np.mean([(position < record.accept_len[:, None]).mean(axis=0) for record in records], axis=0)
        expected = 1.0 + np.concatenate(([0.0], np.cumsum(mean)))
        self._table = [] if scenario.ragged else (expected / (self._verify_ms + self._fixed_ms)).argmax(axis=1).tolist()

    def draft_length(self, batch_size: int, kv_tokens: int) -> int:
        return self._max_k if self._ragged else int(self._table[batch_size])

    def verify_lengths(self, confidences: NDArray[np.float32]) -> NDArray[np.uint8] | None:
        assert self._survival is not None
        b, k = confidences.shape
        survival = self._survival.survival(confidences)
        return best_lengths(survival, float(self._fixed_ms[k]), self._verify_ms[: b * (k + 1) + 1])
