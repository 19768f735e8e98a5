"""The policy under test: the sidecar's own controller and the engine's own planner, in virtual time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptive_spec.config.settings import ControllerSettings
from adaptive_spec.control.controller import Controller
from adaptive_spec.domain.acceptance_history import REQUESTS_REMEMBERED, AcceptanceHistory
from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.domain.policy import Granularity, Policy
from adaptive_spec.domain.step_record import StepFlag, StepRecord
from adaptive_spec.engine_side.planner import Planner
from adaptive_spec.engine_side.step_choice import refined_k
from adaptive_spec.engines.simulated.plans import padded_sizes
from adaptive_spec.engines.simulated.scenario import Scenario

DELAY_STEPS = 1
"""Decode steps between a decision and its effect: the sidecar reads a record while the engine runs the next step."""

Profile = tuple[Mapping[str, NDArray[Any]], Mapping[str, NDArray[Any]]]


def engine_info(scenario: Scenario) -> EngineInfo:
    """The EngineInfo of the simulated server. It cannot hold a batch for a trial."""
    ks = {k for _, allowed in scenario.allowed_from for k in allowed}
    return EngineInfo(
        "simulated", scenario.name, "simulated", 1, scenario.launch_k, tuple(sorted(ks) or range(scenario.max_k + 1)),
        scenario.max_batch, Granularity(scenario.file.granularity), holds_batch=False, pid=1, allowed_from=scenario.allowed_from,
    )  # fmt: skip


class Adaptive:
    """Controller and planner with one step between decision and effect. The cold-start sweep counts as run time.

    At batch granularity K of a step is refined by the requests' own history, as in a server on a GPU, where the confidence
    of the first draft token is not known in time.

    profile: arrays of a profile to start from instead of a sweep. failures: calls of the controller that raised; as in the
    sidecar, the engine is then back on its launch K until a refit succeeds.
    """

    reads_scores = True
    reads_records = True

    def __init__(
        self,
        scenario: Scenario,
        settings: ControllerSettings | None = None,
        profile: Profile | None = None,
        info: EngineInfo | None = None,
    ) -> None:
        info = info or engine_info(scenario)
        self.controller = Controller(settings or ControllerSettings(), info)
        if profile is not None:
            self.controller.restore_profile(*profile)
        self.planner = Planner(info.launch_k, info.max_k, info.allowed_mask())
        self.history = AcceptanceHistory(max(info.max_k, 1), REQUESTS_REMEMBERED)
        self._request_ids: list[int] = []
        self.version = 0
        self.flags = int(StepFlag.FALLBACK)
        self._ragged, self._padded = scenario.ragged, padded_sizes(scenario)
        self.failures = 0
        self._step = 0
        self._now_s = 0.0
        self._published: list[tuple[int, Policy]] = []
        self._publish(self.controller.tick(0.0))

    @property
    def swaps(self) -> int:
        return sum(self.controller.counters.swaps.values())

    @property
    def probe_share(self) -> float | None:
        return self.controller.snapshot(self._now_s).probe_share

    def expect(self, request_ids: NDArray[np.uint32]) -> None:
        self._request_ids = request_ids.tolist()

    def draft_length(self, batch_size: int, kv_tokens: int) -> int:
        self._step += 1
        while self._published and self._published[0][0] + DELAY_STEPS < self._step:
            self.planner.adopt(self._published.pop(0)[1])
        k = self.planner.draft_length(batch_size, kv_tokens)
        if not self._ragged:
            padded, candidates = int(self._padded[batch_size]), self.controller.info.allowed_k(batch_size)
            k = refined_k(self.history, self.planner, self._request_ids, None, k, kv_tokens, padded, candidates)
        self.version = self.planner.version
        if self.planner.policy is None:
            self.flags = int(StepFlag.FALLBACK)
        else:
            flags = {StepFlag.TRIAL: self.planner.in_trial, StepFlag.LIMITED: self.planner.limited}
            flags[StepFlag.STEP_CHOICE] = self.planner.moved
            self.flags = sum(int(flag) for flag, holds in flags.items() if holds)
        return k

    def verify_lengths(self, confidences: NDArray[np.float32]) -> NDArray[np.uint8] | None:
        return self.planner.verify_lengths(confidences) if self._ragged else None

    def observe(self, record: StepRecord) -> None:
        self._now_s = now_s = record.time_ns * 1e-9
        if not self._ragged:
            self.history.observe(record.request_ids.tolist(), record.accept_len, record.k)
        self._publish(self._guarded(lambda: self.controller.observe(record, now_s), self.controller.record_failed))
        if self.controller.refit_due(now_s):
            fail = partial(self.controller.fail, "a refit failed")
            self._publish(self._guarded(lambda: self.controller.refit(now_s), fail))

    def _guarded(self, call: Callable[[], Policy | None], failed: Callable[[float], Policy | None]) -> Policy | None:
        """Handle exceptions of the controller as the sidecar's session does."""
        try:
            return call()
        except Exception:
            self.failures += 1
        with contextlib.suppress(Exception):
            return failed(self._now_s)
        return None

    def _publish(self, policy: Policy | None) -> None:
        if policy is not None:
            self._published.append((self._step, policy))
