"""The three plots of a profile: latency model, calibration, token distribution.

`python -m adaptive_spec.offline.plots DIR < DATA.json` draws them in a process of its own, so that the sidecar does not load
matplotlib. Drawing needs no display.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypedDict

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

BLUE, GREY, RED, INK = "#1f6fb4", "#9aa0a6", "#c62828", "#202124"
PLAIN = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}


class PlotData(TypedDict):
    """What to draw; lists may be empty.

    samples: (num_tokens, ms). medians: (num_tokens, ms). segments: (first, last, intercept_ms, slope_ms_per_token).
    boundaries: (tokens, jump ratio). token_counts: (num_tokens, samples). calibration: (bin centre, calibrated, observed,
    samples). curve: (score, probability). kind: of the calibration. title, calibration_title: engine or file.
    """

    title: str
    calibration_title: str
    samples: Sequence[tuple[int, float]]
    medians: Sequence[tuple[int, float]]
    segments: Sequence[tuple[int, int, float, float]]
    boundaries: Sequence[tuple[int, float]]
    token_counts: Sequence[tuple[int, float]]
    kind: str
    calibration: Sequence[tuple[float, float, float, int]]
    curve: Sequence[tuple[float, float]]


def empty_plot_data(title: str, calibration_title: str) -> PlotData:
    """Return data without anything to draw."""
    return PlotData(
        title=title,
        calibration_title=calibration_title,
        samples=[],
        medians=[],
        segments=[],
        boundaries=[],
        token_counts=[],
        kind="",
        calibration=[],
        curve=[],
    )


def draw(data: PlotData, folder: Path) -> list[Path]:
    """Draw each plot that has data as a PNG file in an existing folder; return their paths. Raises OSError."""
    drawn = []
    if data["medians"]:
        drawn.append(_save(folder / "latency_model.png", lambda axes: _latency(axes, data)))
        drawn.append(_save(folder / "token_distribution.png", lambda axes: _token_distribution(axes, data)))
    if data["calibration"]:
        drawn.append(_save(folder / "calibration.png", lambda axes: _calibration(axes, data)))
    return drawn


def _latency(axes: Axes, data: PlotData) -> None:
    if data["samples"]:
        tokens, milliseconds = _columns(data["samples"])
        axes.scatter(tokens, milliseconds, s=20, color=GREY, alpha=0.4, linewidths=0, label="samples", zorder=1)
    x, y = _columns(data["medians"])
    name = "median" if data["samples"] else "measured mean"
    axes.plot(x, y, color=BLUE, linewidth=1.3, marker="o", markersize=3.5 if len(x) < 80 else 2.2, label=name, zorder=3)
    for i, (first, last, intercept, slope) in enumerate(data["segments"]):
        ends = [first, last] if last > first else [first - 0.4, first + 0.4]
        level = [intercept + slope * t for t in ends]
        axes.plot(ends, level, color=INK, linestyle="--", linewidth=1.6, label=None if i else "fit by segment", zorder=4)
    low, high = min(y), max(y)
    axes.set_ylim(max(0.0, low - 0.12 * (high - low)), high + 0.16 * (high - low) + 1e-9)
    at = axes.get_xaxis_transform()
    span = max(x) - min(x) or 1
    for i, (boundary, ratio) in enumerate(data["boundaries"]):
        axes.axvline(boundary, color=RED, linestyle=":", linewidth=1.2, label=None if i else "tile boundary", zorder=2)
        # Neighbouring labels have different heights, so that those of close boundaries do not overlap.
        text = f"{boundary} (x{ratio:.2f})" if len(data["boundaries"]) <= 10 else str(boundary)
        axes.text(
            boundary + 0.006 * span, 0.985 - 0.04 * (i % 3), text, transform=at, color=RED, fontsize=7.5, va="top", bbox=PLAIN
        )
    axes.set_xlabel("tokens in the verify forward")
    axes.set_ylabel("latency (ms)")
    axes.set_title(f"Verify latency: {data['title']}")
    axes.legend(loc="lower right", frameon=False)


def _token_distribution(axes: Axes, data: PlotData) -> None:
    x, n = _columns(data["token_counts"])
    gaps = sorted(b - a for a, b in itertools.pairwise(x))
    axes.bar(x, n, width=0.85 * (gaps[len(gaps) // 2] if gaps else 1.0), color=BLUE, linewidth=0)
    axes.set_xlabel("tokens in the verify forward")
    axes.set_ylabel("samples" if data["samples"] else "samples, weighted by age")
    axes.set_title(f"Samples per token count: {data['title']}")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)


def _calibration(axes: Axes, data: PlotData) -> None:
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1.0, label="score = probability")
    centre, calibrated, observed, n = _columns(data["calibration"])
    largest = max(max(n), 1.0)
    size = [14 + 110 * (count / largest) ** 0.5 for count in n]
    axes.scatter(centre, observed, s=size, color=BLUE, alpha=0.75, linewidths=0, label="observed (area: samples)", zorder=3)
    x, p = _columns(data["curve"]) if data["curve"] else (centre, calibrated)
    axes.plot(x, p, color=INK, linewidth=1.6, label=f"calibrated ({data['kind']})", zorder=2)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_xlabel("cumulative draft score")
    axes.set_ylabel("probability of acceptance")
    axes.set_title(f"Acceptance calibration: {data['calibration_title']}")
    axes.legend(loc="upper left", frameon=False)


def _columns(rows: Sequence[tuple[float, ...]]) -> list[list[float]]:
    return [list(column) for column in zip(*rows, strict=True)]


def _save(path: Path, paint: Callable[[Axes], None]) -> Path:
    figure = Figure(figsize=(8.4, 4.8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(True, color="#e4e6e8", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    paint(axes)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)
    return path


if __name__ == "__main__":
    os.nice(10)
    draw(json.load(sys.stdin), Path(sys.argv[1]))
