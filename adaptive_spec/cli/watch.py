"""`adaptive-spec watch`: the live view of a running sidecar, until Ctrl-C or until the sidecar has gone."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from adaptive_spec.cli.demo_view import BLOCKS, EVENTS_SHOWN, LINE_INTERVAL_S, k_strip, staircase
from adaptive_spec.cli.processes import stop_signals
from adaptive_spec.cli.tables import k_ranges, number
from adaptive_spec.client.sidecar import ControlClient
from adaptive_spec.errors import BadInput

UPDATE_S = 1.0
LOOK_AT_SIGNALS_S = 0.1
GONE_S = 30.0
"""A sidecar that answered and has been silent for so long has gone: a restart takes some seconds."""
GOODPUT_SHOWN = 60
_STYLES = {"active": "bold green", "sweep": "bold yellow", "fallback": "bold red"}


class Watch:
    """What was seen of one sidecar: prints new events and a line now and then, or keeps a live view on a terminal."""

    def __init__(self, url: str, console: Console) -> None:
        self.url, self._console = url, console
        self._goodput: list[float] = []
        self._shown: set[tuple[float, str]] = set()
        self._next_line_s = 0.0

    def seen(self, status: dict[str, Any]) -> None:
        """Take a /status.json."""
        if (goodput := status.get("goodput_tokens_per_s")) is not None:
            self._goodput = [*self._goodput[1 - GOODPUT_SHOWN :], goodput]

    def print_lines(self, status: dict[str, Any], now_s: float) -> None:
        """Print the events that are new and, every LINE_INTERVAL_S, the state in a line."""
        for event in status.get("events", []):
            key = (event["time_s"], event["text"])
            if key not in self._shown:
                self._shown.add(key)
                self._console.print(f"  {event['text']}", markup=False, soft_wrap=True)
        if now_s >= self._next_line_s:
            self._next_line_s = now_s + LINE_INTERVAL_S
            self._console.print(plain_line(status), markup=False, soft_wrap=True)

    def view(self, status: dict[str, Any], silent_s: float) -> RenderableType:
        """Return what a terminal shows. silent_s: seconds since the sidecar answered, 0 while it does."""
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column()
        for name, value in self._rows(status, silent_s):
            grid.add_row(name, value)
        events = status.get("events", [])[-EVENTS_SHOWN:]
        lines = "\n".join(f"{event['age_s']:7.0f} s ago  {event['text']}" for event in reversed(events))
        engine = status.get("engine") or {}
        title = f"adaptive-spec  {engine.get('name', 'no engine')} {engine.get('model', '')} on {engine.get('gpu', '-')}"
        pids = f"engine {status.get('engine_pid') or '-'}, sidecar {status.get('sidecar_pid', '-')}"
        parts: list[RenderableType] = [grid, Text(), Text(lines, style="dim")] if events else [grid]
        subtitle = Text(f"{self.url}  pids: {pids}")
        return Panel(Group(*parts), title=Text(title), title_align="left", subtitle=subtitle, subtitle_align="left")

    def _rows(self, status: dict[str, Any], silent_s: float) -> list[tuple[str, RenderableType]]:
        mode = status["mode"]
        shown = f"no answer for {silent_s:.0f} s; it was {mode}" if silent_s else mode
        style = "bold red" if silent_s else _STYLES.get(mode, "bold")
        rows: list[tuple[str, RenderableType]] = [("mode", Text.assemble((shown, style), f"  {status.get('reason', '')}"))]
        sweep = status.get("sweep") or {"progress": 0.0, "steps": 0}
        if mode == "sweep":
            bar = Table.grid(padding=(0, 1))
            bar.add_row(ProgressBar(total=1.0, completed=sweep["progress"], width=40), f"{sweep['steps']} steps")
            rows.append(("sweep", bar))
        attached = "" if status.get("engine_attached") else "  (the engine is not attached)"
        last_k = status.get("last_k")
        rows.append(("now", f"K {'-' if last_k is None else last_k} at batch {status.get('batch_size') or '-'}{attached}"))
        rows.append(("goodput", Text.assemble(*goodput_trend(self._goodput))))
        rows.append(("K by batch size", k_strip(status.get("k_by_batch_size", {}))))
        boundaries = status.get("boundaries", [])
        rows.append(("verify latency", staircase(status.get("latency_points", []), boundaries)))
        rows.append(("tile boundaries", ", ".join(map(str, boundaries)) or "none yet"))
        verified, accepted = status.get("verified_tokens", []), status.get("accepted_tokens", [])
        rates = "  ".join(number(a / v if v else None, ".2f") for a, v in zip(accepted, verified, strict=False)) or "-"
        rows.append(("accepted / verified", f"{rates}  by draft position, since the start"))
        calibration, drift = status.get("calibration") or {}, status.get("drift_events") or {}
        quality = f"{calibration.get('kind', '-')}, ECE {number(calibration.get('ece'), '.3f')}"
        events = f"drift events {drift.get('latency', 0)} latency, {drift.get('calibration', 0)} calibration"
        rows.append(("calibration", f"{quality}, {events}"))
        gain, swaps = status.get("measured_gain"), sum((status.get("swaps") or {}).values())
        gained = "" if gain is None else f", {gain:+.1%} over the launch K"
        rows.append(("policy", f"version {status.get('policy_version', 0)}, {swaps} swaps{gained}"))
        return rows


def plain_line(status: dict[str, Any]) -> str:
    """Return the state of the sidecar in one line."""
    engine = status.get("engine") or {}
    boundaries = ", ".join(map(str, status.get("boundaries", []))) or "-"
    last_k = status.get("last_k")
    return (
        f"{status['mode']:8s} {engine.get('name', 'no engine')}  K {'-' if last_k is None else last_k}"
        f" at batch {status.get('batch_size') or '-'}  {number(status.get('goodput_tokens_per_s'), ',.0f')} tokens/s"
        f"  boundaries {boundaries}  policy {status.get('policy_version', 0)}"
        f"  K by batch {k_ranges(status.get('k_by_batch_size', {}))}"
    )


def goodput_trend(values: list[float]) -> tuple[tuple[str, str], str]:
    """Return the last values as blocks from 0 to their maximum, and the newest in words."""
    if not values:
        return ("", ""), "not measured yet"
    top = max(*values, 1e-9)
    blocks = "".join(BLOCKS[min(int(value / top * len(BLOCKS)), len(BLOCKS) - 1)] for value in values)
    return (blocks, "green"), f"  {values[-1]:,.0f} tokens/s"


def watch(client: ControlClient, console: Console, sleep: Callable[[float], None] = time.sleep) -> None:
    """Show a sidecar until a stop signal. Raises BadInput when none answers, and when it has gone for GONE_S seconds."""
    status = client.status()
    shown = Watch(client.url, console)
    answered_s = time.monotonic()
    with stop_signals() as stopping, Live(console=console, auto_refresh=False, transient=False) as live:
        while not stopping:
            now_s = time.monotonic()
            try:
                status = client.status()
                answered_s = now_s
                shown.seen(status)
            except BadInput:
                if now_s - answered_s > GONE_S:
                    raise
            if console.is_terminal:
                live.update(shown.view(status, now_s - answered_s), refresh=True)
            elif now_s == answered_s:
                shown.print_lines(status, now_s)
            while not stopping and time.monotonic() < now_s + UPDATE_S:
                sleep(LOOK_AT_SIGNALS_S)
