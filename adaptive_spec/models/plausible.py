"""Checks of numbers that are read from a profile or a checkpoint, before a model takes them over."""

from __future__ import annotations

from typing import Any

import numpy as np

from adaptive_spec.domain.arrays import Floats

LARGEST_WEIGHT = 1e15
"""Of a count, a weight or a sum: more samples than an engine writes in ten thousand years."""
LARGEST_COEFFICIENT = 1e6
"""Of a regression on logits."""


def plausible(name: str, values: Any, shape: tuple[int | None, ...], low: float, high: float) -> Floats:
    """Return the values as a new float64 array. shape: None: any length.

    Raises ValueError unless they have the shape and every one is a number in low..high.
    """
    array = np.array(values, dtype=np.float64)
    if array.ndim != len(shape) or any(want is not None and want != have for want, have in zip(shape, array.shape, strict=True)):
        wanted = ", ".join("any" if length is None else str(length) for length in shape)
        raise ValueError(f"{name} has shape {array.shape}, must be ({wanted})")
    wrong = array[~((array >= low) & (array <= high))]
    if wrong.size:
        raise ValueError(f"{name}: all values must be in {low:g}..{high:g}, got {wrong[0]:g}")
    return array


def labels_counted(name: str, values: Any, shape: tuple[int, ...]) -> tuple[Floats, Floats]:
    """Return (verified, accepted), each of this shape, from an array [2, *shape]. Raises ValueError, see `plausible`."""
    verified, accepted = plausible(name, values, (2, *shape), 0.0, LARGEST_WEIGHT)
    if (accepted > verified * (1.0 + 1e-6) + 1e-6).any():
        raise ValueError(f"{name}: no more can be accepted than were verified")
    return np.asarray(verified), np.asarray(accepted)


def by_position(values: Any, axis: int, length: int, filling: float) -> Floats:
    """Return an array whose `axis` has `length` draft positions: cut, or extended by `filling`."""
    array = np.array(values, dtype=np.float64)
    if array.ndim <= axis:
        raise ValueError(f"must have at least {axis + 1} dimensions, got {array.ndim}")
    array = np.take(array, range(min(length, array.shape[axis])), axis=axis)
    missing = [(0, 0)] * array.ndim
    missing[axis] = (0, length - array.shape[axis])
    return np.pad(array, missing, constant_values=filling)
