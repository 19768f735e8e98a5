"""`make benchmarks ARGS="--seed S"`: the policies on scenarios drawn fresh with a seed, on which nothing was tuned.

All figures are by expected goodput of the plans that were run, relative to the oracle's (`Result.expected_efficiency`), the
sweep and probes included.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from adaptive_spec.engines.simulated.results import Result

POLICIES = "adaptive,peers"
MARGIN = 0.01
"""Issue 11: every scenario is named in which a peer is better than adaptive by more than this share."""


def better_peers(result: Result) -> dict[str, float]:
    """The lead of each peer whose expected goodput is more than `MARGIN` above adaptive's, largest first; 0.05 = 5 % more."""
    own = result.runs["adaptive"].expected_goodput
    leads = {name: run.expected_goodput / own - 1.0 for name, run in result.runs.items() if name not in ("adaptive", "oracle")}
    return dict(sorted(((name, lead) for name, lead in leads.items() if lead > MARGIN), key=lambda entry: -entry[1]))


def better_table(results: Sequence[Result]) -> Table:
    """Every scenario in which a peer is better by more than `MARGIN`, the largest lead first."""
    found = [(result, peers) for result in results if (peers := better_peers(result))]
    found.sort(key=lambda entry: -max(entry[1].values()))
    table = Table(
        title=f"scenarios in which a peer is better by more than {MARGIN:.0%}: {len(found)} of {len(results)}",
        title_justify="left",
    )
    for words in ("scenario", "granularity"):
        table.add_column(words, no_wrap=True)
    table.add_column("adaptive", justify="right", no_wrap=True)
    table.add_column("peers by their lead")
    for result, peers in found:
        table.add_row(
            result.scenario.name, result.scenario.file.granularity, f"{result.expected_efficiency(result.runs['adaptive']):.4f}",
            ", ".join(f"{name} {lead:+.1%}" for name, lead in peers.items()),
        )  # fmt: skip
    return table
