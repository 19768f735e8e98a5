"""Publication: makes the next policy from the K table and the latest forecast, and numbers it."""

from __future__ import annotations

import numpy as np

from adaptive_spec.control.guard_rails import Table, table_for
from adaptive_spec.domain.allowed import LARGEST_K, mask_ranges
from adaptive_spec.domain.arrays import Bools
from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.domain.policy import STEP_CHOICE_GAIN, Granularity, Mode, Policy, Trial, largest_tokens
from adaptive_spec.domain.step_record import LONGEST_S
from adaptive_spec.domain.survival import SurvivalMap
from adaptive_spec.models.goodput import Forecast

MIN_COST_CHANGE, MIN_CALIBRATION_CHANGE = 0.005, 0.01
"""Relative change of a verify time, and change of a survival, below which the per-step search would choose the same."""
MIN_SWITCH_CHANGE = 0.2
"""Relative change of the cost of a change of K below which the step choice would choose the same."""


NO_STEP_CHOICE_GAIN = 1.0
"""Gain that the step choice needs where it is to be off: twice the goodput, the largest `min_gain` of a policy."""


class Publisher:
    """latest: the newest policy, None before the first. version: its number, never falling. time_s: when it was made."""

    def __init__(
        self, info: EngineInfo, allowed: Bools, min_gain: float, step_choice: bool = True, k_min: int = 0, k_max: int = LARGEST_K
    ) -> None:
        """allowed: K within the guard rails, [max_batch + 1, max_k + 1]: the engine's own choices of a step keep to it too.
        min_gain: of the settings; the step choice needs this gain, at least `STEP_CHOICE_GAIN`. step_choice: False: off.
        k_min, k_max: the guard rails, 0 <= k_min <= k_max <= LARGEST_K.
        """
        self._info = info
        self._k_min, self._k_max = k_min, k_max
        self._allowed_from = mask_ranges(allowed)
        self._min_gain = max(min_gain, STEP_CHOICE_GAIN) if step_choice else NO_STEP_CHOICE_GAIN
        self.latest: Policy | None = None
        self.version = 0
        self.time_s: float | None = None

    def publish(
        self, mode: Mode, acting: bool, table: Table, forecast: Forecast | None, untrained: SurvivalMap,
        trials: tuple[Trial, ...], now_s: float,
    ) -> Policy:  # fmt: skip
        """Make the next policy.

        acting: False: the engine's fallback decides K. untrained: calibration to use before the first forecast.
        """
        info = self._info
        if forecast is not None:
            fixed_s, verify_s, survival = forecast.fixed_s, forecast.verify_s, forecast.survival
            slope, edges = forecast.context_s_per_token, forecast.context_edges
        else:
            # Nothing measured yet: verify everything, and let trials choose tokens by the untrained calibration.
            fixed_s = np.zeros((info.max_k + 1, info.max_batch + 1))
            verify_s = np.ones(info.max_batch * (info.max_k + 1) + 1)
            survival, slope, edges = untrained, 0.0, np.zeros(0, dtype=np.float32)
        # Extrapolated times may be beyond what an engine takes. A NaN stays one: it is a fault, and refused.
        fixed_s = np.clip(fixed_s, 0.0, LONGEST_S)
        verify_s = np.clip(verify_s[: largest_tokens(info.max_batch, info.max_k) + 1], 0.0, LONGEST_S)
        verify_all = mode is Mode.PINNED or forecast is None or info.granularity is Granularity.BATCH
        self.version += 1
        self.time_s = now_s
        self.latest = Policy(
            self.version, mode, acting, info.granularity, info.max_k, table_for(table, len(edges) + 1), edges,
            fixed_s.astype(np.float32), verify_s.astype(np.float32), slope, survival, verify_all, trials,
            self._allowed_from, self._min_gain, forecast.switch_s if forecast is not None else 0.0,
            self._k_min, self._k_max,
        )  # fmt: skip
        return self.latest

    def has_table(self, table: Table) -> bool:
        """Whether the latest policy has this table, in any number of contexts."""
        return self.latest is not None and np.array_equal(self.latest.k_table, table_for(table, self.latest.k_table.shape[1]))

    def outdated(self, mode: Mode, table: Table, forecast: Forecast) -> bool:
        """Whether the engine would choose differently by a policy of this table and forecast than by the latest."""
        last = self.latest
        if last is None or not np.array_equal(last.k_table, table):
            return True
        if mode is Mode.SHADOW:
            return False
        n = min(len(last.verify_s), len(forecast.verify_s))
        cost_change = float(np.max(np.abs(last.verify_s[1:n] / forecast.verify_s[1:n] - 1.0)))
        calibration_change = float(np.max(np.abs(last.survival.table - forecast.survival.table), initial=0.0))
        return (
            cost_change > MIN_COST_CHANGE
            or abs(forecast.switch_s - last.switch_s) > MIN_SWITCH_CHANGE * last.switch_s
            or calibration_change > MIN_CALIBRATION_CHANGE
            or last.survival.conditional != forecast.survival.conditional
        )

    def resume(self, version: int) -> None:
        """Continue after `version`: versions never go back, whichever process published the last one."""
        self.version = max(self.version, version)
