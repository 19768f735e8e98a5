"""Fits the staircase to recorded samples."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from adaptive_spec.domain.arrays import Floats
from adaptive_spec.models.latency.robust_mean import RobustMean
from adaptive_spec.models.latency.staircase import LatencyFit, fit_staircase


def fit_samples(num_tokens: NDArray[np.int64], latency_s: Floats, jump_threshold: float) -> LatencyFit:
    """Fit recorded samples offline, forgetting nothing: num_tokens [n] >= 1, latency_s [n] > 0, n >= 1.

    Of a token count with three samples or more, the median and a robust spread stand for the count, so that first replays
    and spikes do not move it; noise is the median spread over counts (2 % where nothing is repeated).
    """
    tokens, inverse = np.unique(num_tokens, return_inverse=True)
    rows = np.zeros((len(tokens), 7))
    spreads = []
    for i, token in enumerate(tokens):
        values = np.sort(latency_s[inverse == i])
        middle = float(np.median(values))
        spread = 1.4826 * float(np.median(np.abs(values - middle))) / middle
        if len(values) >= 3:
            spreads.append(spread)
        kept = np.clip(values, middle * (1 - 3 * max(spread, 0.01)), middle * (1 + 3 * max(spread, 0.01)))
        mean = RobustMean.from_weighted(np.zeros(len(kept)), kept, np.ones(len(kept)))
        rows[i] = (token, mean.weight, 0.0, mean.mean_y, len(values), 0.0, 0.0)
    sigma = float(np.clip(np.median(spreads), 0.002, 0.25)) if spreads else 0.02
    return fit_staircase(rows, sigma, 0.0, jump_threshold)
