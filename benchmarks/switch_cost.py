"""What it gains to charge a change of K for its cost, in simulation: goodput with and without the charge, paired by seed.

    python -m benchmarks.switch_cost [--seeds 8] [--first-seed 9001] [--duration 120] [--jobs N]

Scenarios of tests/scenarios with the K of SGLang's default adaptive configuration, and a cost of every change of K. Both arms are
the adaptive policy; the second learns the cost too, but charges 0. SGLang's own policy (a stand-in of its rule where SGLang is
not installed) runs beside them. The error is the standard error of the mean over seeds.
"""

from __future__ import annotations

import math
import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import click

from adaptive_spec.engines.simulated.adaptive import Adaptive
from adaptive_spec.engines.simulated.catalogue import build
from adaptive_spec.engines.simulated.results import Run
from adaptive_spec.engines.simulated.scenario import Scenario, load_scenario
from adaptive_spec.engines.simulated.server import SimulatedServer
from adaptive_spec.models.latency.switch_cost import SwitchCost

SCENARIOS = Path(__file__).parent.parent / "tests" / "scenarios"
NAMES = ("chat-code-switching", "swinging-batch")
COSTS_MS = (1.0, 10.0)
"""Of one change of K: assumed, not measured."""
DEFAULT_K: dict[int, list[int]] = {1: [1, 3, 5, 7], 8: [0, 1, 3], 32: [0, 1], 64: [0]}


class Uncharged(SwitchCost):
    """Learns the cost and charges nothing."""

    @property
    def seconds(self) -> float:
        return 0.0


class Pair(NamedTuple):
    """One seed. ratio: goodput with the charge over that without. own: over SGLang's own policy. switches: changes of K by 1000
    steps, with and without the charge. limited: steps that did not run as asked.
    """

    ratio: float
    own: float
    switches: tuple[float, float]
    limited: int


def scenario_of(name: str, cost_ms: float, duration_s: float) -> Scenario:
    scenario = load_scenario(SCENARIOS / f"{name}.yaml")
    latency = scenario.file.latency.model_copy(update={"k_switch_ms": cost_ms})
    changes = {"latency": latency, "k_by_batch": DEFAULT_K, "duration_s": min(duration_s, scenario.file.duration_s)}
    return replace(scenario, file=scenario.file.model_copy(update=changes))


def run_pair(name: str, cost_ms: float, duration_s: float, seed: int) -> Pair:
    scenario = scenario_of(name, cost_ms, duration_s)
    charged, uncharged = Adaptive(scenario), Adaptive(scenario)
    models = uncharged.controller.models
    models.switch_cost = Uncharged(uncharged.controller.info.granularity, models.speed_factor)
    runs: list[Run] = [SimulatedServer(scenario, seed).run(one) for one in (charged, uncharged)]
    server = SimulatedServer(scenario, seed)
    own = server.run(build("ema", scenario, server, seed, False))
    switches = (1e3 * runs[0].k_switches / runs[0].steps, 1e3 * runs[1].k_switches / runs[1].steps)
    limited = runs[0].limited_steps
    return Pair(runs[0].goodput / runs[1].goodput, runs[0].goodput / own.goodput, switches, limited)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


@click.command()
@click.option("--seeds", type=click.IntRange(2, 1000), default=8, show_default=True)
@click.option("--first-seed", type=click.IntRange(0), default=9001, show_default=True, help="Of fresh ones: no scenario has it.")
@click.option("--duration", type=click.FloatRange(20.0), default=120.0, show_default=True, help="Simulated seconds of a run.")
@click.option("--jobs", type=click.IntRange(1), help="Processes.  [default: one per core]")
def main(seeds: int, first_seed: int, duration: float, jobs: int | None) -> None:
    """Measure what charging the cost of a change of K gains."""
    for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    columns = ("scenario", "cost of a change, ms", "goodput, charged over not", "changes per 1000 steps: charged, not")
    click.echo("| " + " | ".join((*columns, "goodput over SGLang's own", "steps not as asked")) + " |\n" + 6 * "|---" + "|")
    tasks = [(name, cost_ms) for name in NAMES for cost_ms in COSTS_MS]
    with ProcessPoolExecutor(jobs or os.cpu_count() or 1) as pool:
        waiting = {
            task: [pool.submit(run_pair, *task, duration, seed) for seed in range(first_seed, first_seed + seeds)]
            for task in tasks
        }
        for (name, cost_ms), futures in waiting.items():
            pairs = [future.result() for future in futures]
            mean, error = mean_and_error([100.0 * (pair.ratio - 1.0) for pair in pairs])
            own, own_error = mean_and_error([pair.own for pair in pairs])
            charged, uncharged = (statistics.mean(pair.switches[i] for pair in pairs) for i in (0, 1))
            limited = sum(pair.limited for pair in pairs)
            click.echo(
                f"| {name} | {cost_ms:g} | {mean:+.2f} ± {error:.2f} % | {charged:.0f}, {uncharged:.0f} "
                f"| {own:.3f} ± {own_error:.3f} | {limited} |"
            )


if __name__ == "__main__":
    main()
