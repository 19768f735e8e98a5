"""The table `adaptive-spec bench` prints for a scenario."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.table import Table
from rich.text import Text

from adaptive_spec.engines.simulated.results import Result

MANY_PHASES = 8


def result_table(result: Result, seed: int | None, warm: bool) -> Table:
    """Policies down, phases across: efficiency against the oracle, and steps until 95 % of it (- = never).

    Of more than `MANY_PHASES` phases only the worst and the slowest are shown.
    """
    scenario = result.scenario
    file = scenario.file
    start = "adaptive starts from a profile" if warm else "adaptive's cold start is in the clock"
    table = Table(
        title=f"{scenario.name}: simulated server, {file.granularity} granularity, {file.duration_s:g} s, "
        f"seed {file.seed if seed is None else seed}; {start}",
        title_justify="left",
        caption="efficiency: goodput against the oracle's; by phase with decode steps to 95 % of it (- = never)",
        caption_justify="left",
    )
    table.add_column("policy", no_wrap=True)
    for words in ("tokens/s", "efficiency", "swaps"):
        table.add_column(words, justify="right", no_wrap=True)
    many = len(result.oracle.phases) > MANY_PHASES
    for words in ("worst phase",) if many else [f"{phase.at_s:g} s" for phase in result.oracle.phases]:
        table.add_column(words, justify="right", min_width=5)
    best = max((run.goodput for name, run in result.runs.items() if name.startswith("static-")), default=None)
    for name, run in result.runs.items():
        phases = [
            (result.efficiency(run, i), "-" if phase.good_after is None else str(phase.good_after))
            for i, phase in enumerate(run.phases)
        ]
        shown = [min(phases)] if many else phases
        style = "bold" if name == "adaptive" else "cyan" if run.goodput == best else None
        table.add_row(
            name,
            f"{run.goodput:,.1f}",
            f"{result.efficiency(run):.4f}",
            f"{run.swaps:,}",
            *(Text.assemble(f"{efficiency:.3f} ", (f"{steps:>4}", "dim")) for efficiency, steps in shown),
            style=style,
        )
    return table


def summary_table(results: Sequence[Result]) -> Table:
    """Each policy over all scenarios: geometric mean of its expected efficiency, its standard error, the worst scenario."""
    table = Table(
        title="all scenarios, by expected goodput of the plans that were run: over the oracle's, the best greedy choice per step",
        title_justify="left",
    )
    table.add_column("policy", no_wrap=True)
    for words in ("scenarios", "geometric mean", "std. error", "worst"):
        table.add_column(words, justify="right", no_wrap=True)
    table.add_column("worst scenario", no_wrap=True)
    for name in dict.fromkeys(name for result in results for name in result.runs):
        with_it = [result for result in results if name in result.runs]
        values = [result.expected_efficiency(result.runs[name]) for result in with_it]
        logs = np.log(values)
        error = float(logs.std(ddof=1)) / len(logs) ** 0.5 if len(logs) > 1 else 0.0
        worst = int(np.argmin(values))
        table.add_row(
            name, str(len(values)), f"{np.exp(logs.mean()):.4f}", f"{error:.4f}", f"{values[worst]:.3f}",
            with_it[worst].scenario.name,
        )  # fmt: skip
    return table
