"""Tables that the commands print on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from adaptive_spec.cli.doctor import Finding
    from adaptive_spec.offline.fit import FitResult

_STATES = {"ok": ("✓", "green"), "note": ("-", "yellow"), "broken": ("✗", "bold red")}


def fit_tables(result: FitResult) -> Iterator[Table]:
    """Yield the tables of an offline fit: segments with tile boundaries, then calibration."""
    if (latency := result.latency) is not None:
        title = f"Latency: {len(latency.tokens)} token counts, mean relative error {latency.mape:.1%}"
        table = Table("tokens", "latency", "jump after it", title=title, title_justify="left")
        jumps = {b.tokens: b.jump_ratio for b in latency.boundaries}
        for s in latency.segments:
            jump = f"x {jumps[s.last]:.2f}  tile boundary" if s.last in jumps else ""
            table.add_row(
                f"{s.first}-{s.last}", f"{1e3 * s.intercept_s:.3f} ms + {1e6 * s.slope_s_per_token:.2f} µs per token", jump
            )
        yield table
    if (calibration := result.calibration) is not None:
        table = Table("calibration", "samples", "ECE", "Brier score", "log loss", title="Acceptance", title_justify="left")
        scores = (calibration.ece, calibration.brier, calibration.log_loss)
        table.add_row(calibration.kind, f"{calibration.samples:,}", *(f"{score:.4f}" for score in scores))
        yield table


def k_ranges(k_by_batch_size: dict[str, int]) -> str:
    """Return K by batch size in short: {"1": 4, "2": 4, "3": 2} as "1-2: 4, 3: 2"."""
    runs: list[list[int]] = []
    for batch, k in sorted((int(b), k) for b, k in k_by_batch_size.items()):
        if runs and runs[-1][2] == k and runs[-1][1] == batch - 1:
            runs[-1][1] = batch
        else:
            runs.append([batch, batch, k])
    return ", ".join(f"{first}{f'-{last}' if last > first else ''}: {k}" for first, last, k in runs) or "none yet"


def status_table(document: dict[str, Any]) -> Table:
    """Return the main values of /status.json."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    engine = document.get("engine") or {}
    calibration = document.get("calibration") or {}
    engine_text = (
        f"{engine.get('name')} {engine.get('model')} on {engine.get('gpu')}, pid {document.get('engine_pid')}"
        if engine
        else "none"
    )
    rows = {
        "mode": f"{document['mode']} ({document['reason']})",
        "engine": engine_text + ("" if document.get("engine_attached") else " (not attached)"),
        "policy": f"version {document['policy_version']}",
        "K by batch size": k_ranges(document["k_by_batch_size"]),
        "tile boundaries": ", ".join(map(str, document["boundaries"])) or "none",
        "calibration": f"{calibration.get('kind', 'none')}, ECE {number(calibration.get('ece'), '.3f')}",
        "goodput": f"{number(document.get('goodput_tokens_per_s'), ',.0f')} tokens/s",
        "sidecar": f"pid {document['sidecar_pid']}, {document['version']}",
    }
    if server := document.get("server_reported"):
        rows["server's own numbers"] = _server_words(server)
    if ranks := document.get("dp_ranks"):
        rows["shown above"] = f"data-parallel rank {next(iter(ranks))}, of {len(ranks)}"
    for rank, one in (ranks or {}).items():
        gone = "" if one["engine_attached"] else ", not attached"
        speed = f"{number(one['goodput_tokens_per_s'], ',.0f')} tokens/s"
        rows[f"dp_rank {rank}"] = f"{one['mode']}{gone}, K {k_ranges(one['k_by_batch_size'])}, {speed}"
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table


def _server_words(server: dict[str, Any]) -> str:
    """The server's own numbers on one line; why there are none."""
    if server["failure"]:
        return f"none: {server['url']}: {server['failure']}"
    return (
        f"{number(server['tokens_per_s'], ',.0f')} tokens/s, {number(server['running_requests'], '.0f')} requests, "
        f"accept length {number(server['accept_length'], '.2f')}, accept rate {number(server['accept_rate'], '.2f')}, "
        f"{server['age_s']:.0f} s ago"
    )


def explain_tables(document: dict[str, Any]) -> Iterator[RenderableType]:
    """Yield why a batch size has its K: a line, and a row for every K that the engine runs there."""
    k, before = document["k"], document["k_before"]
    change = f"K {k}" if k == before else f"K {before} -> {k}"
    switch = "not measured yet" if document["k_switch_ms"] is None else f"{document['k_switch_ms']:.3g} ms"
    yield Text(
        f"batch size {document['batch_size']}: {change}, decided {document['decided_age_s']:.1f} s ago for "
        f"{document['kv_tokens_per_request']:,.0f} KV tokens per request; a change of K costs {switch}"
    )
    if document["note"]:
        yield Text(document["note"], style="yellow")
    stages = list(dict.fromkeys(name for plan in document["plans"] for name in plan["stage_ms"]))
    table = Table(box=None, pad_edge=False)
    for heading in (
        "K",
        "tokens",
        *(f"{name} ms" for name in stages),
        "step ms",
        "tokens/s",
        "± 1 s.e.",
        "K changes",
        "gain",
        "hurdle",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("decided by")
    for plan in document["plans"]:
        gain = "" if plan["gain"] is None else f"{plan['gain']:+.1%}"
        table.add_row(
            str(plan["k"]), f"{plan['expected_tokens']:.2f}", *(f"{plan['stage_ms'][name]:.3f}" for name in stages),
            f"{plan['step_ms']:.3f}", f"{plan['goodput_tokens_per_s']:,.1f}", f"{plan['goodput_error_tokens_per_s']:,.1f}",
            f"{-plan['k_switches_tokens_per_s']:,.1f}", gain, f"{plan['hurdle']:.1%}", plan["verdict"],
            style="bold green" if plan["k"] == k else None,
        )  # fmt: skip
    yield table
    yield Text(
        "All figures are forecasts of the models at that decision. gain: over the K before, after the cost of changes of K.",
        style="dim",
    )


def number(value: float | None, form: str) -> str:
    """Format a number, or return "-" when it is unknown."""
    return "-" if value is None else format(value, form)


def findings_table(findings: Sequence[Finding]) -> Table:
    """Return the findings of `doctor`."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for finding in findings:
        mark, style = _STATES[finding.state]
        table.add_row(Text(mark, style=style), finding.subject, Text(finding.text))
    return table
