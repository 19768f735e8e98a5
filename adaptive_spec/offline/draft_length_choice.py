"""Which draft lengths an engine should capture. Each candidate K costs CUDA graphs and memory, and few of them are ever the best.

    value(S) = mean over traffic and batch sizes of  max over K in S of goodput  /  max over all K of goodput

Traffic is a range of acceptance rates: the calibrated rates, and the same with their log-odds moved down and up, so that a K that
is best only for easy or only for hard text counts too. Regimes: with as many states as K that are ever the best, nothing
is lost; with fewer, the best set is searched among all sets, or, where these are too many, built K by K and improved by exchange.
A batch size keeps only those K of the set that are within `TOLERANCE` of its best for some traffic.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from adaptive_spec.domain.arrays import Floats

SHIFTS = (-1.5, -0.75, 0.0, 0.75, 1.5)
"""Traffic: log-odds added to every conditional acceptance."""
TOLERANCE = 0.01
"""Relative goodput that a batch size may lose to have fewer K."""
ALL_SUBSETS = 50_000
"""Most sets that are searched one by one."""


class BatchRange(NamedTuple):
    """Batch sizes first..last and the K worth capturing for them, ascending."""

    first: int
    last: int
    ks: tuple[int, ...]


class Choice(NamedTuple):
    """ks: states to capture, ascending. loss: mean share of goodput lost against having every K. ranges: by batch size.
    dropping: K -> (mean, worst) share of goodput lost when it alone is not captured.
    """

    ks: tuple[int, ...]
    loss: float
    ranges: tuple[BatchRange, ...]
    dropping: dict[int, tuple[float, float]]


def goodput_by_traffic(conditional: Floats, seconds: Floats, shifts: Sequence[float] = SHIFTS) -> Floats:
    """Goodput [traffic, batch sizes, max_k + 1] in tokens/s.

    conditional: P(accept j | all before accepted) [max_k], in (0, 1). seconds: of a step, [batch sizes, max_k + 1], row i for a
    batch of i + 1.
    """
    rates = np.clip(conditional, 1e-6, 1.0 - 1e-6)
    odds = np.log(rates / (1.0 - rates))
    moved = 1.0 / (1.0 + np.exp(-(odds[None, :] + np.asarray(shifts)[:, None])))
    tokens = 1.0 + np.concatenate((np.zeros((len(shifts), 1)), np.cumsum(np.cumprod(moved, axis=1), axis=1)), axis=1)
    requests = np.arange(1, len(seconds) + 1)
    return np.asarray(requests[None, :, None] * tokens[:, None, :] / seconds[None, :, :])


def choose(goodput: Floats, states: int) -> Choice:
    """Choose at most `states` draft lengths for goodput [traffic, batch sizes, max_k + 1]. ValueError unless states >= 1."""
    if states < 1:
        raise ValueError(f"states: must be at least 1, got {states}")
    relative = goodput / goodput.max(axis=2, keepdims=True)
    useful = [int(k) for k in np.unique(goodput.argmax(axis=2))]
    ks = _subset(relative, useful, min(states, len(useful)))
    best = _best(relative, ks)
    dropping = {}
    for k in ks:
        rest = _best(relative, [other for other in ks if other != k]) if len(ks) > 1 else np.zeros_like(best)
        lost = 1.0 - rest / best
        dropping[k] = (float(lost.mean()), float(lost.max()))
    return Choice(ks, float(1.0 - best.mean()), _ranges(relative, ks), dropping)


def config_document(choice: Choice) -> dict[str, Any]:
    """Return SGLang's `--speculative-adaptive-config`: candidates by the first batch size of each range."""
    return {str(part.first): {"candidate_steps": list(part.ks)} for part in choice.ranges}


def schedule_document(choice: Choice) -> list[list[int]]:
    """Return vLLM's `num_speculative_tokens_per_batch_size` with these K: the largest K of each range, and every K that then
    stands nowhere at one batch size of the widest range, because vLLM has only the K that stand in its schedule.
    """
    entries = [[part.first, part.last, max(part.ks)] for part in choice.ranges]
    for k in choice.ks:
        if all(entry[2] != k for entry in entries):
            widest = max(range(len(entries)), key=lambda i: entries[i][1] - entries[i][0])
            first, last, own = entries[widest]
            if last == first:
                continue  # fewer batch sizes than K
            entries[widest : widest + 1] = [[first, last - 1, own], [last, last, k]]
    return entries


def _best(relative: Floats, ks: Sequence[int]) -> Floats:
    return np.asarray(relative[:, :, list(ks)].max(axis=2))


def _subset(relative: Floats, useful: Sequence[int], states: int) -> tuple[int, ...]:
    if math.comb(len(useful), states) <= ALL_SUBSETS:
        found = max(itertools.combinations(useful, states), key=lambda ks: _best(relative, ks).mean())
        return tuple(sorted(found))
    chosen: list[int] = []
    for _ in range(states):
        chosen.append(max((k for k in useful if k not in chosen), key=lambda k: _best(relative, [*chosen, k]).mean()))
    better = True
    while better:
        better = False
        for out, k in itertools.product(list(chosen), useful):
            swapped = [k if c == out else c for c in chosen]
            if out in chosen and k not in chosen and _best(relative, swapped).mean() > _best(relative, chosen).mean() + 1e-12:
                chosen, better = swapped, True
    return tuple(sorted(chosen))


def _ranges(relative: Floats, ks: Sequence[int]) -> tuple[BatchRange, ...]:
    """Group neighbouring batch sizes that keep the same K."""
    among = relative[:, :, list(ks)]
    best = among.max(axis=2, keepdims=True)
    # One K is enough for each traffic and batch size: of those within the tolerance, the one most others are within too; of
    # equals the smallest.
    near = among >= best * (1.0 - TOLERANCE)
    popular = near.sum(axis=(0, 1))
    kept = np.zeros(among.shape[1:], dtype=bool)
    for traffic, size in itertools.product(range(among.shape[0]), range(among.shape[1])):
        options = np.flatnonzero(near[traffic, size])
        if not kept[size, options].any():
            kept[size, options[np.argmax(popular[options])]] = True
    found: list[BatchRange] = []
    for size, row in enumerate(kept, start=1):
        mine = tuple(k for k, keep in zip(ks, row, strict=True) if keep)
        if found and found[-1].ks == mine:
            found[-1] = found[-1]._replace(last=size)
        else:
            found.append(BatchRange(size, size, mine))
    return tuple(found)
