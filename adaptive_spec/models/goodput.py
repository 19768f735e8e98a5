"""Forecast: expected goodput of every plan, from the models as they stand.

    goodput[b, c, K] = E[tokens out] / (fixed_s[K, b] + verify_s[tokens] + context_s_per_token * kv)

Batch granularity: tokens = padded(b) (K + 1), E[tokens out] = b (1 + sum of survival over K positions). Request granularity:
the engine will choose the verified tokens by score, so the expectation is taken over groups of b recent requests, each
planned by the same search the engine runs. Each entry comes with its relative standard error, by which the controller chooses
probes and refuses swaps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

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
"""Recent requests an expectation is taken over, in groups of the batch size, at least `MIN_GROUPS` groups."""
MIN_GROUPS = 2
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
    shape = (max_batch + 1, len(centres), max_k + 1)
    goodput, uncertainty, tokens = np.zeros(shape), np.ones(shape), np.ones(shape)
    verify_tokens = np.zeros((max_batch + 1, max_k + 1), dtype=np.int64)
    expected_tokens: dict[int, Floats] = {}
    for c, centre in enumerate(centres):
        context_s = slope * centre * np.arange(max_batch + 1.0)
        costs, outputs = (
            (fixed_s, fixed_error, verify_s, verify_error_s, context_s, pad),
            (goodput[:, c], uncertainty[:, c], tokens[:, c], verify_tokens),
        )
        if request:
            expected_tokens = _per_request(models, seed, costs, outputs)
        else:
            _per_batch(models, costs, outputs)
    goodput *= models.allowed[:, None, :]
    return Forecast(
        goodput, uncertainty, tokens, fixed_s, verify_s, verify_error_s, slope, edges, models.acceptance.survival,
        expected_tokens, models.switch_s, stage_s, verify_tokens, tuple(centres),
        models.slowest_share, models.verify.speed_factor.unrest,
    )  # fmt: skip


Costs = tuple[Floats, Floats, Floats, Floats, Floats, NDArray[np.int64]]
Outputs = tuple[Floats, Floats, Floats, NDArray[np.int64]]


def _per_batch(models: ForecastInputs, costs: Costs, outputs: Outputs) -> None:
    fixed_s, fixed_error, verify_s, verify_error_s, context_s, pad = costs
    goodput, uncertainty, tokens, verify_tokens = outputs
    survival, survival_error = (part[: len(fixed_s) - 1] for part in _survival(models.acceptance))
    expected = np.concatenate(([1.0], 1.0 + np.cumsum(survival)))
    expected_error = np.concatenate(([0.0], np.cumsum(survival_error))) / expected
    b = np.arange(1, len(pad))
    k = np.arange(len(expected))
    at = pad[1:, None] * (k + 1)
    seconds = fixed_s.T[1:] + verify_s[at] + context_s[1:, None]
    verify_tokens[1:] = at
    tokens[1:] = expected
    goodput[1:] = b[:, None] * expected / seconds
    cost_error = np.sqrt(fixed_error.T[1:] + verify_error_s[at] ** 2) / seconds
    uncertainty[1:] = np.hypot(cost_error, expected_error)


def _survival(acceptance: AcceptanceModel) -> tuple[Floats, Floats]:
    """Survival of positions 1..max_k and its standard error (delta method on a product of independent rates)."""
    rates, errors = acceptance.conditional_rates()
    recent = acceptance.recent_survival()
    # Scores of recent drafts show a change of traffic sooner than counts of accepted tokens.
    survival: Floats = (recent if len(recent) else np.cumprod(rates)[None, :]).mean(axis=0)
    # The error is that of the counts: scores may be confident at positions that were not drafted for long.
    error = np.cumprod(rates) * np.sqrt(np.cumsum((errors / np.maximum(rates, 0.05)) ** 2))
    return survival, error.astype(np.float64)


def _per_request(models: ForecastInputs, seed: int, costs: Costs, outputs: Outputs) -> dict[int, Floats]:
    fixed_s, fixed_error, verify_s, verify_error_s, context_s, _ = costs
    goodput, uncertainty, tokens, verify_tokens = outputs
    rows = models.acceptance.recent_survival()
    survival, survival_error = _survival(models.acceptance)
    max_k = len(fixed_s) - 1
    if not len(rows):
        rows = survival[None, :]
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(rows))
    grid = batch_grid(models.batches)
    by_slots: dict[int, Floats] = {}
    for b in grid:
        groups = _groups(b)
        picked = rows[order[np.arange(groups * b) % len(rows)]].reshape(groups, b * max_k)
        best_first = np.argsort(-picked, axis=1)
        drafts, position = np.take_along_axis(picked, best_first, axis=1), best_first % max_k
        for k in models.candidates:
            # Every group has b slots of each position, so the kept ones form rows of equal length, still in order.
            kept = drafts[position < k].reshape(groups, b * k)
            expected = np.empty((groups, b * k + 1))
            expected[:, 0] = b
            np.cumsum(kept, axis=1, out=expected[:, 1:])
            expected[:, 1:] += b
            if k == max_k:
                by_slots[b] = expected.mean(axis=0)
            seconds = fixed_s[k, b] + context_s[b] + verify_s[b : b * (k + 1) + 1]
            value = expected / seconds
            best = value.argmax(axis=1)
            chosen = np.arange(groups), best
            goodput[b, k] = value[chosen].sum() / groups
            tokens[b, k] = expected[chosen].sum() / (groups * b)
            middle = int(np.sort(best)[groups // 2])
            verify_tokens[b, k] = b + middle
            cost_error = math.hypot(math.sqrt(fixed_error[k, b]), verify_error_s[b + middle]) / seconds[middle]
            uncertainty[b, k] = math.hypot(cost_error, float(survival_error[:k].sum()) / float(tokens[b, k]))
    _fill_between(np.array(grid), outputs)
    return by_slots


def _fill_between(grid: NDArray[np.int64], outputs: Outputs) -> None:
    """Batch sizes between those of the grid: step seconds, tokens per request and error interpolated; beyond it a step takes as
    long per request as at its end.
    """
    goodput, uncertainty, tokens, verify_tokens = outputs
    sizes = np.arange(len(goodput))
    right = np.minimum(np.searchsorted(grid, sizes), len(grid) - 1)
    high, low = grid[right], grid[np.maximum(right - 1, 0)]
    inside = (sizes > low) & (sizes < high)
    share = np.where(inside, (sizes - low) / np.maximum(high - low, 1), (sizes >= high).astype(np.float64))[:, None]
    # A K that is no candidate has goodput 0: any finite time will do, its goodput stays 0.
    step_s = np.where(goodput > 0.0, sizes[:, None] * tokens / np.maximum(goodput, 1e-12), 0.0)
    per_request = verify_tokens / np.maximum(sizes, 1)[:, None]
    tokens[:], uncertainty[:] = (a[low] + share * (a[high] - a[low]) for a in (tokens, uncertainty))
    per_request = per_request[low] + share * (per_request[high] - per_request[low])
    between_s = step_s[low] + share * (step_s[high] - step_s[low])
    between_s *= np.where(sizes > grid[-1], sizes / grid[-1], 1.0)[:, None]
    goodput[:] = np.where(between_s > 0.0, sizes[:, None] * tokens / np.maximum(between_s, 1e-12), 0.0)
    verify_tokens[:] = np.rint(per_request * sizes[:, None])


def batch_grid(batches: NDArray[np.float64]) -> list[int]:
    """Batch sizes to forecast exactly: the most frequent ones, and 1, 2, 4, 8, ... to beyond the largest.

    batches: tally of batch sizes [max_batch + 1].
    """
    largest = len(batches) - 1
    seen = int(np.flatnonzero(batches > MIN_TALLY).max(initial=0))
    coarse = {2**e for e in range(13)}
    frequent = np.argsort(-batches, kind="stable")[:FREQUENT]
    grid = {1} | {b for b in coarse if b <= min(largest, 2 * max(seen, 4))}
    rows = sum(_groups(b) * b for b in grid)
    for b in frequent.tolist():
        if batches[b] > MIN_TALLY and b not in grid and b > 0 and (rows := rows + _groups(b) * b) <= MOST_ROWS:
            grid.add(b)
    return sorted(grid)


def _groups(batch_size: int) -> int:
    return max(GROUP_ROWS // batch_size, MIN_GROUPS)
