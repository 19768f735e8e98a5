"""Output of the demo: a live view on a terminal, plain lines elsewhere, and a summary at the end."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from adaptive_spec.cli.tables import k_ranges, number

LINE_INTERVAL_S = 5.0
EVENTS_SHOWN = 8
BLOCKS = "▁▂▃▄▅▆▇█"
_STYLES = {"active": "bold green", "sweep": "bold yellow"}


@dataclass
class DemoState:
    """Newest state of both processes. engine: the status file of the engine process. sidecar: /status.json."""

    duration_s: float | None
    engine: dict[str, Any] = field(default_factory=dict)
    sidecar: dict[str, Any] = field(default_factory=dict)
    sidecar_answers: bool = False
    sidecar_restarts: int = 0


class DemoView:
    """Context manager around the run. Call `show` regularly during it, and `conclude` once afterwards."""

    def __init__(self, url: str, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False, markup=False, emoji=False)
        self._url = url
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        self._next_line_s = 0.0
        self._shown: set[tuple[float, str]] = set()
        self._restarts = self._rounds = 0

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        else:
            self._console.print(f"status page and metrics: {self._url}")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def show(self, state: DemoState) -> None:
        """Refresh the live view; without a terminal, print new events and a line every LINE_INTERVAL_S."""
        if self._live:
            self._live.update(live_view(state, self._url), refresh=True)
            return
        for text in self._new_events(state):
            self._console.print(text, markup=False, soft_wrap=True)
        now_s = time.monotonic()
        if now_s >= self._next_line_s:
            self._next_line_s = now_s + LINE_INTERVAL_S
            self._console.print(plain_line(state), markup=False, soft_wrap=True)

    def conclude(self, document: dict[str, Any], state: DemoState) -> None:
        """Print the summary of the run."""
        if document.get("rounds"):
            self._console.print(rounds_table(document["rounds"], document["ratios"]))
        elif document["compare"]:
            self._console.print(compare_table(document["compare"]))
        drift, checked = document["drift_events"], document["lossless_checked"]
        rows = {
            "decode steps": f"{document['decode_steps']:,}",
            "output": f"{document['output_tokens']:,} tokens, {document['goodput_tokens_per_s']:,.0f} tokens/s of decode time",
            "sweep": f"{document['sweep_steps']} steps, {document['sweep_s']:.1f} s",
            "tile boundaries": ", ".join(map(str, document["boundaries"])) or "none found",
            "policy swaps": str(document["policy_swaps"]),
            "drift events": f"{drift.get('latency', 0)} latency, {drift.get('calibration', 0)} calibration",
            "calibration": f"ECE {number(document['calibration_error'], '.3f')}",
            "lossless": f"{'yes' if document['lossless'] else 'NO'}, {checked} outputs compared with the target model alone",
        }
        if document.get("steps_not_as_asked") is not None:
            steps, limited = document["decode_steps"], document["steps_not_as_asked"]
            share = f" ({limited / steps:.2%})" if steps else ""
            rows["not as asked"] = f"{limited:,} of {steps:,} steps ran another K than was asked for{share}"
            rows["K switches"] = f"{document['k_switches']:,}"
        planned = document.get("rounds_planned")
        if planned and len(document["rounds"]) < planned:
            rows["rounds"] = f"{len(document['rounds'])} of {planned} done"
        if state.sidecar_restarts:
            rows["sidecar"] = f"restarted {state.sidecar_restarts} {'time' if state.sidecar_restarts == 1 else 'times'}"
        table = Table(show_header=False, box=None, pad_edge=False)
        for name, value in rows.items():
            table.add_row(Text(name, style="dim"), Text(value))
        self._console.print(table)

    def _new_events(self, state: DemoState) -> list[str]:
        """Return a line for each event and each finished round since the last call."""
        lines = []
        rounds = state.engine.get("rounds", [])
        for number_, found in enumerate(rounds[self._rounds :], self._rounds + 1):
            lines.append(f"  round {number_}: " + ", ".join(f"{name} {rate:,.0f}" for name, rate in found.items()) + " tokens/s")
        self._rounds = len(rounds)
        if state.sidecar_restarts > self._restarts:
            self._restarts = state.sidecar_restarts
            lines.append("  sidecar restarted; the engine kept running")
        for event in state.sidecar.get("events", []):
            key = (event["time_s"], event["text"])
            if key not in self._shown:
                self._shown.add(key)
                lines.append(f"  {event['text']}")
        return lines


def plain_line(state: DemoState) -> str:
    """Return the state of the run in one line."""
    engine, sidecar = state.engine, state.sidecar
    if not engine:
        return "loading the models"
    phase = engine["phase"]
    mode = sidecar.get("mode", "-") if state.sidecar_answers else "no sidecar"
    boundaries = ", ".join(map(str, sidecar.get("boundaries", []))) or "-"
    arm = f"{stage(engine)}: " if engine.get("arm") else ""
    return (
        f"{engine['elapsed_s']:6.1f} s  {mode:8s} {arm}{phase['kind']} x{phase['concurrency']}  K {engine['k']}"
        f"  {engine['goodput_tokens_per_s']:,.0f} tokens/s  boundaries {boundaries}"
        f"  policy {sidecar.get('policy_version', 0)}  K by batch {k_ranges(sidecar.get('k_by_batch_size', {}))}"
    )


def live_view(state: DemoState, url: str) -> RenderableType:
    """Return what the terminal shows during the run."""
    engine, sidecar = state.engine, state.sidecar
    if not engine:
        return Panel(Text("loading the models"), title="adaptive-spec demo", title_align="left")
    mode = sidecar.get("mode", "-") if state.sidecar_answers else "no sidecar, the engine keeps running"
    phase = engine["phase"]
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    grid.add_row("mode", Text.assemble((mode, _STYLES.get(mode, "bold")), f"  {sidecar.get('reason', '')}"))
    sweep = sidecar.get("sweep") or {"progress": 0.0, "steps": 0}
    if mode == "sweep":
        bar = Table.grid(padding=(0, 1))
        bar.add_row(ProgressBar(total=1.0, completed=sweep["progress"], width=40), f"{sweep['steps']} steps")
        grid.add_row("sweep", bar)
    grid.add_row("traffic", f"{phase['kind']}, {phase['concurrency']} concurrent requests ({stage(engine)})")
    grid.add_row("now", f"K {engine['k']} at batch {engine['batch_size']}, {engine['goodput_tokens_per_s']:,.0f} tokens/s")
    grid.add_row("K by batch size", k_strip(sidecar.get("k_by_batch_size", {})))
    boundaries = sidecar.get("boundaries", [])
    grid.add_row("verify latency", staircase(sidecar.get("latency_points", []), boundaries))
    grid.add_row("tile boundaries", ", ".join(map(str, boundaries)) or "none yet")
    for kind, rates in engine.get("acceptance", {}).items():
        grid.add_row(f"accepted, {kind}", "  ".join(number(rate, ".2f") for rate in rates) + "  by draft position")
    calibration = sidecar.get("calibration") or {}
    drift = sidecar.get("drift_events") or {}
    quality = f"{calibration.get('kind', '-')}, ECE {number(calibration.get('ece'), '.3f')}"
    grid.add_row(
        "calibration", f"{quality}, drift events {drift.get('latency', 0)} latency, {drift.get('calibration', 0)} calibration"
    )
    gain = sidecar.get("measured_gain")
    swaps = sum((sidecar.get("swaps") or {}).values())
    gained = "" if gain is None else f", {gain:+.1%} over the launch K (estimate)"
    grid.add_row("policy", f"version {sidecar.get('policy_version', 0)}, {swaps} swaps{gained}")
    parts: list[RenderableType] = [grid]
    if engine.get("rounds"):
        parts += [Text(), rounds_table(engine["rounds"], engine["ratios"])]
    elif engine.get("compare"):
        parts += [Text(), compare_table(engine["compare"])]
    events = sidecar.get("events", [])[-EVENTS_SHOWN:]
    if events:
        parts.append(Text())
    parts.append(Text("\n".join(f"{event['age_s']:7.0f} s ago  {event['text']}" for event in reversed(events)), style="dim"))
    total = f" of {state.duration_s:.0f}" if state.duration_s else ""
    pids = f"engine {engine['pid']}, sidecar {sidecar.get('sidecar_pid', '-')}"
    title = f"adaptive-spec demo  {engine['model']} on {engine['gpu']}  {engine['elapsed_s']:.0f}{total} s"
    subtitle = Text(f"{url}  pids: {pids}")
    return Panel(Group(*parts), title=Text(title), title_align="left", subtitle=subtitle, subtitle_align="left")


def k_strip(k_by_batch_size: dict[str, int]) -> Text:
    """Return K of every batch size in one line, coloured by K."""
    if not k_by_batch_size:
        return Text("none yet", style="dim")
    styles = ("dim", "blue", "cyan", "green", "yellow", "magenta", "red")
    text = Text()
    for batch, k in sorted((int(b), k) for b, k in k_by_batch_size.items()):
        text.append(f"{batch}:", style="dim")
        text.append(f"{k} ", style=f"bold {styles[min(k, len(styles) - 1)]}")
    return text


def staircase(points: list[list[float]], boundaries: list[int], width: int = 64) -> Text:
    """Return latency by measured token count as a row of blocks, with a mark after every tile boundary."""
    if not points:
        return Text("not measured yet", style="dim")
    shown = points[:width]
    low, high = min(p[1] for p in shown), max(p[1] for p in shown)
    text = Text()
    for tokens, ms, _ in shown:
        level = int((ms - low) / (high - low) * (len(BLOCKS) - 1)) if high > low else 0
        text.append(BLOCKS[level], style="cyan")
        if tokens in boundaries:
            text.append("╎", style="red")
    text.append(f"  {low:.2f} to {high:.2f} ms")
    return text


def stage(engine: dict[str, Any]) -> str:
    """What the run does now; during rounds with round and arm."""
    return f"round {engine['round']}, {engine['arm']}" if engine.get("arm") else str(engine["stage"])


def rounds_table(rounds: list[dict[str, float]], ratios: dict[str, dict[str, Any]]) -> Table:
    """Return goodput of every arm by round, and adaptive over each other arm with its median."""
    table = Table("round", box=None, pad_edge=False)
    for name in rounds[0]:
        table.add_column(f"{name} tokens/s", justify="right")
    for name in ratios:
        table.add_column(f"adaptive / {name}", justify="right")
    for index, found in enumerate(rounds):
        row = [f"{rate:,.0f}" for rate in found.values()] + [f"{ratio['by_round'][index]:.3f}" for ratio in ratios.values()]
        table.add_row(str(index + 1), *row)
    table.add_row("median", *("" for _ in rounds[0]), *(f"{ratio['median']:.3f}" for ratio in ratios.values()), style="bold")
    return table


def compare_table(compare: dict[str, float]) -> Table:
    """Return goodput of every fixed K, and the ratio of adaptive to it."""
    adaptive = compare.get("adaptive", 0.0)
    fixed = {name: goodput for name, goodput in compare.items() if name != "adaptive"}
    best = max(fixed, key=fixed.__getitem__, default="")
    table = Table("same prompts, alternating", box=None, pad_edge=False)
    for heading in ("tokens/s", "adaptive / this"):
        table.add_column(heading, justify="right")
    for name, goodput in compare.items():
        ratio = f"x {adaptive / goodput:.3f}" if goodput and name != "adaptive" else ""
        style = "bold green" if name == "adaptive" else "bold" if name == best else ""
        table.add_row(Text(name + (" (best fixed)" if name == best else ""), style=style), f"{goodput:,.0f}", ratio)
    return table
