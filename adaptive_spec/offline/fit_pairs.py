"""Fits a calibration to recorded (cumulative score, accepted) pairs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from adaptive_spec.domain.arrays import Bools, Floats
from adaptive_spec.domain.step_record import StepRecord
from adaptive_spec.domain.survival import SurvivalMap
from adaptive_spec.models.acceptance.calibration_maps import GRID_SCORE
from adaptive_spec.models.acceptance.online import AcceptanceModel


@dataclass(frozen=True)
class CalibrationFit:
    """A calibration of (cumulative score, accepted) pairs.

    kind: "logistic" also for the map called "chain" elsewhere, which is a logistic curve when there is one position. ece, brier,
    log_loss: prequential (each pair is predicted before it is learnt). samples: pairs. curve: (bin centre, calibrated, observed,
    samples) by bin. map: the fitted calibration.
    """

    kind: str
    ece: float
    brier: float
    log_loss: float
    samples: int
    curve: tuple[tuple[float, float, float, int], ...]
    map: SurvivalMap

    def predict(self, scores: Floats) -> Floats:
        """Cumulative scores [n] in (0, 1] -> P(accept) [n]."""
        return self.map.survival(np.asarray(scores, dtype=np.float64)[:, None])[:, 0]

    def state(self) -> dict[str, Floats]:
        """Arrays of `calibration.npz`."""
        return {
            "score": GRID_SCORE,
            "probability": self.map.table[0].astype(np.float64),
            "curve": np.array(self.curve, dtype=np.float64).reshape(-1, 4),
            "quality": np.array([self.ece, self.brier, self.log_loss, float(self.samples)]),
        }


def fit_pairs(cumulative_score: Floats, accepted: Bools) -> CalibrationFit:
    """Calibrate recorded pairs: cumulative_score [n >= 1] in (0, 1], accepted [n]. All pairs weigh the same.

    The pairs are shuffled (fixed seed); each of 20 chunks is predicted before it is learnt. The map is then fitted to all.
    """
    model = AcceptanceModel(1, np.inf)
    order = np.random.default_rng(0).permutation(len(accepted))
    for chunk in np.array_split(order, min(20, len(order))):
        row = cumulative_score[chunk].astype(np.float32)[:, None]
        ones = np.ones(len(chunk), dtype=np.uint8)
        ids = np.zeros(len(chunk), dtype=np.uint32)
        model.observe(StepRecord(0, 0, 0, 0, 2 * len(chunk), 2 * len(chunk), len(chunk), 1, 0, 0.0, 1.0, 0.0, 1.0,
                                 row, ones, accepted[chunk].astype(np.uint8), ids))  # fmt: skip
        model.learn()
        model.refit()
    quality = model.reliability
    return CalibrationFit(
        kind="logistic" if model.kind == "chain" else model.kind,
        ece=quality.ece or 0.0,
        brier=quality.brier or 0.0,
        log_loss=quality.log_loss or 0.0,
        samples=model.samples,
        curve=quality.curve(),
        map=model.survival,
    )
