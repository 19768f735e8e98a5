"""Hot swap of DSpark's SPS cost table and STS temperatures in the running planner, from the sidecar's policy.

SGLang's planner maximises the same goodput as our plan search, over the number of verified draft tokens:

    (b + sum of the best survivals) / step_time(b, b + verified),    step_time(b, m) = bias + alpha(b) + theta(m)

with survival = running product of sigmoid(raw confidence / temperature of its position). It reads table and temperatures from
files at start only. Here bias + alpha(b) becomes the fixed cost of drafting gamma tokens for b requests, theta the verify latency
staircase, and each temperature the one under which the calibrated map is closest to a scaling of the logit. If a check of the
new values fails, both stay as they were.

The policy's rails limit the draft tokens of a step, see `DSparkSwap`: in the planner's own plans, in forced ones, and where it
has none. They limit the sum over the requests; SGLang shares it out.

The calibration is one of confidences under the temperatures of the launch, which `dspark_attachment` records whatever the current
ones are. Otherwise each swap would change the confidences the next calibration is fitted to.
"""

from __future__ import annotations

import logging
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from adaptive_spec.domain.arrays import Floats
from adaptive_spec.domain.policy import Mode, Policy
from adaptive_spec.domain.survival import GRID_POINTS, LOGIT_LIMIT, SurvivalMap
from adaptive_spec.errors import one_line

TEMPERATURE_RANGE = (0.05, 20.0)
STRAIGHT = 1e-6
"""A token count whose latency deviates less than this, relatively, from the line through its neighbours gets no table entry."""

_PLAN = "_budget_from_resolved"
"""The planner's method that every budget comes from, with and without the overlap scheduler."""

log = logging.getLogger("sglang.adaptive_spec")


class CostTable(NamedTuple):
    """Fields of SGLang's SpsAdditiveCostTable, which interpolates both lists and holds their ends."""

    bias_seconds: float
    bs_probes: list[int]
    alpha_seconds: list[float]
    m_probes: list[int]
    theta_seconds: list[float]


def cost_table(policy: Policy, gamma: int, kv_per_request: float = 0.0) -> CostTable:
    """The policy's predicted step time as SGLang's table.

    gamma: draft tokens per request. kv_per_request: context tokens per request. SGLang's table has no context dimension, so
    their cost is added to the cost per request.

    Raises ValueError when the policy predicts no step time for gamma, or one that is not finite and > 0.
    """
    if not 1 <= gamma <= policy.max_k:
        raise ValueError(f"gamma: must be in 1..{policy.max_k}, got {gamma}")
    fixed_s = np.asarray(policy.fixed_s[gamma, 1:], np.float64)
    fixed_s = fixed_s + policy.context_s_per_token * kv_per_request * np.arange(1, len(fixed_s) + 1)
    verify_s = np.asarray(policy.verify_s[1:], np.float64)
    if not len(fixed_s) or not len(verify_s):
        raise ValueError("the policy predicts no time for any batch")
    for name, values in (("fixed_s", fixed_s), ("verify_s", verify_s)):
        if not np.isfinite(values).all() or values.min() < 0.0:
            raise ValueError(f"{name}: must be finite and at least 0")
    if fixed_s.min() + verify_s.min() <= 0.0:
        raise ValueError("the predicted step time is 0")
    # SGLang requires a bias above 0; moving time from one part to another does not change the sum.
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


def temperatures(survival: SurvivalMap, recorded: Floats) -> Floats:
    """STS temperatures [gamma] that bring SGLang's confidences closest to the calibrated ones.

    survival: conditional map, made of confidences under the `recorded` temperatures [gamma]. Least squares on the logits between
    0.02 and 0.98, through the origin: y = x * recorded / new. Raises ValueError: not conditional, too short, or out of range.
    """
    if not survival.conditional:
        raise ValueError("the calibration maps cumulative scores; temperatures need one that maps single confidences")
    gamma = len(recorded)
    if len(survival.table) < gamma:
        raise ValueError(f"the calibration has {len(survival.table)} positions, {gamma} are drafted")
    x = np.linspace(-LOGIT_LIMIT, LOGIT_LIMIT, GRID_POINTS)
    table = survival.table[:gamma].astype(np.float64)
    y = np.log(table / (1.0 - table))
    inside = np.abs(x) <= 4.0
    slope = (y[:, inside] @ x[inside]) / float(x[inside] @ x[inside])
    if not np.isfinite(slope).all() or slope.min() <= 0.0:
        raise ValueError("the calibration decreases with the confidence; no temperature can express that")
    found: Floats = np.asarray(recorded / slope)
    low, high = TEMPERATURE_RANGE
    if found.min() < low or found.max() > high:
        raise ValueError(f"temperatures: must be in {low:g}..{high:g}, got {found.min():g}..{found.max():g}")
    return found


