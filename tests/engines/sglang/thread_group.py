"""Ranks as threads of one process, in place of a group of processes."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray


class ThreadGroup:
    """A group whose ranks are threads; a rank that does not come is a deadlock, seen after some seconds."""

    def __init__(self, ranks: int) -> None:
        self._barrier = threading.Barrier(ranks, timeout=20)
        self._given: list[Any] = [None] * ranks

    def member(self, rank: int) -> Member:
        return Member(self, rank)

    def exchange(self, rank: int, mine: Any) -> list[Any]:
        self._given[rank] = mine
        self._barrier.wait()
        found = list(self._given)
        self._barrier.wait()
        return found


class Member:
    """What one rank sees of the group: a `ranks.Group`."""

    def __init__(self, group: ThreadGroup, rank: int) -> None:
        self._group, self._rank = group, rank

    def total(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.asarray(sum(self._group.exchange(self._rank, numbers.copy())))

    def from_first(self, data: bytes | None, size: int) -> bytes:
        found: bytes = self._group.exchange(self._rank, data)[0]
        assert len(found) == size
        return found
