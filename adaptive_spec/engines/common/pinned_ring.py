"""Copies of draft confidences from a device to the host that nothing waits for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from adaptive_spec.engines.common.steps_in_flight import MOST_OPEN, Confidences


class PinnedRing:
    """Pinned host memory for asynchronous copies of confidences: slots used in turn, one more than steps in flight.

    allocate: makes a [rows, columns] host tensor; new_event: an event with record() and query().
    """

    def __init__(self, max_batch: int, max_k: int, allocate: Callable[[int, int], Tensor], new_event: Callable[[], Any]) -> None:
        self._slots = [(allocate(max_batch, max(max_k, 1)), new_event()) for _ in range(MOST_OPEN + 2)]
        self._next = 0

    def send(self, values: Tensor) -> Confidences:
        """Start copying values [b, k].

        One contiguous float32 copy into the head of the slot: between devices PyTorch copies anything else through pageable
        memory, and such a copy waits for the device.
        """
        memory, event = self._slots[self._next]
        self._next = (self._next + 1) % len(self._slots)
        target = memory.view(-1)[: values.numel()].view(values.shape)
        target.copy_(values.float().contiguous(), non_blocking=True)
        event.record()
        return _OnTheWay(target, event)


class _OnTheWay:
    """A started copy. Its values are copied out at the first `ready`, before the slot is used again."""

    def __init__(self, memory: Tensor, event: Any) -> None:
        self._memory, self._event = memory, event
        self._values: NDArray[np.float32] | None = None

    def ready(self) -> NDArray[np.float32] | None:
        if self._values is None and self._event.query():
            self._values = self._memory.numpy().copy()
        return self._values
