"""`max_probability` of the logits of several forwards, on the CPU: where logits are few, calls cost more than the work."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adaptive_spec.engines.common.max_probability import GROUP_ELEMENTS, max_probability

FEW_ELEMENTS = 1 << 16
"""Logits up to which numpy is used on a CPU. PyTorch's operators wait for its threads where others keep the cores busy: for 5
positions of 8 rows of 832 logits 3.2 ms with two threads, 0.16 ms with one, 0.15 ms by numpy; at 1 row 0.13 and 0.11 ms."""


def each_max_probability(logits: list[Tensor]) -> NDArray[np.float32]:
    """Logits of k forwards, [b, V] each, on the CPU -> float32 [b, k]."""
    few = few_max_probabilities(logits)
    if few is not None:
        return few.reshape(len(logits), -1).T
    if len(logits) * logits[0].numel() <= GROUP_ELEMENTS:  # fewer calls; beyond, the copy costs more
        return max_probability(torch.stack(logits, dim=1)).numpy()
    return torch.stack([max_probability(one) for one in logits], dim=1).numpy()


def few_max_probabilities(logits: list[Tensor]) -> NDArray[np.float32] | None:
    """`max_probability` of k forwards on the CPU, [b, V] each -> float32 [k b].

    None where it does not do: for more than FEW_ELEMENTS logits, for another type than float32, and when a row has no softmax.
    """
    if len(logits) * logits[0].numel() > FEW_ELEMENTS or logits[0].dtype != torch.float32:
        return None
    values = np.concatenate([one.numpy() for one in logits])
    largest = np.maximum.reduce(values, axis=-1, keepdims=True)
    if not np.isfinite(largest).all():
        return None
    np.exp(np.subtract(values, largest, out=values), out=values)
    found: NDArray[np.float32] = np.reciprocal(np.add.reduce(values, axis=-1))
    return found
