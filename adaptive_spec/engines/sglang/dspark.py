"""DSpark: hot swap of the running planner's SPS cost table and STS temperatures, from a policy of the online models.

SGLang's planner maximises, over the number of verified draft tokens, what our own search does:

    (b + sum of the best survivals) / step_time(b, b + verified),    step_time(b, m) = bias + alpha(b) + theta(m)

with survival = running product of sigmoid(raw confidence / temperature of its position). It reads table and temperatures from
files at start only. Here bias + alpha(b) becomes the fixed cost of drafting gamma tokens for b requests, theta the verify latency
with every corner of its staircase, and each temperature the one under which the calibrated map is closest to a pure scaling of
the logit. A swap that does not stand every check leaves both as they were.

Nothing in this package feeds these models from a DSpark server yet: its steps are not tapped. What is here is the swap.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from adaptive_spec.engines.sglang.ranks import Rendezvous
from adaptive_spec.policy import GRID_POINTS, LOGIT_LIMIT, Policy, SurvivalMap

TEMPERATURE_RANGE = (0.05, 20.0)
STRAIGHT = 1e-6
"""Relative deviation from a straight line up to which a token count needs no probe of its own."""

log = logging.getLogger("sglang.adaptive_spec")
Floats = NDArray[np.float64]


class CostTable(NamedTuple):
    """Fields of SGLang's SpsAdditiveCostTable, which interpolates both lists and holds their ends."""

    bias_seconds: float
    bs_probes: list[int]
    alpha_seconds: list[float]
    m_probes: list[int]
    theta_seconds: list[float]


def cost_table(policy: Policy, gamma: int) -> CostTable:
    """The policy's predicted step time as SGLang's table. gamma: draft tokens per request.

    Raises ValueError when the policy predicts no time for that gamma, or one that cannot be.
    """
    if not 1 <= gamma <= policy.max_k:
        raise ValueError(f"gamma {gamma} is not in 1..{policy.max_k} of the policy")
    fixed_s = np.asarray(policy.fixed_s[gamma, 1:], np.float64)
    verify_s = np.asarray(policy.verify_s[1:], np.float64)
    if not len(fixed_s) or not len(verify_s):
        raise ValueError("the policy predicts no time for any batch")
    for name, values in (("fixed_s", fixed_s), ("verify_s", verify_s)):
        if not np.isfinite(values).all() or values.min() < 0.0:
            raise ValueError(f"{name} holds a value that is no time")
    if fixed_s.min() + verify_s.min() <= 0.0:
        raise ValueError("a step would take no time")
    # SGLang wants a bias above 0; what is moved from one part to the other changes no sum.
    bias = float(fixed_s.min())
    shift = 0.0 if bias > 0.0 else 0.5 * float(verify_s.min())
    rows, tokens = _corners(fixed_s), _corners(verify_s)
    return CostTable(
        bias + shift,
        (rows + 1).tolist(),
        (fixed_s[rows] - bias).tolist(),
        (tokens + 1).tolist(),
        (verify_s[tokens] - shift).tolist(),
    )


def _corners(values: Floats) -> NDArray[np.int64]:
    """Indices at which a line through all values bends, both ends included: interpolation between them gives every value."""
    if len(values) < 3:
        return np.arange(len(values))
    bend = np.abs(np.diff(values, 2)) > STRAIGHT * values[1:-1]
    return np.flatnonzero(np.concatenate(([True], bend, [True])))


def temperatures(survival: SurvivalMap, current: Floats) -> Floats:
    """STS temperatures [gamma] that bring SGLang's confidences closest to the calibrated ones.

    survival: conditional map, made of confidences under `current` temperatures [gamma]. Least squares on the logits between
    0.02 and 0.98, through the origin: y = x * current / new. Raises ValueError: not conditional, too short, or out of range.
    """
    if not survival.conditional:
        raise ValueError("the calibration is one of cumulative scores, temperatures scale single confidences")
    gamma = len(current)
    if len(survival.table) < gamma:
        raise ValueError(f"the calibration knows {len(survival.table)} positions, {gamma} are drafted")
    x = np.linspace(-LOGIT_LIMIT, LOGIT_LIMIT, GRID_POINTS)
    table = survival.table[:gamma].astype(np.float64)
    y = np.log(table / (1.0 - table))
    inside = np.abs(x) <= 4.0
    slope = (y[:, inside] @ x[inside]) / float(x[inside] @ x[inside])
    if not np.isfinite(slope).all() or slope.min() <= 0.0:
        raise ValueError("the calibration falls with the confidence, no temperature does that")
    found: Floats = np.asarray(current / slope)
    low, high = TEMPERATURE_RANGE
    if found.min() < low or found.max() > high:
        raise ValueError(f"temperature {found.min():g}..{found.max():g} is not in {low:g}..{high:g}")
    return found


class DSparkSwap:
    """Keeps one running planner at the newest policy, all ranks in the same step.

    planner: SGLang's DSparkVerifyPlanner. swaps, refused: how often each happened. reason: of the last refusal, "" before one.
    """

    def __init__(self, planner: Any, gamma: int, rendezvous: Rendezvous) -> None:
        self._planner, self._gamma, self._rendezvous = planner, gamma, rendezvous
        self._version = 0
        self.swaps = self.refused = 0
        self.reason = ""

    def at_step(self, newest: Callable[[], Policy | None]) -> None:
        """Call once per decode step, before the planner plans it. Never raises; see `Rendezvous.at_step`."""
        policy = self._rendezvous.at_step(newest)
        if policy is None or not policy.acting or policy.version == self._version:
            return
        self._version = policy.version
        try:
            self._apply(policy)
            self.swaps += 1
        except Exception as error:
            self.refused += 1
            self.reason = " ".join(str(error).split()) or type(error).__name__
            log.warning("adaptive-spec: policy %d was not taken over, the old SPS table stays: %s", policy.version, self.reason)

    def _apply(self, policy: Policy) -> None:
        import torch
        from sglang.srt.speculative.dspark_components.dspark_sps import SpsAdditiveCostTable
        from sglang.srt.speculative.dspark_components.dspark_sts import DSparkStsCalibration

        planner = self._planner
        budget = planner._budget_planner
        if budget is None or planner.is_verify_all:
            raise ValueError("this planner was started without an SPS table and verifies everything")
        table = SpsAdditiveCostTable(**cost_table(policy, self._gamma)._asdict())
        head = planner._confidence_head
        held = head.sts_temperatures if head is not None else None
        wanted = None
        # One temperature for all (no file at start) is a constant of captured graphs: only a list can be written into.
        if held is not None and held.ndim == 1 and len(held) == self._gamma and policy.survival.conditional:
            fitted = temperatures(policy.survival, held.detach().cpu().numpy().astype(np.float64))
            wanted = DSparkStsCalibration(temperatures=fitted.tolist()).temperatures
            if not all(math.isfinite(t) for t in wanted):
                raise ValueError("a temperature is not finite")
        # Everything is sound: from here on nothing can fail half-way.
        if held is not None and wanted is not None:
            held.copy_(torch.tensor(wanted, dtype=held.dtype))  # in place: graphs keep its address
        budget.sps_table = table
