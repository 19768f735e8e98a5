"""docs/benchmarks.md and its plots, from the results of `benchmarks.decisions`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adaptive_spec.engines.simulated.catalogue import ABLATIONS, PEERS, build
from adaptive_spec.engines.simulated.peers.sglang_ema import build_params
from adaptive_spec.engines.simulated.results import Result
from adaptive_spec.engines.simulated.scenario import Scenario, load_scenario
from adaptive_spec.engines.simulated.server import SimulatedServer
from adaptive_spec.storage.archive import write_atomically
from benchmarks.goals import Summary, geometric_mean, goal_rows

COMMAND = "make benchmarks"
TIMELINE = "h100-70b-chat-to-code"
SLICE_S = 2.0
SHOWN = ("adaptive", "best static", *PEERS)
COLOURS = ("#1b6ca8", "#666666", "#d1495b", "#edae49", "#66a182", "#b0b0b0", "#000000", "#8d6a9f", "#2e4057")


def write_pages(docs: Path, summaries: Sequence[Summary], ablated: Sequence[Result], seeds: int) -> None:
    """Draw the plots and write the page; `docs` is the project's docs folder."""
    pictures = docs / "benchmarks"
    pictures.mkdir(exist_ok=True)
    draw_efficiency(summaries, pictures / "efficiency.png")
    scenario = load_scenario(Path(__file__).parent.parent / "tests" / "scenarios" / f"{TIMELINE}.yaml")
    draw_timeline(scenario, pictures / "timeline.png")
    write_atomically(docs / "benchmarks.md", page(summaries, ablated, seeds).encode())
    (docs / "benchmarks.md").chmod(0o644)


def page(summaries: Sequence[Summary], ablated: Sequence[Result], seeds: int) -> str:
    """The text of docs/benchmarks.md."""
    return "\n".join(
        [
            "# Benchmarks of the decisions",
            "",
            f"Made by `{COMMAND}`; do not edit by hand. Everything on this page is **simulated**: a server in virtual time "
            "from measured latency curves (`adaptive_spec/engines/simulated`, scenario files in `tests/scenarios`, each with its "
            "sources; what is simulated and how is in [scenarios.md](scenarios.md)). What it cannot show is what such a model "
            "leaves out: prefills, the draft-extend stage, batches that depend on the policy. "
            "The speed of the hot path on real hardware is `make bench`.",
            "",
            f"Efficiency is goodput over that of an oracle that knows the latency curve and every acceptance probability, on the "
            f"same requests, mean of {seeds} seeds. The policy's cold-start sweep is in the clock.",
            "",
            "## The goals",
            "",
            f"`{COMMAND}`",
            "",
            *goals_table(summaries),
            "",
            "For the two lines against SGLang's policy: the oracle itself, which no policy can beat, is "
            + " and ".join(f"{oracle_gain(summaries, peer):+.1%} against `{peer}`" for peer in ("ema", "ema-wide"))
            + " on these scenarios.",
            "",
            "## Policies by scenario",
            "",
            f"`{COMMAND}`; one of them: `adaptive-spec bench tests/scenarios/NAME.yaml --policies adaptive,oracle,static,peers`",
            "",
            "![Efficiency of every policy on every scenario](benchmarks/efficiency.png)",
            "",
            *policies_table(summaries),
            "",
            "`ema`, `ema-wide`: SGLang 0.5.23's own policy with its default candidates, and with every K at every batch size "
            f"({build_params(7, False)[1]}). `startup-profile`: a cost table profiled before the first request, acceptance "
            "learnt online. `offline-files`: cost and calibration from files, never changed. `goodput-bandit`: no models, only "
            "measured goodput. Each is described in `adaptive_spec/engines/simulated/peers`.",
            "",
            "## Reaction to drift",
            "",
            *steps_table(summaries),
            "",
            f"`adaptive-spec bench tests/scenarios/{TIMELINE}.yaml`, goodput over time:",
            "",
            "![Goodput over time while traffic, load and machine change](benchmarks/timeline.png)",
            "",
            "## What each part is worth",
            "",
            "`adaptive-spec bench tests/scenarios/NAME.yaml --policies adaptive,ablations`, one seed: the policy with one part "
            "taken out. Cost and calibration are frozen after the first 20 s, KV tokens are hidden, one K is used for all "
            "requests, probing is switched off, guard rails are opened. "
            "Change of efficiency in percentage points; below 0 the part helps.",
            "",
            *ablation_table(ablated),
            "",
            "## Where it loses",
            "",
            *losses(summaries),
            "",
        ]
    )


def goals_table(summaries: Sequence[Summary]) -> list[str]:
    lines = ["| goal | granularity | wanted | reached | holds |", "|---|---|---|---|---|"]
    return lines + [
        f"| {row.words} | {row.granularity} | {row.wanted} | {row.reached} | {'yes' if row.met else '**no**'} |"
        for row in goal_rows(summaries)
    ]


def oracle_gain(summaries: Sequence[Summary], peer: str) -> float:
    """What the oracle gains over a peer at batch granularity, geometric mean."""
    return geometric_mean(1.0 / s.efficiency[peer] for s in summaries if s.granularity == "batch") - 1.0


def efficiency_of(summary: Summary, policy: str) -> float:
    return summary.best_static if policy == "best static" else summary.efficiency[policy]


