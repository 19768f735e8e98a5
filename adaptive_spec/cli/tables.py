"""Tables that the commands print on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

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
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table


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
