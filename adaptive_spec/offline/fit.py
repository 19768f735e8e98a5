"""`adaptive-spec fit`: fits both models to recorded samples and writes them with their plots."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adaptive_spec.errors import BadInput
from adaptive_spec.models.latency.staircase import LatencyFit
from adaptive_spec.offline.fit_pairs import CalibrationFit, fit_pairs
from adaptive_spec.offline.fit_samples import fit_samples
from adaptive_spec.offline.plots import PlotData, draw, empty_plot_data
from adaptive_spec.offline.samples import CalibrationPairs, LatencySamples, read_calibration, read_latency
from adaptive_spec.storage.archive import save_archive
from adaptive_spec.storage.profile import CALIBRATION, LATENCY_MODEL


@dataclass(frozen=True)
class FitResult:
    """The fitted models; None for a file that was not given."""

    latency: LatencyFit | None
    calibration: CalibrationFit | None

    def document(self) -> dict[str, Any]:
        """Return what `--json` prints; None for a file that was not given."""
        latency, calibration = self.latency, self.calibration
        segments = latency and [
            {
                "first": s.first,
                "last": s.last,
                "intercept_ms": 1e3 * s.intercept_s,
                "slope_ms_per_token": 1e3 * s.slope_s_per_token,
            }
            for s in latency.segments
        ]
        scores = calibration and {
            "kind": calibration.kind,
            "ece": calibration.ece,
            "brier": calibration.brier,
            "log_loss": calibration.log_loss,
            "samples": calibration.samples,
        }
        return {
            "boundaries": latency and [b.tokens for b in latency.boundaries],
            "segments": segments,
            "latency_mape": latency and latency.mape,
            "calibration": scores,
        }


def fit_files(latency: Path | None, calibration: Path | None, out: Path, jump_threshold: float) -> FitResult:
    """Read the CSV files, fit, then write models and plots to `out`. Raises BadInput.

    jump_threshold: relative jump in latency that makes a tile boundary.
    """
    samples = read_latency(latency) if latency else None
    pairs = read_calibration(calibration) if calibration else None
    result = FitResult(
        fit_samples(samples.num_tokens, samples.latency_s, jump_threshold) if samples else None,
        fit_pairs(pairs.cumulative_score, pairs.accepted.astype(np.bool_)) if pairs else None,
    )
    try:
        (out / "plots").mkdir(parents=True, exist_ok=True)
        if result.latency:
            save_archive(out / "latency_model.npz", LATENCY_MODEL, result.latency.state(), {"jump_threshold": jump_threshold})
        if result.calibration:
            save_archive(
                out / "calibration.npz", CALIBRATION, result.calibration.state(), {"calibration": result.calibration.kind}
            )
        draw(
            _plot_data(result, samples, pairs, (latency.name if latency else "", calibration.name if calibration else "")),
            out / "plots",
        )
    except OSError as error:
        raise BadInput(f"--out: {str(out)!r}: cannot be written: {error.strerror}") from error
    return result


def _plot_data(
    result: FitResult, samples: LatencySamples | None, pairs: CalibrationPairs | None, titles: tuple[str, str]
) -> PlotData:
    data = empty_plot_data(*titles)
    if samples and (fit := result.latency):
        data["samples"] = list(zip(samples.num_tokens.tolist(), (1e3 * samples.latency_s).tolist(), strict=True))
        medians = [float(np.median(samples.latency_s[samples.num_tokens == t])) * 1e3 for t in fit.tokens]
        data["medians"] = list(zip(fit.tokens.tolist(), medians, strict=True))
        data["segments"] = [(s.first, s.last, 1e3 * s.intercept_s, 1e3 * s.slope_s_per_token) for s in fit.segments]
        data["boundaries"] = [(b.tokens, b.jump_ratio) for b in fit.boundaries]
        data["token_counts"] = list(zip(fit.tokens.tolist(), fit.samples.tolist(), strict=True))
    if pairs and (calibration := result.calibration):
        grid = np.linspace(0.005, 1.0, 200)
        data["kind"], data["calibration"] = calibration.kind, calibration.curve
        data["curve"] = list(zip(grid.tolist(), calibration.predict(grid).tolist(), strict=True))
    return data
