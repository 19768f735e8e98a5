"""The goals of the decisions, and how results are measured against them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import NamedTuple

from adaptive_spec.engines.simulated.results import Result

LONG_PHASE_S = 20.0


@dataclass(frozen=True)
class Summary:
    """One scenario over its seeds. efficiency: mean by policy. worst_phase: of all seeds, phases of 20 s or more.
    steps_after_events: adaptive's decode steps to 95 % after each event (not the start) of every seed, None for never.
    gains: adaptive's goodput over another policy's, by policy, mean of seeds.
    """

    name: str
    granularity: str
    drifts: bool
    efficiency: dict[str, float]
    gains: dict[str, float]
    worst_phase: float
    best_static_name: str
    best_static: float
    steps_after_events: tuple[int | None, ...]
    steps_from_cold: tuple[int | None, ...]
    swaps: float
    probe_share: float

    @property
    def against_best_static(self) -> float:
        return self.efficiency["adaptive"] / self.best_static


def summarise(of_seeds: Sequence[Result]) -> Summary:
    """Put the results of one scenario's seeds together. They must hold adaptive and every static K."""
    first = of_seeds[0]
    efficiency = {name: fmean(result.efficiency(result.runs[name]) for result in of_seeds) for name in first.runs}
    statics = {name: value for name, value in efficiency.items() if name.startswith("static-")}
    best = max(statics, key=statics.__getitem__)
    gains = {
        name: fmean(result.runs["adaptive"].goodput / result.runs[name].goodput for result in of_seeds) for name in first.runs
    }
    phases = [
        (index, result.efficiency(result.runs["adaptive"], index), result.runs["adaptive"].phases[index].good_after)
        for result in of_seeds
        for index in _long_phases(result)
    ]
    return Summary(
        name=first.scenario.name, granularity=first.scenario.file.granularity, drifts=len(first.oracle.phases) > 1,
        efficiency=efficiency, gains=gains, worst_phase=min((value for _, value, _ in phases), default=1.0),
        best_static_name=best, best_static=statics[best],
        steps_after_events=tuple(steps for index, _, steps in phases if index > 0),
        steps_from_cold=tuple(result.runs["adaptive"].phases[0].good_after for result in of_seeds),
        swaps=fmean(result.runs["adaptive"].swaps for result in of_seeds),
        probe_share=fmean(result.runs["adaptive"].probe_share or 0.0 for result in of_seeds),
    )  # fmt: skip


def _long_phases(result: Result) -> list[int]:
    starts = [phase.at_s for phase in result.oracle.phases]
    ends = [*starts[1:], result.scenario.file.duration_s]
    return [i for i, (start_s, end_s) in enumerate(zip(starts, ends, strict=True)) if end_s - start_s >= LONG_PHASE_S]


class GoalRow(NamedTuple):
    """One goal at one granularity: what is wanted, what was reached, whether it holds."""

    words: str
    granularity: str
    wanted: str
    reached: str
    met: bool


GOALS = {"batch": {"efficiency": 0.985, "phase": 0.95}, "request": {"efficiency": 0.98, "phase": 0.94}}


def goal_rows(summaries: Sequence[Summary]) -> list[GoalRow]:
    """The goals of the decisions against what was reached, for the granularities there are."""
    rows: list[GoalRow] = []
    for granularity, limits in GOALS.items():
        mine = [s for s in summaries if s.granularity == granularity]
        if not mine:
            continue
        worst = min(mine, key=lambda s: s.efficiency["adaptive"])
        value = worst.efficiency["adaptive"]
        wanted = limits["efficiency"]
        rows.append(
            GoalRow("efficiency, each scenario, mean of seeds", granularity, f">= {wanted}", f"{value:.4f} {worst.name}",
                    value >= wanted)
        )  # fmt: skip
        worst = min(mine, key=lambda s: s.worst_phase)
        wanted = limits["phase"]
        rows.append(
            GoalRow("worst phase of 20 s or more, any seed", granularity, f">= {wanted}", f"{worst.worst_phase:.4f} {worst.name}",
                    worst.worst_phase >= wanted)
        )  # fmt: skip
        steps = [math.inf if n is None else n for s in mine for n in s.steps_after_events]
        if steps:
            middle, slowest = median(steps), max(steps)
            rows.append(GoalRow("steps to 95 % after an event, median / worst", granularity, "<= 200 / 800",
                                f"{middle:g} / {slowest:g}", middle <= 200 and slowest <= 800))  # fmt: skip
        drifting = [s.against_best_static for s in mine if s.drifts]
        if drifting:
            gain = geometric_mean(drifting) - 1.0
            rows.append(GoalRow("against the best static K where something drifts, geometric mean", granularity, ">= +3 %",
                                f"{gain:+.2%}", gain >= 0.03))  # fmt: skip
        steady = [s for s in mine if not s.drifts]
        if steady:
            worst = min(steady, key=lambda s: s.against_best_static)
            loss = worst.against_best_static - 1.0
            rows.append(GoalRow("against the best static K where nothing drifts, each", granularity, ">= -1 %",
                                f"{loss:+.2%} {worst.name}", loss >= -0.01))  # fmt: skip
            dearest = max(steady, key=lambda s: s.probe_share)
            rows.append(GoalRow("time lost to probing where nothing drifts, each", granularity, "<= 1 %",
                                f"{dearest.probe_share:.2%} {dearest.name}", dearest.probe_share <= 0.01))  # fmt: skip
        if granularity == "batch":
            for peer, wanted in (("ema", 0.25), ("ema-wide", 0.10)):
                gain = geometric_mean(s.gains[peer] for s in mine) - 1.0
                bound = geometric_mean(1.0 / s.efficiency[peer] for s in mine) - 1.0
                rows.append(GoalRow(f"against SGLang's own policy ({peer}), geometric mean", granularity, f">= +{wanted:.0%}",
                                    f"{gain:+.1%} (the oracle {bound:+.1%})", gain >= wanted))  # fmt: skip
    return rows


def geometric_mean(values: Iterable[float]) -> float:
    return math.exp(fmean(math.log(value) for value in values))
