"""Forecast: expected goodput of every plan, from the models as they stand.

    goodput[b, c, K] = E[tokens out] / (fixed_s[K, b] + verify_s[tokens] + context_s_per_token * kv)

Batch granularity: tokens = padded(b) (K + 1), E[tokens out] = b (1 + sum of survival over K positions). Request granularity:
the engine will choose the verified tokens by score, so the expectation is taken over groups of b recent requests, each
planned by the same search the engine runs. Each entry comes with its relative standard error, by which the controller chooses
probes and refuses swaps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from adaptive_spec.domain.allowed import LARGEST_K
from adaptive_spec.domain.arrays import Bools, Floats
from adaptive_spec.domain.policy import Granularity
from adaptive_spec.domain.survival import SurvivalMap
from adaptive_spec.models.acceptance.online import AcceptanceModel
from adaptive_spec.models.latency.padding import Padding
from adaptive_spec.models.latency.staircase import LatencyModel

CONTEXT_EDGES = np.array([1024.0, 4096.0, 16384.0], dtype=np.float32)
CONTEXT_CENTRES = (512.0, 2048.0, 8192.0, 32768.0)
MATERIAL_CONTEXT = 0.02
"""Context buckets are used when context makes up more than this share of a step."""
MIN_TALLY = 0.01
"""Forgotten tally below which a batch size is not a recent one: with the tallies' memory of 500 steps, after 2300 steps."""
GROUP_ROWS = 256
"""Recent requests an expectation is taken over, in groups of the batch size: at least two, or one of so many or more requests."""
FREQUENT = 24
"""Batch sizes forecast exactly at request granularity, besides the powers of two, at most."""
MOST_ROWS = 32 * GROUP_ROWS
"""Requests that all exactly forecast batch sizes may sort together: as many as 32 small batch sizes need. It bounds the time of a
forecast, whatever batch sizes were seen.
"""


class StageCost(Protocol):
    """A part of a step that depends on the plan alone."""

    def predict(self, max_k: int, max_batch: int) -> tuple[Floats, Floats]:
        """Return seconds [max_k + 1, max_batch + 1] and their standard errors in seconds."""
        ...


@dataclass(frozen=True)
class Forecast:
    """goodput, uncertainty: [max_batch + 1, contexts, max_k + 1], tokens/s and relative standard errors (row 0 unused).

    tokens_per_request: [max_batch + 1, contexts, max_k + 1], expected output of a step per request. fixed_s:
    [max_k + 1, max_batch + 1]. verify_s, verify_error_s: by num_tokens. context_edges: [contexts - 1]. expected_tokens:
    request granularity only, by batch size: tokens out by verified draft tokens 0..b max_k, the best slots first. switch_s:
    seconds that a change of K costs, 0 while unknown. Goodput of a K that is not allowed at a batch size is 0. stage_s: the parts
    of fixed_s by stage. verify_tokens: [max_batch + 1, max_k + 1], tokens to look up in verify_s for a plan (the padding is done;
    at request granularity the median of what would be verified). kv_per_request: KV tokens of a request in each context bucket.
    """

    goodput: Floats
    uncertainty: Floats
    tokens_per_request: Floats
    fixed_s: Floats
    verify_s: Floats
    verify_error_s: Floats
    context_s_per_token: float
    context_edges: NDArray[np.float32]
    survival: SurvivalMap
    expected_tokens: Mapping[int, Floats]
    switch_s: float
    stage_s: Mapping[str, Floats]
    verify_tokens: NDArray[np.int64]
    kv_per_request: tuple[float, ...]
    slowest_share: Floats | None = None
    """[max_k + 1], expected output of the slowest request over that of the mean one; None without a target for it."""
    unrest: float = 0.0
    """Slowness of all plans that came and went lately, see `SpeedFactor.unrest`."""

    def seconds_per_token(self) -> Floats:
        """Expected seconds per output token of the slowest request (without a target: of the mean one), as goodput is; inf: not
        allowed.
        """
        batch = np.arange(len(self.goodput))[:, None, None]
        share = 1.0 if self.slowest_share is None else self.slowest_share
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(np.where(self.goodput > 0.0, batch / (self.goodput * share), np.inf))

    def context_of(self, batch_size: int, kv_tokens: int) -> int:
        return int(np.searchsorted(self.context_edges, kv_tokens / max(batch_size, 1), side="right"))

    def row(self, batch_size: int) -> int:
        return min(batch_size, len(self.goodput) - 1)