def nothing_to_swap(planner: Any) -> str | None:
    """Why SGLang's planner (a DSparkVerifyPlanner) does not plan verify lengths by an SPS table; None if it does."""
    if not planner.schedules_verify_budget:
        return f"SGLANG_RAGGED_VERIFY_MODE={planner.mode_value} verifies every drafted token (compact plans verify lengths)"
    if not planner.is_compact_mode:
        return f"SGLANG_RAGGED_VERIFY_MODE={planner.mode_value} runs every drafted token whatever is planned (compact does not)"
    if planner.is_verify_all:
        return "there is no SPS table (pass --speculative-dspark-sps-table-path, so that SGLang plans verify lengths)"
    return None


def launch_temperatures(planner: Any) -> Floats:
    """STS temperatures in force: [gamma], or one for all []; 1 without a head. Waits for a GPU: at the start only."""
    head = planner._confidence_head
    held = head.sts_temperatures if head is not None else None
    return np.ones(()) if held is None else np.asarray(held.detach().cpu().numpy(), np.float64)


class GraphSizes(NamedTuple):
    """Token counts of the captured verify graphs, ascending; () without graphs. filled: SGLang verifies as many draft tokens as a
    graph has room for (`--speculative-dspark-align-verify-tokens-to-graph-tier`); else it pads.
    """

    tokens: tuple[int, ...] = ()
    filled: bool = False

    def rounded(self, tokens: int, rows: int, gamma: int) -> int:
        """Tokens that SGLang verifies where `tokens` are planned for `rows` requests, and a graph is large enough."""
        at = bisect_left(self.tokens, tokens)
        return max(min(self.tokens[at], rows * (gamma + 1)), tokens) if self.filled and at < len(self.tokens) else tokens


def graph_sizes(planner: Any) -> GraphSizes:
    """The sizes of a planner's server, once its graphs are captured."""
    runner = planner.model_runner.decode_cuda_graph_runner
    captured: Sequence[int] = runner.capture_num_tokens if runner is not None and runner.ragged_verify_mode else ()
    return GraphSizes(tuple(int(size) for size in captured), bool(planner._align_verify_tokens_to_graph_tier))


def budget_within(budget: int, rows: int, gamma: int, least: int, most: int, sizes: GraphSizes) -> int:
    """A budget (draft tokens that a step verifies) within the rails, least..most draft tokens per request, 0..gamma.

    Where SGLang would round up to more than `most`, the largest budget that it does not: where there is none, 0. `most` wins over
    `least`. Beyond the largest graph SGLang verifies all that is drafted, or, where it fills graphs, raises.
    """
    high = rows * most
    if sizes.tokens and (most < gamma or sizes.filled):
        limit = min(rows + high, sizes.tokens[-1])
        if sizes.filled and most < gamma:
            limit = sizes.tokens[bisect_right(sizes.tokens, limit) - 1] if limit >= sizes.tokens[0] else rows
        high = max(limit - rows, 0)
    return min(max(budget, rows * least), high)


class _Prepared(NamedTuple):
    """A policy in SGLang's form. temperatures: [gamma], None to keep the present ones."""

    table: Any
    temperatures: Floats | None


