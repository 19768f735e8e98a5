"""What `adaptive-spec bench` prints: one table per scenario."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from adaptive_spec.engines.simulated.bench import Result


def result_table(result: Result, seed: int | None, warm: bool) -> Table:
    """Policies down, phases across: efficiency against the oracle, and steps until 95 % of it (- = never)."""
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
    for phase in result.oracle.phases:
        table.add_column(f"{phase.at_s:g} s", justify="right", no_wrap=True)
    best = max((run.goodput for name, run in result.runs.items() if name.startswith("static-")), default=None)
    for name, run in result.runs.items():
        phases = [
            f"{result.efficiency(run, i):.3f} [dim]{'-' if phase.good_after is None else phase.good_after:>4}[/dim]"
            for i, phase in enumerate(run.phases)
        ]
        style = "bold" if name == "adaptive" else "cyan" if run.goodput == best else None
        table.add_row(name, f"{run.goodput:,.1f}", f"{result.efficiency(run):.4f}", f"{run.swaps:,}", *phases, style=style)
    return table
