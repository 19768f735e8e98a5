"""Scenarios drawn at random: servers, traffic and changes that nobody tuned a policy to.

Every key of the scenario file is drawn, each from a range wider than what one server shows. Curves are measured ones, bent and
stretched, or synthetic staircases with dips, steep tiles and ramps. The n-th scenario of a seed does not depend on how many
are drawn.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from adaptive_spec.engines.simulated.scenario import Scenario, scenario_from
from adaptive_spec.offline.samples import read_latency
from adaptive_spec.storage.archive import write_atomically

CURVES = Path(__file__).parent / "curves"
MAX_REQUESTS = 200
STEP_MS = (2.0, 200.0)
"""Time of a small step."""
STEPS, LEAST_S = (3000.0, 12_000.0), 20.0
"""Decode steps of a scenario, about, and the shortest one."""
GRAPHS = [1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 200, 256]
SGLANG_SETS = {1: [1, 3, 5, 7], 8: [0, 1, 3], 32: [0, 1], 64: [0]}
"""K by batch size of SGLang's default adaptive configuration."""

Rng = np.random.Generator
Data = dict[str, Any]


def random_scenarios(count: int, seed: int) -> list[Scenario]:
    """Draw `count` scenarios, half of each granularity. seed >= 0."""
    return [scenario_from(data, data["name"], Path()) for data in (random_file(seed, index) for index in range(count))]


def save_random(folder: Path, count: int, seed: int) -> None:
    """Write the same scenarios as files NAME.yaml; the folder is created if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        data = random_file(seed, index)
        text = yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=120)
        write_atomically(folder.absolute() / f"{data['name']}.yaml", text.encode())


def random_file(seed: int, index: int) -> Data:
    """The `index`-th scenario of a seed, as the data of its file."""
    rng = np.random.default_rng([seed, index])
    request = index % 2 == 1
    base_ms = _log_uniform(rng, *STEP_MS)
    max_k = int(rng.choice([1, 2, 3, 4, 5, 6, 7, 8, 10, 15, 32], p=_shares([1, 2, 4, 4, 4, 3, 6, 3, 2, 1, 0.5])))
    duration_s = round(max(base_ms * 1.5e-3 * _log_uniform(rng, *STEPS), LEAST_S), 1)
    classes = {f"class-{n}": _request_class(rng, max_k) for n in range(int(rng.integers(1, 5)))}
    timeline = _timeline(rng, list(classes), duration_s)
    largest = max(entry["running"][1] for entry in timeline)
    sets = _k_sets(rng, max_k, request)
    data: Data = {
        "name": f"random-{seed}-{index}",
        "granularity": "request" if request else "batch",
        "max_k": max_k,
        "duration_s": duration_s,
        "seed": int(rng.integers(2**31)),
        "latency": _latency(rng, base_ms, largest, max_k, request, list(classes.values())),
        "classes": classes,
        "timeline": timeline,
        "drift": _drift(rng, timeline, classes, duration_s, base_ms, largest * (max_k + 1)),
        "mean_output_tokens": round(_log_uniform(rng, 10.0, 2000.0), 1),
    }
    return data | ({} if sets is None else sets)


def _latency(rng: Rng, base_ms: float, largest: int, max_k: int, request: bool, classes: list[Data]) -> Data:
    per_request = float(np.mean([kind["context"] for kind in classes]))
    step = int(rng.choice([4, 8, 16, 32]))
    buckets = [1, 2, 4, *range(8, 65, 8), *range(64 + step, 32 * -(-largest * (max_k + 1) // 32) + 1, step)]
    # The context of a usual batch takes up to a third of a small step, in half of the scenarios next to nothing.
    context_share = 0.0 if rng.random() < 0.3 else _log_uniform(rng, 0.003, 0.33)
    return {
        "verify_curve": _curve(rng, base_ms, largest * (max_k + 1)),
        "graph_batch_sizes": None if request or rng.random() < 0.15 else [g for g in GRAPHS if g < largest] + [largest],
        "token_buckets": buckets if request and rng.random() < 0.5 else None,
        "draft_fixed_ms": _rounded(base_ms * (0.0 if rng.random() < 0.3 else _log_uniform(rng, 0.003, 0.2))),
        "draft_ms_per_step": _rounded(base_ms * _log_uniform(rng, 0.004, 0.3)),
        "context_ms_per_1k_tokens": _rounded(context_share * base_ms * 1000.0 / (per_request * max(largest / 2.0, 1.0))),
        "overhead_ms": _rounded(base_ms * _log_uniform(rng, 0.01, 0.4)),
        "k_switch_ms": 0.0 if rng.random() < 0.8 else _rounded(base_ms * _log_uniform(rng, 0.01, 0.3)),
        "noise": _noise(rng),
    }


def _noise(rng: Rng) -> Data:
    noise: Data = {"sigma": _rounded(_log_uniform(rng, 0.003, 0.2))}
    if rng.random() < 0.7:
        noise |= {"spike_rate": _rounded(_log_uniform(rng, 2e-4, 0.02)), "spike_factor": _rounded(rng.uniform(2.0, 20.0))}
    if rng.random() < 0.25:
        noise |= {"spell_gap_s": _rounded(_log_uniform(rng, 1.0, 30.0)), "spell_s": _rounded(_log_uniform(rng, 0.2, 3.0)),
                  "spell_factor": _rounded(rng.uniform(1.2, 3.0))}  # fmt: skip
    return noise


def _curve(rng: Rng, base_ms: float, largest: int) -> list[list[float]]:
    """[[tokens, ms], ...] up to `largest` tokens; about `base_ms` for one token."""
    tokens = np.unique(np.concatenate((np.arange(1, 65), np.arange(72, 1025, 8), np.arange(1088, largest + 64, 64))))
    tokens = tokens[: int(np.searchsorted(tokens, largest)) + 1]
    if len(tokens) < 2:
        tokens = np.array([1, 2])
    relative = _measured(rng, tokens) if rng.random() < 0.5 else _staircase(rng, tokens)
    return [[int(t), _rounded(base_ms * r)] for t, r in zip(tokens, relative, strict=True)]


def _measured(rng: Rng, tokens: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A measured curve, stretched along both axes."""
    curves = sorted(CURVES.glob("*.csv"))
    counts, ms = _read(str(curves[int(rng.integers(len(curves)))]))
    stretched = tokens / _log_uniform(rng, 0.25, 3.0)
    at = np.searchsorted(counts, stretched)
    slope = (ms[-1] - ms[-8]) / (counts[-1] - counts[-8])
    beyond = ms[-1] + max(slope, 0.0) * (stretched - counts[-1])
    relative = np.where(at < len(counts), ms[np.minimum(at, len(counts) - 1)], beyond) / ms[0]
    return np.asarray(np.maximum(relative, 0.2) ** rng.uniform(0.5, 1.6))


