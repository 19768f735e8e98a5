"""Neighbours on the machine, in simulation: what the controller loses to slowness that has nothing to do with K.

    python -m benchmarks.disturbances [--seeds 5] [--duration 60] [PATTERN ...]

A server of 8 requests (steps of 5 to 20 ms) is disturbed by one pattern at a time. Nothing else changes, so the best policy is
one fixed K. Figures: expected goodput of the plans run, over that of the best fixed K in the same run (what the plans are worth,
not what the disturbance took); swaps a minute; share of time lost to probing; latency drift events. Means over seeds with their
standard errors.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from adaptive_spec.engines.simulated.adaptive import Adaptive
from adaptive_spec.engines.simulated.decider import Static
from adaptive_spec.engines.simulated.scenario import Scenario, scenario_from
from adaptive_spec.engines.simulated.server import SimulatedServer

DISTURBANCE = 15
"""Name of the random stream, beside those of the simulated server."""


class Pattern:
    """Factor of every step. low, high: range of steps that a factor lasts. draw: the next factor."""

    def __init__(self, rng: np.random.Generator, low: int, high: int, draw: Callable[[np.random.Generator, int], float]) -> None:
        self._rng, self._low, self._high, self._draw = rng, low, high, draw
        self._left = self._turn = 0
        self._factor = 1.0

    def next(self) -> float:
        if self._left == 0:
            self._left = int(self._rng.integers(self._low, self._high + 1))
            self._factor = self._draw(self._rng, self._turn)
            self._turn += 1
        self._left -= 1
        return self._factor


Factors = Callable[[np.random.Generator], Pattern]

PATTERNS: dict[str, Factors] = {
    "none": lambda rng: Pattern(rng, 1, 1, lambda _, n: 1.0),
    "x1.3 for 50-100 steps, then none": lambda rng: Pattern(rng, 50, 100, lambda _, n: 1.3 if n % 2 else 1.0),
    "x2-3 for 10-50 steps, then none": lambda rng: Pattern(rng, 10, 50, lambda r, n: r.uniform(2.0, 3.0) if n % 2 else 1.0),
    "x3 and x1 every 20 steps": lambda rng: Pattern(rng, 20, 20, lambda _, n: 3.0 if n % 2 else 1.0),
    "spikes x20 in 1 % of steps": lambda rng: Pattern(rng, 1, 1, lambda r, n: 20.0 if r.random() < 0.01 else 1.0),
    "lognormal, sigma 1": lambda rng: Pattern(rng, 1, 1, lambda r, n: float(r.lognormal(-0.5, 1.0))),
}


class DisturbedServer(SimulatedServer):
    """The simulated server with a pattern of slowness on top of its noise."""

    def __init__(self, scenario: Scenario, seed: int, pattern: Factors) -> None:
        super().__init__(scenario, seed)
        self._pattern = pattern(np.random.default_rng([seed, DISTURBANCE]))

    def _next_noise(self) -> float:
        return super()._next_noise() * self._pattern.next()


def scenario_of(granularity: str, duration_s: float) -> Scenario:
    """Eight requests on a staircase with tiles of 16 tokens. Chosen before anything was run on it, and not changed since."""
    data: dict[str, Any] = {
        "name": f"disturbed-{granularity}", "granularity": granularity, "max_k": 7, "duration_s": duration_s, "seed": 0,
        "latency": {
            "verify_curve": [[16 * (n + 1), 5.0 + 2.2 * n] for n in range(5)], "graph_batch_sizes": None,
            "draft_fixed_ms": 0.3, "draft_ms_per_step": 0.35, "context_ms_per_1k_tokens": 0.01, "overhead_ms": 0.4,
            "noise": {"sigma": 0.03},
        },
        "classes": {"text": {"accept": [0.78, 0.74, 0.72, 0.7, 0.68, 0.66, 0.64], "concentration": 4, "request_spread": 0.5,
                             "context": 800, "score_slope": 1.0, "score_bias": 0.0}},
        "timeline": [{"at_s": 0, "running": 8, "mix": {"text": 1.0}}],
        "mean_output_tokens": 200,
    }  # fmt: skip
    return scenario_from(data, str(data["name"]), Path())


@dataclass(frozen=True)
class Outcome:
    """One run. share: expected goodput over the best fixed K's. swaps: a minute. probing: share of time. drifts: in the run."""

    share: float
    swaps: float
    probing: float
    drifts: int


def run(scenario: Scenario, seed: int, pattern: Factors) -> Outcome:
    """Run the controller and every fixed K with the same disturbance."""
    adaptive = Adaptive(scenario)
    own = DisturbedServer(scenario, seed, pattern).run(adaptive)
    # Expected goodput of a fixed K hardly depends on the run: a third of it is enough.
    until_s = scenario.file.duration_s / 3.0
    fixed = [
        DisturbedServer(scenario, seed, pattern).run(Static(k), until_s).expected_goodput for k in range(scenario.file.max_k + 1)
    ]
    minutes = scenario.file.duration_s / 60.0
    drifts = adaptive.controller.counters.drift["latency"]
    return Outcome(own.expected_goodput / max(fixed), own.swaps / minutes, own.probe_share or 0.0, drifts)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    array = np.array(values)
    return float(array.mean()), float(array.std(ddof=1) / len(array) ** 0.5) if len(array) > 1 else 0.0


@click.command(help=__doc__)
@click.argument("patterns", nargs=-1)
@click.option("--seeds", type=click.IntRange(1, 100), default=5, show_default=True)
@click.option("--first-seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--duration", "duration_s", type=click.FloatRange(5.0), default=60.0, show_default=True)
@click.option("--granularity", type=click.Choice(["batch", "request", "both"]), default="both", show_default=True)
def main(patterns: tuple[str, ...], seeds: int, first_seed: int, duration_s: float, granularity: str) -> None:
    for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    chosen = [name for name in PATTERNS if not patterns or any(name.startswith(wanted) for wanted in patterns)]
    if not chosen:
        print(f"disturbances: must be the beginning of one of {', '.join(PATTERNS)}, got {patterns[0]!r}", file=sys.stderr)
        sys.exit(2)
    table = Table(title=f"disturbances (simulated server, {seeds} seeds of {duration_s:g} s)", title_justify="left")
    for words in ("pattern", "granularity", "of the best fixed K", "worst", "swaps a minute", "probing", "latency drifts"):
        table.add_column(words, no_wrap=True)
    for name in chosen:
        for kind in ("batch", "request") if granularity == "both" else (granularity,):
            scenario = scenario_of(kind, duration_s)
            outcomes = [run(scenario, seed, PATTERNS[name]) for seed in range(first_seed, first_seed + seeds)]
            share, error = mean_and_error([o.share for o in outcomes])
            table.add_row(
                name, kind, f"{share:.4f} ± {error:.4f}", f"{min(o.share for o in outcomes):.4f}",
                f"{np.mean([o.swaps for o in outcomes]):.1f} (most {max(o.swaps for o in outcomes):.1f})",
                f"{np.mean([o.probing for o in outcomes]):.2%}", f"{np.mean([o.drifts for o in outcomes]):.1f}",
            )  # fmt: skip
            shown = ", ".join(f"{o.share:.4f} ({o.swaps:.1f})" for o in outcomes)
            print(f"{name}, {kind}: {share:.4f} ± {error:.4f}: {shown}", file=sys.stderr, flush=True)
    console = Console()
    if not console.is_terminal:
        console.width = 150
    console.print(table)


if __name__ == "__main__":
    main()
