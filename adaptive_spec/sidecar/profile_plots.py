"""Draws the plots of a profile in a short-lived process, so that matplotlib is never loaded into the sidecar."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from adaptive_spec.control.snapshot import Snapshot

if TYPE_CHECKING:  # plots imports matplotlib, which the sidecar must not load
    from adaptive_spec.offline.plots import PlotData


def start_plots(folder: Path, snapshot: Snapshot) -> subprocess.Popen[bytes] | None:
    """Start a process that draws the plots of the profile in `folder`; the caller waits for it. None: it cannot be started."""
    try:
        with tempfile.TemporaryFile() as data:
            data.write(json.dumps(_plot_data(snapshot, folder.name)).encode())
            data.seek(0)
            return subprocess.Popen(
                [sys.executable, "-m", "adaptive_spec.offline.plots", str(folder / "plots")],
                stdin=data, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
    except OSError:
        return None


def _plot_data(snapshot: Snapshot, title: str) -> PlotData:
    curve = snapshot.calibration_curve
    return {
        "title": title,
        "calibration_title": title,
        "samples": [],
        "medians": [(tokens, 1e3 * mean_s) for tokens, mean_s, _ in snapshot.latency_points],
        "segments": [(s.first, s.last, 1e3 * s.intercept_s, 1e3 * s.slope_s_per_token) for s in snapshot.segments],
        "boundaries": [(b.tokens, b.jump_ratio) for b in snapshot.boundaries],
        "token_counts": [(tokens, weight) for tokens, _, weight in snapshot.latency_points],
        "kind": snapshot.calibration_kind,
        "calibration": curve,
        "curve": [],
    }
