"""`make benchmarks`: the policies' decisions on every scenario of tests/scenarios in the simulated server, against the goals.

python -m benchmarks.decisions                     the goals, three seeds
python -m benchmarks.decisions --write             the same with peers and ablations, written to docs/benchmarks.md with plots
python -m benchmarks.decisions --seeds 1 fp8-jumps tiny-batch      a quick look
python -m benchmarks.decisions --seed 7            the same, then 64 scenarios drawn with seed 7 (--random N: so many)
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from adaptive_spec.engines.simulated.bench import run_scenarios
from adaptive_spec.engines.simulated.catalogue import policy_names
from adaptive_spec.engines.simulated.random_scenarios import random_scenarios
from adaptive_spec.engines.simulated.report import summary_table
from adaptive_spec.engines.simulated.results import Result
from adaptive_spec.engines.simulated.scenario import Scenario, load_scenario
from benchmarks.goals import Summary, goal_rows, summarise
from benchmarks.random_loads import POLICIES, better_table

ROOT = Path(__file__).parent.parent
SCENARIOS = ROOT / "tests" / "scenarios"
NEEDED = "adaptive,oracle,static,ema,ema-wide"
RANDOM_SCENARIOS = 64
"""Issue 11: the decisions are judged on so many scenarios that nothing was tuned to."""


def run_seeds(scenarios: Sequence[Scenario], policies: str, seeds: int, jobs: int, console: Console) -> list[list[Result]]:
    """Run every scenario with its own seed and the next ones: [seed][scenario]."""
    results = []
    with Progress(console=console, transient=True) as progress:
        total_s = sum(scenario.file.duration_s for scenario in scenarios)
        for offset in range(seeds):
            bar = progress.add_task(f"seed {offset + 1} of {seeds}", total=None)
            shifted = [reseeded(scenario, offset) for scenario in scenarios]
            results.append(run_scenarios(shifted, policies, None, False, jobs))
            progress.update(bar, total=total_s, completed=total_s)
    return results


def reseeded(scenario: Scenario, offset: int) -> Scenario:
    """The scenario with its seed + offset * 1000."""
    from dataclasses import replace

    return replace(scenario, file=scenario.file.model_copy(update={"seed": scenario.file.seed + 1000 * offset}))


def scenario_table(summaries: Sequence[Summary]) -> Table:
    """One line per scenario: means over seeds."""
    table = Table(title="efficiency against the oracle, mean over seeds (simulated server)", title_justify="left")
    table.add_column("scenario", no_wrap=True)
    for words in ("adaptive", "worst phase", "best static", "ema", "ema-wide", "steps to 95 %", "swaps", "probing"):
        table.add_column(words, justify="right", no_wrap=True)
    for s in summaries:
        steps = ",".join("-" if n is None else str(n) for n in s.steps_after_events[:8])
        table.add_row(
            s.name, f"{s.efficiency['adaptive']:.4f}", f"{s.worst_phase:.3f}", f"{s.best_static_name} {s.best_static:.4f}",
            f"{s.efficiency['ema']:.3f}", f"{s.efficiency['ema-wide']:.3f}", steps, f"{s.swaps:.0f}", f"{s.probe_share:.2%}",
        )  # fmt: skip
    return table


def goal_table(summaries: Sequence[Summary]) -> Table:
    """Goal, result, and whether the goal is met."""
    table = Table("goal", "granularity", "wanted", "reached", "", title="goals (simulated server)", title_justify="left")
    for row in goal_rows(summaries):
        table.add_row(row.words, row.granularity, row.wanted, row.reached, "[green]yes[/green]" if row.met else "[red]NO[/red]")
    return table


def print_random(count: int, seed: int, jobs: int, console: Console, out: Console) -> None:
    """Run adaptive and its peers on `count` scenarios drawn with `seed`: geometric mean, worst, and where a peer is better."""
    scenarios = random_scenarios(count, seed)
    total_s = sum(len(policy_names(f"{POLICIES},oracle", scenario)) * scenario.file.duration_s for scenario in scenarios)
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task(f"{count} random scenarios, seed {seed}", total=total_s)
        results = run_scenarios(scenarios, POLICIES, None, False, jobs, lambda seconds: progress.advance(bar, seconds))
    out.print(f"{count} scenarios drawn with seed {seed} (simulated server)", highlight=False)
    for granularity in sorted({result.scenario.file.granularity for result in results}):
        of_kind = [result for result in results if result.scenario.file.granularity == granularity]
        out.print(f"granularity {granularity}:")
        out.print(summary_table(of_kind))
    out.print(summary_table(results))
    out.print(better_table(results))


def output() -> Console:
    """The standard output; a file or a pipe has no width: no figure is cut."""
    out = Console()
    if not out.is_terminal:
        out.width = 150
    return out


def judge_library(names: Sequence[str], seeds: int, jobs: int, write: bool) -> None:
    """Run the scenarios of tests/scenarios, print tables and goals. write: with peers and ablations to docs/benchmarks.md."""
    scenarios = [load_scenario(SCENARIOS / f"{name}.yaml") for name in names]
    console = Console(stderr=True)
    policies = f"{NEEDED},peers" if write else NEEDED
    results = run_seeds(scenarios, policies, seeds, jobs, console)
    summaries = [summarise([of_seed[i] for of_seed in results]) for i in range(len(scenarios))]
    out = output()
    out.print(scenario_table(summaries))
    out.print(goal_table(summaries))
    if write:
        from benchmarks.decision_pages import write_pages

        ablated = run_seeds(scenarios, "adaptive,ablations", 1, jobs, console)[0]
        write_pages(ROOT / "docs", summaries, ablated, seeds)
        out.print("written to docs/benchmarks.md")


@click.command(help=__doc__)
@click.argument("names", nargs=-1)
@click.option("--seeds", type=click.IntRange(1, 20), default=3, show_default=True)
@click.option("--jobs", type=click.IntRange(1), default=os.cpu_count(), show_default=True)
@click.option("--write", is_flag=True, help="Run peers and ablations too and write docs/benchmarks.md.")
@click.option("--seed", type=click.IntRange(0), help="Judge on scenarios drawn at random with this seed too.")
@click.option(
    "--random", "count", type=click.IntRange(1), help=f"How many are drawn; {RANDOM_SCENARIOS} unless given. Needs --seed."
)
@click.option("--random-only", is_flag=True, help="Leave the scenarios of tests/scenarios out. Needs --seed.")
def main(
    names: tuple[str, ...], seeds: int, jobs: int, write: bool, seed: int | None, count: int | None, random_only: bool
) -> None:
    for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    known = sorted(path.stem for path in SCENARIOS.glob("*.yaml"))
    for name in names:
        if name not in known:
            print(f"decisions: {name!r} is not allowed: must be one of {', '.join(known)}", file=sys.stderr)
            sys.exit(2)
    if seed is None and (count is not None or random_only):
        print(f"decisions: {'--random-only' if count is None else '--random'}: must come with --seed", file=sys.stderr)
        sys.exit(2)
    if names and random_only:
        print(f"decisions: --random-only: must come without names of scenarios, got {names[0]!r}", file=sys.stderr)
        sys.exit(2)
    if not random_only:
        judge_library(names or known, seeds, jobs, write)
    if seed is not None:
        print_random(count or RANDOM_SCENARIOS, seed, jobs, Console(stderr=True), output())


if __name__ == "__main__":
    main()
