"""Ranks as threads of one process, in place of a group of processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Rank = TypeVar("Rank")


class ThreadGroup:
    """A group whose ranks are threads; a missing rank raises BrokenBarrierError after 20 s."""

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


def together(ranks: Sequence[Rank], call: Callable[[Rank], Any]) -> list[Any]:
    """Call `call(rank)` of all ranks at once, each in its thread; results in the order of the ranks. Fails on a deadlock."""
    results: list[Any] = [None] * len(ranks)

    def run(index: int) -> None:
        results[index] = call(ranks[index])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "deadlock"
    return results