@dataclass(frozen=True)
class ForecastInputs:
    """The models and the traffic a forecast is made of."""

    verify: LatencyModel
    stages: Mapping[str, StageCost]
    acceptance: AcceptanceModel
    padding: Padding
    granularity: Granularity
    candidates: tuple[int, ...]
    allowed: Bools
    """[max_batch + 1, max_k + 1], whether the engine runs K at a batch size."""
    max_batch: int
    kv_per_request: float
    batches: NDArray[np.float64]
    """Forgetting tally of batch sizes, [max_batch + 1]."""
    switch_s: float
    """Seconds that a change of K costs, 0 while unknown."""
    slowest_share: Floats | None = None
    """See `Forecast`."""
    verified: tuple[int, int] = (0, LARGEST_K)
    """Least and most draft tokens per request of a step that the engine may verify, see `verified_rails`."""


def forecast(models: ForecastInputs, seed: int) -> Forecast | None:
    """Return the forecast, None before anything was measured. seed: of the grouping of recent requests."""
    fit = models.verify.fit
    if fit is None:
        return None
    max_k, max_batch = models.candidates[-1], models.max_batch
    request = models.granularity is Granularity.REQUEST and max_k > 0  # without drafts there are no slots to choose among
    pad = models.padding.table(max_batch * (max_k + 1) if request else max_batch)
    # Not the last one: a size may be padded to more than a larger size is.
    largest = int(pad.max()) if request else int(pad.max()) * (max_k + 1)
    by_padded, error_by_padded = fit.predict(np.maximum(np.arange(largest + 1), 1))
    verify_s, verify_error_s = (by_padded[pad], error_by_padded[pad]) if request else (by_padded, error_by_padded)
    fixed_s = np.zeros((max_k + 1, max_batch + 1))
    fixed_error = np.zeros_like(fixed_s)
    stage_s: dict[str, Floats] = {}
    for name, stage in models.stages.items():
        seconds, error_s = stage.predict(max_k, max_batch)
        stage_s[name] = seconds
        fixed_s += seconds
        fixed_error += error_s**2
    slope = fit.context_s_per_token
    typical = float(np.median(verify_s[1:])) if len(verify_s) > 1 else 0.0
    by_context = slope * models.kv_per_request > MATERIAL_CONTEXT * typical > 0.0
    edges = CONTEXT_EDGES if by_context else CONTEXT_EDGES[:0]
    centres = list(CONTEXT_CENTRES) if by_context else [models.kv_per_request]
    if by_context:
        centres[int(np.searchsorted(edges, models.kv_per_request, side="right"))] = models.kv_per_request
    context_s = slope * np.arange(max_batch + 1.0)[:, None] * np.array(centres)
    costs = Costs(fixed_s.T, np.sqrt(fixed_error).T, verify_s, verify_error_s, context_s)
    plans, expected_tokens = _per_request(models, seed, costs) if request else _per_batch(models, costs, pad)
    goodput, uncertainty, tokens, verify_tokens = plans
    goodput *= models.allowed[:, None, :]
    return Forecast(
        goodput, uncertainty, tokens, fixed_s, verify_s, verify_error_s, slope, edges, models.acceptance.survival,
        expected_tokens, models.switch_s, stage_s, verify_tokens, tuple(centres),
        models.slowest_share, models.verify.speed_factor.unrest,
    )  # fmt: skip


class Costs(NamedTuple):
    """fixed_s, fixed_error_s: [max_batch + 1, max_k + 1]. verify_s, verify_error_s: by tokens.

    context_s: [max_batch + 1, contexts].
    """

    fixed_s: Floats
    fixed_error_s: Floats
    verify_s: Floats
    verify_error_s: Floats
    context_s: Floats


class Plans(NamedTuple):
    """See `Forecast`. Rows are batch sizes: all up to the largest, or some of them."""

    goodput: Floats
    uncertainty: Floats
    tokens_per_request: Floats
    verify_tokens: NDArray[np.int64]


