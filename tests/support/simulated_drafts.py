"""Draft outcomes with a known relation between confidence and acceptance, for tests of the calibration."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from adaptive_spec.domain.step_record import StepRecord


def drafts(
    rng: np.random.Generator, rows: int, k: int, *, accept: float = 0.8, slope: float = 1.0, bias: float = 0.0
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Return confidences [rows, k] and how many of each row's drafts would be accepted if all were verified [rows].

    True acceptance q ~ Beta(4 accept, 4 (1 - accept)) each; confidence = sigmoid((logit q - bias) / slope).
    """
    q = np.clip(rng.beta(4 * accept, 4 * (1 - accept), (rows, k)), 1e-5, 1 - 1e-5)
    confidences = 1 / (1 + np.exp(-(np.log(q / (1 - q)) - bias) / slope))
    hits = np.cumprod(rng.random((rows, k)) < q, axis=1).sum(axis=1)
    return np.clip(confidences, 1e-6, 1.0).astype(np.float32), hits.astype(np.uint8)


def record_of(
    confidences: NDArray[np.float32], verify_len: NDArray[np.uint8], hits: NDArray[np.uint8], step: int = 0
) -> StepRecord:
    """A step in which those drafts were verified up to `verify_len`."""
    rows, k = confidences.shape
    tokens = int(verify_len.sum()) + rows
    accept_len = np.minimum(hits, verify_len).astype(np.uint8)
    ids = np.arange(rows, dtype=np.uint32)
    return StepRecord(
        step, 0, 100 * rows, 0, tokens, tokens, rows, k, 0, 0.001, 0.01, 0.0, 0.012, confidences, verify_len, accept_len, ids
    )  # fmt: skip


def full_record(rng: np.random.Generator, rows: int, k: int, **kind: float) -> StepRecord:
    """A step in which every drafted token was verified."""
    confidences, hits = drafts(rng, rows, k, **kind)
    return record_of(confidences, np.full(rows, k, dtype=np.uint8), hits)