def policies_table(summaries: Sequence[Summary]) -> list[str]:
    lines = [f"| scenario | granularity | {' | '.join(SHOWN)} |", "|---|---|" + "---|" * len(SHOWN)]
    for s in summaries:
        best = max(efficiency_of(s, policy) for policy in SHOWN)
        cells = [
            f"**{value:.3f}**" if value == best else f"{value:.3f}" for value in (efficiency_of(s, policy) for policy in SHOWN)
        ]
        cells[1] += f" (K = {s.best_static_name.removeprefix('static-')})"
        lines.append(f"| {s.name} | {s.granularity} | {' | '.join(cells)} |")
    means = [geometric_mean(efficiency_of(s, policy) for s in summaries) for policy in SHOWN]
    return [*lines, f"| geometric mean | | {' | '.join(f'{mean:.3f}' for mean in means)} |"]


def steps_table(summaries: Sequence[Summary]) -> list[str]:
    lines = [
        "Decode steps after an event until the 50-step mean of the chosen plans' expected goodput is 95 % of the oracle's (50 is "
        "the least there is), phases of 20 s or more, and the time lost to probing:",
        "",
        "| scenario | after events, all seeds | from cold | worst phase | swaps | probing |",
        "|---|---|---|---|---|---|",
    ]
    for s in summaries:
        after = ", ".join("never" if n is None else str(n) for n in s.steps_after_events) or "no events"
        cold = ", ".join("never" if n is None else str(n) for n in s.steps_from_cold)
        lines.append(f"| {s.name} | {after} | {cold} | {s.worst_phase:.3f} | {s.swaps:.0f} | {s.probe_share:.2%} |")
    return lines


def ablation_table(ablated: Sequence[Result]) -> list[str]:
    lines = [f"| scenario | adaptive | {' | '.join(ABLATIONS)} |", "|---|---|" + "---|" * len(ABLATIONS)]
    for result in ablated:
        whole = result.efficiency(result.runs["adaptive"])
        cells = [f"{100.0 * (result.efficiency(result.runs[name]) - whole):+.1f}" for name in ABLATIONS]
        lines.append(f"| {result.scenario.name} | {whole:.3f} | {' | '.join(cells)} |")
    return lines


def losses(summaries: Sequence[Summary]) -> list[str]:
    """Every goal that does not hold, and every scenario where another policy did better by more than a tenth of a percent."""
    missed = [row for row in goal_rows(summaries) if not row.met]
    lines = [f"- Goal missed: {row.words} ({row.granularity}): {row.reached}, wanted {row.wanted}." for row in missed]
    for s in summaries:
        own = s.efficiency["adaptive"]
        better = {policy: efficiency_of(s, policy) for policy in SHOWN[1:] if efficiency_of(s, policy) > own + 0.001}
        if better:
            words = ", ".join(f"{policy} {value:.3f}" for policy, value in sorted(better.items(), key=lambda item: -item[1]))
            lines.append(f"- {s.name}: adaptive {own:.3f}, but {words}.")
    return lines or ["Nowhere on these scenarios by more than 0.1 %."]


def draw_efficiency(summaries: Sequence[Summary], path: Path) -> None:
    """A dot per policy and scenario."""
    figure, axes = _figure(9.0, 0.33 * len(summaries) + 1.6)
    rows = np.arange(len(summaries))[::-1]
    for policy, colour in zip(SHOWN, COLOURS, strict=True):
        values = [efficiency_of(s, policy) for s in summaries]
        size, order = (46, 3) if policy == "adaptive" else (22, 2)
        axes.scatter(values, rows, s=size, color=colour, label=policy, zorder=order)
    axes.set_yticks(rows, [s.name for s in summaries], fontsize=8)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("goodput / oracle's goodput (simulated)")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=4, fontsize=8, frameon=False)
    _save(figure, path)


def draw_timeline(scenario: Scenario, path: Path) -> None:
    """Goodput of a few policies over simulated time."""
    figure, axes = _figure(9.0, 3.6)
    names = {"oracle": "black", "adaptive": "#1b6ca8", "static-3": "#666666", "ema": "#d1495b"}
    for name, colour in names.items():
        server = SimulatedServer(scenario, scenario.file.seed)
        decider = build(name, scenario, server, scenario.file.seed)
        times, goodput, before = [], [], (0, 0.0)
        for end_s in np.arange(SLICE_S, scenario.file.duration_s + SLICE_S / 2, SLICE_S).tolist():
            run = server.run(decider, end_s)
            times.append(end_s - SLICE_S / 2)
            goodput.append((run.tokens - before[0]) / (run.seconds - before[1]))
            before = (run.tokens, run.seconds)
        axes.plot(times, goodput, color=colour, linewidth=1.0 if name != "adaptive" else 1.6, label=name)
    for start_s in scenario.phase_starts[1:]:
        axes.axvline(start_s, color="red", linestyle=":", linewidth=0.9)
    axes.set_xlabel("simulated seconds (dotted: something changes)")
    axes.set_ylabel("tokens/s")
    axes.set_ylim(bottom=0)
    axes.set_title(f"{scenario.name} (simulated)", fontsize=10)
    axes.legend(fontsize=8, ncols=4, frameon=False)
    axes.grid(alpha=0.3)
    _save(figure, path)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    temporary = path.with_name(f".{path.name}.part")
    figure.savefig(temporary, dpi=110, format="png", metadata={"Software": None})
    pyplot.close(figure)
    temporary.replace(path)