def _per_batch(models: ForecastInputs, costs: Costs, pad: NDArray[np.int64]) -> tuple[Plans, dict[int, Floats]]:
    rows, survival_error = _survival(models.acceptance)
    max_k = costs.fixed_s.shape[1] - 1
    expected = np.concatenate(([1.0], 1.0 + np.cumsum(rows.mean(axis=0)[:max_k])))
    expected_error = np.concatenate(([0.0], np.cumsum(survival_error[:max_k]))) / expected
    at = pad[:, None] * np.arange(1, len(expected) + 1)
    seconds = (costs.fixed_s + costs.verify_s[at])[:, None] + costs.context_s[:, :, None]
    goodput = np.arange(len(pad))[:, None, None] * expected / seconds
    cost_error = np.hypot(costs.fixed_error_s, costs.verify_error_s[at])[:, None] / seconds
    tokens = np.broadcast_to(expected, goodput.shape)
    return Plans(goodput, np.hypot(cost_error, expected_error), tokens, at), {}


def _survival(acceptance: AcceptanceModel) -> tuple[Floats, Floats]:
    """Survival of recent requests' drafts [rows >= 1, max_k], and the standard error of its mean [max_k]."""
    rates, errors = acceptance.conditional_rates()
    # Scores of recent drafts show a change of traffic sooner than counts of accepted tokens.
    rows = acceptance.recent_survival()
    # The error is that of the counts (delta method on a product of independent rates): scores may be confident at positions that
    # were not drafted for long.
    survival: Floats = np.cumprod(rates, dtype=np.float64)
    error: Floats = survival * np.sqrt(np.cumsum((errors / np.maximum(rates, 0.05)) ** 2, dtype=np.float64))
    return rows if len(rows) else survival[None, :], error


