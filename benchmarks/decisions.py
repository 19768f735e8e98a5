"""`make benchmarks`: the policies' decisions on every scenario of tests/scenarios in the simulated server, against the goals.

python -m benchmarks.decisions                     the goals, three seeds
python -m benchmarks.decisions --write             the same with peers and ablations, written to docs/benchmarks.md with plots
python -m benchmarks.decisions --seeds 1 fp8-jumps tiny-batch      a quick look
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
from adaptive_spec.engines.simulated.results import Result
from adaptive_spec.engines.simulated.scenario import Scenario, load_scenario
from benchmarks.goals import Summary, goal_rows, summarise

ROOT = Path(__file__).parent.parent
SCENARIOS = ROOT / "tests" / "scenarios"
NEEDED = "adaptive,oracle,static,ema,ema-wide"


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
    """The goals, what was reached, and whether it holds."""
    table = Table("goal", "granularity", "wanted", "reached", "", title="goals (simulated server)", title_justify="left")
    for row in goal_rows(summaries):
        table.add_row(row.words, row.granularity, row.wanted, row.reached, "[green]yes[/green]" if row.met else "[red]NO[/red]")
    return table


@click.command(help=__doc__)
@click.argument("names", nargs=-1)
@click.option("--seeds", type=click.IntRange(1, 20), default=3, show_default=True)
@click.option("--jobs", type=click.IntRange(1), default=os.cpu_count(), show_default=True)
@click.option("--write", is_flag=True, help="Run peers and ablations too and write docs/benchmarks.md.")
def main(names: tuple[str, ...], seeds: int, jobs: int, write: bool) -> None:
    for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    known = sorted(path.stem for path in SCENARIOS.glob("*.yaml"))
    for name in names:
        if name not in known:
            print(f"decisions: {name!r} is not allowed: must be one of {', '.join(known)}", file=sys.stderr)
            sys.exit(2)
    scenarios = [load_scenario(SCENARIOS / f"{name}.yaml") for name in names or known]
    console = Console(stderr=True)
    policies = f"{NEEDED},peers" if write else NEEDED
    results = run_seeds(scenarios, policies, seeds, jobs, console)
    summaries = [summarise([of_seed[i] for of_seed in results]) for i in range(len(scenarios))]
    out = Console()
    if not out.is_terminal:
        out.width = 150
    out.print(scenario_table(summaries))
    out.print(goal_table(summaries))
    if write:
        from benchmarks.decision_pages import write_pages

        ablated = run_seeds(scenarios, "adaptive,ablations", 1, jobs, console)[0]
        write_pages(ROOT / "docs", summaries, ablated, seeds)
        out.print("written to docs/benchmarks.md")


if __name__ == "__main__":
    main()