@cache
def _read(path: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    samples = read_latency(Path(path))
    return samples.num_tokens, samples.latency_s * 1e3


def _staircase(rng: Rng, tokens: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Tiles of one size: flat, with a few dips, a steep tile, a ramp before a plateau, or a cost of every token."""
    tile = int(rng.choice([8, 16, 32, 48, 64, 96, 128, 160, 256, int(rng.integers(5, 300))]))
    index = (tokens - 1) // tile
    jumps = rng.lognormal(0.0, 0.5, int(index[-1]) + 1) * _log_uniform(rng, 0.01, 0.6)
    level = 1.0 + np.concatenate(([0.0], np.cumsum(jumps[1:])))[index]
    slope = 0.0 if rng.random() < 0.5 else _log_uniform(rng, 1e-4, 0.02)
    level = level + slope * (tokens - 1) / (1.0 if rng.random() < 0.3 else max(tile / 16.0, 1.0))
    if rng.random() < 0.35:
        dipped = rng.random(int(index[-1]) + 1) < 0.25
        level = level * np.where(dipped, rng.uniform(0.8, 0.97, len(dipped)), 1.0)[index]
    if rng.random() < 0.2:
        steep = index == int(rng.integers(min(int(index[-1]) + 1, 4)))
        level = level * np.where(steep, 1.0 + rng.uniform(0.2, 1.0) * ((tokens - 1) % tile) / tile, 1.0)
    if rng.random() < 0.2:
        level = level + rng.uniform(0.5, 3.0) * np.minimum(tokens / _log_uniform(rng, 16.0, 300.0), 1.0)
    return np.asarray(level)


def _request_class(rng: Rng, max_k: int) -> Data:
    """From a useless draft to a perfect one."""
    logit = rng.normal(0.9, 1.4) - np.abs(rng.normal(0.0, 0.12)) * np.arange(max_k) + rng.normal(0.0, 0.08, max_k)
    accept = np.clip(1.0 / (1.0 + np.exp(-logit)), 0.01, 0.995)
    return {
        "accept": [round(float(a), 4) for a in accept],
        "concentration": _rounded(_log_uniform(rng, 0.7, 40.0)),
        "request_spread": _rounded(rng.uniform(0.0, 1.3)),
        "context": int(_log_uniform(rng, 50.0, 30_000.0)),
        "score_slope": _rounded(_log_uniform(rng, 0.5, 2.0)),
        "score_bias": _rounded(rng.normal(0.0, 0.7)),
    }


def _timeline(rng: Rng, classes: list[str], duration_s: float) -> list[Data]:
    starts = [0.0, *sorted(rng.uniform(0.1, 0.95, int(rng.integers(0, 5))) * duration_s)]
    entries: list[Data] = []
    for start_s in starts:
        highest = round(_log_uniform(rng, 1.0, MAX_REQUESTS))
        lowest = highest if rng.random() < 0.4 else max(round(highest / _log_uniform(rng, 1.2, 8.0)), 1)
        shares = rng.dirichlet(np.full(len(classes), 0.5)).round(3)
        shares[int(shares.argmax())] += 1.0 - shares.sum()
        mix = {name: round(float(share), 3) for name, share in zip(classes, shares, strict=True)}
        entries.append({"at_s": round(float(start_s), 2), "running": [lowest, highest], "mix": mix})
    return [entry for n, entry in enumerate(entries) if n == 0 or entry["at_s"] > entries[n - 1]["at_s"]]


def _drift(rng: Rng, timeline: list[Data], classes: Data, duration_s: float, base_ms: float, largest: int) -> list[Data]:
    """Up to four changes; some come several at once, or together with a change of the load."""
    events: list[Data] = []
    at_s = 0.0
    for _ in range(int(rng.integers(0, 5))):
        if not events or rng.random() < 0.7:
            later = [entry["at_s"] for entry in timeline[1:]]
            at_s = float(rng.choice(later)) if later and rng.random() < 0.3 else round(rng.uniform(0.15, 0.95) * duration_s, 2)
        kind = rng.choice(["scale", "curve", "accept", "scores"], p=[0.35, 0.2, 0.25, 0.2])
        name = str(rng.choice(list(classes)))
        if kind == "scale":
            events.append({"at_s": at_s, "latency_scale": _rounded(_log_uniform(rng, 0.6, 2.2))})
        elif kind == "curve":
            events.append({"at_s": at_s, "verify_curve": _curve(rng, base_ms * _log_uniform(rng, 0.7, 1.6), largest)})
        elif kind == "accept":
            accept = _request_class(rng, len(classes[name]["accept"]))["accept"]
            events.append({"at_s": at_s, "class": name, "accept": accept})
        else:
            slope, bias = _rounded(_log_uniform(rng, 0.5, 2.0)), _rounded(rng.normal(0.0, 0.9))
            events.append({"at_s": at_s, "class": name, "score_slope": slope, "score_bias": bias})
    return sorted(events, key=lambda event: float(event["at_s"]))


def _k_sets(rng: Rng, max_k: int, request: bool) -> Data | None:
    """K with gaps, sets that differ by batch size, or None: every K at every batch size. Always with a launch K in it."""
    kind = rng.random()
    if kind < 0.65 or max_k < 2:
        return None
    if kind < 0.8 and not request:
        sets = {b: sorted({min(k, max_k) for k in ks}) for b, ks in SGLANG_SETS.items()}
        return {"k_by_batch": sets, "launch_k": min(3, max_k)}
    chosen = {0, max_k} if rng.random() < 0.7 else {1, max_k}
    chosen |= {int(k) for k in rng.integers(0, max_k + 1, int(rng.integers(0, 3)))}
    launch = int(rng.choice(sorted(chosen)))
    by_batch = {1: sorted(chosen)}
    if not request and rng.random() < 0.5:
        by_batch[int(_log_uniform(rng, 2.0, 64.0))] = sorted({launch, int(rng.choice(sorted(chosen)))})
    return {"k_by_batch": by_batch, "launch_k": launch}


def _log_uniform(rng: Rng, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _shares(weights: list[float]) -> np.ndarray[Any, Any]:
    return np.array(weights) / sum(weights)


def _rounded(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")