def _per_request(models: ForecastInputs, seed: int, costs: Costs) -> tuple[Plans, dict[int, Floats]]:
    """Return the plans, and `Forecast.expected_tokens`. All batch sizes of the grid are searched at once, in flat arrays."""
    rows, survival_error = _survival(models.acceptance)
    max_k, contexts = rows.shape[1], costs.context_s.shape[1]
    best_first = np.argsort(-rows, axis=None)
    rank = np.empty(rows.size, dtype=np.int32)
    rank[best_first] = np.arange(rows.size)
    shuffled = rank.reshape(rows.shape)[np.random.default_rng(seed).permutation(len(rows))]
    grid = np.array(batch_grid(models.batches))
    groups = _groups(grid)
    # Ranks of the slots of each group, the best ones first. Rank -1, position -1: what its requests get without a draft token.
    ranks = []
    for b, n in zip(grid.tolist(), groups.tolist(), strict=True):
        slots = np.full((n, 1 + b * max_k), -1, dtype=np.int32)
        slots[:, 1:] = shuffled.take(np.arange(n * b), axis=0, mode="wrap").reshape(n, -1)
        slots.sort(axis=1)
        ranks.append(slots.ravel())
    slot = np.concatenate(ranks)
    begin, batch = np.cumsum(groups) - groups, np.repeat(grid, groups)
    position = np.append(best_first % max_k, -1).astype(np.int8)[slot]
    drafts = np.append(rows.ravel()[best_first], 0.0)[slot]
    lengths = 1 + batch * max_k
    drafts[np.cumsum(lengths) - lengths] = batch
    index = np.arange(len(drafts))
    shape = (len(grid), contexts, max_k + 1)
    found = Plans(np.zeros(shape), np.ones(shape), np.ones(shape), np.zeros((len(grid), max_k + 1), dtype=np.int64))
    least, most = models.verified
    for k in models.candidates:
        lengths = 1 + batch * k
        first = np.cumsum(lengths) - lengths
        expected = np.cumsum(drafts.compress(position < k) if k < max_k else drafts)
        expected -= np.repeat(expected[first] - batch, lengths)
        tokens = index[: len(expected)] - np.repeat(first - batch, lengths)
        verify_s = costs.verify_s[tokens]
        outside = _outside(tokens, np.repeat(batch, lengths), models.verified) if least > 0 or most < k else None
        for c in range(contexts):
            other_s = costs.fixed_s[grid, k] + costs.context_s[grid, c]
            value = np.repeat(np.repeat(other_s, groups), lengths)
            value += verify_s
            np.divide(expected, value, out=value)
            if outside is not None:
                value[outside] = 0.0
            best = np.maximum.reduceat(value, first)
            equal = np.flatnonzero(value == np.repeat(best, lengths))
            chosen = equal[np.searchsorted(equal, first)]
            per_request = np.add.reduceat(expected[chosen], begin) / (groups * grid)
            by_group = tokens[chosen]
            middle = by_group[np.lexsort((by_group, batch))][begin + groups // 2]
            cost_error = np.hypot(costs.fixed_error_s[grid, k], costs.verify_error_s[middle]) / (other_s + costs.verify_s[middle])
            found.goodput[:, c, k] = np.add.reduceat(best, begin) / groups
            found.uncertainty[:, c, k] = np.hypot(cost_error, survival_error[:k].sum() / per_request)
            found.tokens_per_request[:, c, k] = per_request
            found.verify_tokens[:, k] = middle
    # `expected` is of the largest K now.
    by_size = zip(grid.tolist(), groups.tolist(), np.split(expected, first[begin][1:]), strict=True)
    return _fill_between(grid, found, len(models.batches)), {b: out.reshape(n, -1).mean(axis=0) for b, n, out in by_size}


def _outside(tokens: NDArray[np.int64], batch: NDArray[np.int64], verified: tuple[int, int]) -> Bools:
    """Which token counts of batches verify fewer or more draft tokens than the rails leave."""
    return (tokens < batch * (verified[0] + 1)) | (tokens > batch * (verified[1] + 1))


def _fill_between(grid: NDArray[np.int64], plans: Plans, rows: int) -> Plans:
    """Plans of batch sizes 0..rows-1 from those of the grid. Between: step seconds, tokens per request and error interpolated;
    beyond it a step takes as long per request as at its end.
    """
    sizes = np.arange(rows)
    high = np.minimum(np.searchsorted(grid, sizes), len(grid) - 1)
    low = np.maximum(high - 1, 0)
    share = np.clip((sizes - grid[low]) / np.maximum(grid[high] - grid[low], 1), 0.0, 1.0)

    def between(known: Floats) -> Floats:
        found: Floats = (known[high] - known[low]) * share.reshape(-1, *(1,) * (known.ndim - 1))
        found += known[low]
        return found

    # A K that is no candidate has goodput 0: any finite time will do, its goodput stays 0.
    allowed = plans.goodput > 0.0
    step_s = np.where(allowed, grid[:, None, None] * plans.tokens_per_request / np.where(allowed, plans.goodput, 1.0), 0.0)
    between_s = between(step_s) * np.maximum(sizes / grid[-1], 1.0)[:, None, None]
    tokens = between(plans.tokens_per_request)
    goodput = np.zeros_like(between_s)
    np.divide(sizes[:, None, None] * tokens, between_s, out=goodput, where=between_s > 0.0)
    per_request = between(plans.verify_tokens / grid[:, None])
    return Plans(goodput, between(plans.uncertainty), tokens, np.rint(per_request * sizes[:, None]).astype(np.int64))


def batch_grid(batches: NDArray[np.float64]) -> list[int]:
    """Batch sizes to forecast exactly: the most frequent ones, and 1, 2, 4, 8, ... to beyond the largest.

    batches: tally of batch sizes [max_batch + 1].
    """
    largest = len(batches) - 1
    seen = int(np.flatnonzero(batches > MIN_TALLY).max(initial=0))
    coarse = {2**e for e in range(13)}
    frequent = np.argsort(-batches, kind="stable")[:FREQUENT]
    grid = {1} | {b for b in coarse if b <= min(largest, 2 * max(seen, 4))}
    rows = sum(int(_groups(b)) * b for b in grid)
    for b in frequent.tolist():
        if batches[b] > MIN_TALLY and b not in grid and b > 0 and (rows := rows + int(_groups(b)) * b) <= MOST_ROWS:
            grid.add(b)
    return sorted(grid)


def _groups(batch_size: int | NDArray[np.int64]) -> NDArray[np.int64]:
    """Groups of a batch size that an expectation is taken over."""
    return np.maximum(GROUP_ROWS // batch_size, np.where(np.less(batch_size, GROUP_ROWS), 2, 1))