class DSparkSwap:
    """Keeps one running planner at the newest policy, and at its launch values while there is none.

    `at_plan` before the planner plans a step, `at_forward` on the stream of its forward: temperatures are read there by graphs.
    While a policy with rails acts, or any policy where SGLang fills graphs, the planner's budgets pass through this object: a
    method of the one planner is replaced, never raises for a reason of ours, and is put back with the launch values.
    planner: SGLang's DSparkVerifyPlanner, of which `nothing_to_swap` says None. gamma: draft tokens per request. launched: its
    `launch_temperatures`. swaps, refused: how often each happened. reason: of the last refusal, "" before one. sizes: of its
    captured graphs.
    """

    def __init__(self, planner: Any, gamma: int, launched: Floats) -> None:
        self._planner, self._gamma, self._launched = planner, gamma, launched
        self._budget = planner._budget_planner
        self._launch_table = self._budget.sps_table
        # One temperature for all (no file at start) is a constant of captured graphs: only a list can be written into.
        listed = launched.shape == (gamma,)
        self._held = planner._confidence_head.sts_temperatures if listed else None
        self._temperatures = launched
        self._wanted: Floats | None = None
        self._version = 0
        self._forced: float | None = None
        """The share of the budget that was forced here last; another one is of SGLang's own profiling."""
        self.sizes = graph_sizes(planner)
        self._bounded = bool(self.sizes.tokens) and self.sizes.filled
        """Whether a plan may be too large for SGLang, whatever the rails."""
        self._rails = (0, gamma)
        self._plan: Any = None
        """The planner's own method while it is replaced."""
        self._decision: Any = None
        self._unclipped = False
        self.swaps = self.refused = 0
        self.reason = ""

    def at_plan(self, policy: Policy | None, kv_per_request: float) -> None:
        """Follow the policy of this step, None for none. Never raises; touches the host only.

        Policy not acting: back to the launch values. Paused, pinned or without a forecast: no change. With several ranks all
        call it in the same step with the same policy, which all of them have checked before.
        """
        if policy is None or not policy.acting:
            self.restore()
            return
        self._follow_rails(policy)
        if policy.version == self._version or policy.verify_all or policy.mode is Mode.PAUSED:
            return
        self._version = policy.version
        try:
            prepared, reason = self._prepare(policy, kv_per_request), ""
        except Exception as error:
            prepared, reason = None, one_line(error)
        if prepared is None:
            self._refuse(policy.version, reason)
            return
        self._budget.sps_table = prepared.table
        if prepared.temperatures is not None:
            self._wanted = prepared.temperatures
        self.swaps += 1

    def at_forward(self) -> None:
        """Write changed temperatures on the current stream, without waiting for it."""
        wanted, self._wanted = self._wanted, None
        if wanted is None or self._held is None or np.array_equal(wanted, self._temperatures):
            return
        for position, value in enumerate(wanted.tolist()):
            self._held[position].fill_(value)  # in place: graphs keep the address; a scalar needs no copy from the host
        self._temperatures = wanted

    def force(self, draft_tokens: int | None, rows: int) -> None:
        """Verify exactly `draft_tokens` draft tokens of `rows` requests in the next step; None: the table decides."""
        profiled = self._profiled
        if draft_tokens is None or profiled:
            if self._forced is not None and not profiled:
                self._planner.set_forced_budget_frac(None)
            self._forced = None
            return
        # SGLang takes the whole part of fraction * rows * gamma.
        self._forced = (draft_tokens + 0.5) / (rows * self._gamma)
        self._planner.set_forced_budget_frac(self._forced)

    @property
    def _profiled(self) -> bool:
        """Whether SGLang's own profiling forces the budget."""
        return self._budget.forced_budget_frac not in (None, self._forced)

    def within(self, draft_tokens: int, rows: int) -> int:
        """The nearest number of draft tokens of a step that the rails leave."""
        return budget_within(draft_tokens, rows, self._gamma, *self._rails, self.sizes)

    def tokens(self, draft_tokens: int, rows: int) -> int:
        """Tokens that a step verifies, bonus tokens included, where so many draft tokens are planned."""
        return self.sizes.rounded(rows + draft_tokens, rows, self._gamma)

    def restore(self) -> None:
        """Back to the launch values; temperatures with the next `at_forward`."""
        self._rails = (0, self._gamma)
        if self._plan is not None and vars(self._planner).get(_PLAN) == self._planned:
            delattr(self._planner, _PLAN)
            self._plan = None
        if self._version:
            self._budget.sps_table = self._launch_table
            self._wanted = self._launched
            self._version = 0

    def check(self, policy: Policy) -> None:
        """Raise if this rank could not follow a policy. Changes nothing."""
        if policy.acting and not policy.verify_all:
            self._prepare(policy, 1.0)

    def _follow_rails(self, policy: Policy) -> None:
        """Take the rails of the policy. Never raises."""
        self._rails = policy.verified_rails(self._gamma)
        replaced = self._plan is not None and _PLAN in vars(self._planner)  # else someone has taken ours away
        if replaced or (self._rails == (0, self._gamma) and not self._bounded):
            return
        try:
            from sglang.srt.speculative.dspark_components.dspark_planner import VerifyBudgetDecision

            self._decision, self._plan = VerifyBudgetDecision, getattr(self._planner, _PLAN)
            setattr(self._planner, _PLAN, self._planned)
        except Exception as error:
            self._refuse(policy.version, f"the rails: {one_line(error)}")

    def _planned(self, *args: Any, **kwargs: Any) -> int | None:
        """In place of the planner's own method: its budget, None for every drafted token, within the rails."""
        budget: int | None = self._plan(*args, **kwargs)
        try:
            return self._clipped(budget, len(kwargs["req_pool_indices_cpu"]))
        except Exception as error:
            if not self._unclipped:
                self._unclipped = True
                log.warning("adaptive-spec: a budget could not be kept within the rails: %s", one_line(error))
            return budget

    def _clipped(self, budget: int | None, rows: int) -> int | None:
        if self._profiled:
            return budget  # set by SGLang's own profiling
        if budget is None and self._rails[1] >= self._gamma:
            return None
        planned = rows * self._gamma if budget is None else budget
        within = self.within(planned, rows)
        if within == planned:
            return budget
        self._budget.last_decision = self._decision(budget=within)
        return within

    def _refuse(self, version: int, reason: str) -> None:
        self.refused += 1
        if reason != self.reason:
            log.warning("adaptive-spec: policy %d was not adopted, the SPS table is unchanged: %s", version, reason)
        self.reason = reason

    def _prepare(self, policy: Policy, kv_per_request: float) -> _Prepared:
        """Convert a policy. Raises ValueError, or what SGLang's own checks raise, for values that are not allowed."""
        from sglang.srt.speculative.dspark_components.dspark_sps import SpsAdditiveCostTable
        from sglang.srt.speculative.dspark_components.dspark_sts import DSparkStsCalibration

        table = SpsAdditiveCostTable(**cost_table(policy, self._gamma, kv_per_request)._asdict())
        if self._held is None or not policy.survival.conditional:
            return _Prepared(table, None)
        fitted = temperatures(policy.survival, self._launched)
        if not np.isfinite(fitted).all():
            raise ValueError("a temperature is not finite")
        return _Prepared(table, np.array(DSparkStsCalibration(temperatures=fitted.tolist()).temperatures))
