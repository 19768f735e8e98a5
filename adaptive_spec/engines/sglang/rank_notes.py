"""What ranks tell rank 0, through the key-value store of torch.distributed, by a thread of their own: no step waits for it.

    terms/RANK      checksum of the rank's settings, 0 if it cannot steer; stated once, after ANSWER is 0
    answer/RANK     serial of the last offer it answered, negative if it cannot follow
    failed          why some rank cannot go on

A store that cannot be reached is tried again every second; rank 0 gives up by its own timeouts (`ranks.Steering`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from datetime import timedelta
from queue import Empty, SimpleQueue
from typing import Any

from adaptive_spec.engines.sglang.ranks import View

READ_S, READ_WAITING_S = 0.25, 0.01
"""Seconds between rank 0's reads, and while it waits for answers."""
CALL_S = 5.0
"""Longest call of the store, seconds: it blocks the thread only."""
RETRY_S = 1.0

log = logging.getLogger("sglang.adaptive_spec")


def default_store(prefix: str) -> Any:
    """A connection of one's own to the store of the default process group."""
    import torch.distributed

    distributed: Any = torch.distributed
    store = distributed.distributed_c10d._get_default_store().clone()
    store.set_timeout(timedelta(seconds=CALL_S))
    return distributed.PrefixStore(prefix, store)


class StoreNotes:
    """A `ranks.Notes`. open_store: connects; called by the thread. terms: this rank's."""

    def __init__(self, open_store: Callable[[], Any], rank: int, ranks: int, terms: int) -> None:
        self._open, self._rank, self._ranks = open_store, rank, ranks
        self._queue: SimpleQueue[tuple[str, str]] = SimpleQueue()
        self._ended = threading.Event()
        self._warned = False
        self.waiting = False
        self._view = View((None,) * ranks)
        self._queue.put((f"answer/{rank}", "0"))
        self._queue.put((f"terms/{rank}", str(terms)))
        threading.Thread(target=self._run, name="adaptive-spec-ranks", daemon=True).start()

    @property
    def view(self) -> View:
        return self._view

    def answer(self, number: int) -> None:
        self._queue.put((f"answer/{self._rank}", str(number)))

    def fail(self, reason: str) -> None:
        self._queue.put(("failed", reason[:500]))

    def end(self) -> None:
        self._ended.set()
        self._queue.put(("", ""))

    def _run(self) -> None:
        store, unsent = None, None
        while not self._ended.is_set():
            try:
                store = store if store is not None else self._open()
                unsent = unsent or self._next()
                if unsent is not None and unsent[0]:
                    store.set(*unsent)
                unsent = None
                if self._rank == 0:
                    self._view = self._read(store)
            except Exception as error:
                if not self._warned:
                    log.warning("adaptive-spec: the ranks' store: %s: %s", type(error).__name__, error)
                    self._warned = True
                store = None
                self._ended.wait(RETRY_S)

    def _next(self) -> tuple[str, str] | None:
        """What to write next; on rank 0 None when it is time to read."""
        try:
            return self._queue.get(timeout=(READ_WAITING_S if self.waiting else READ_S) if self._rank == 0 else None)
        except Empty:
            return None

    def _read(self, store: Any) -> View:
        ranks, terms = range(self._ranks), self._view.terms
        if None in terms:
            terms = tuple(int(store.get(f"terms/{rank}")) if store.check([f"terms/{rank}"]) else None for rank in ranks)
        answers = self._view.answers
        if None not in terms and (self.waiting or not answers):
            answers = tuple(int(store.get(f"answer/{rank}")) for rank in ranks[1:])
        failed = store.get("failed").decode() if store.check(["failed"]) else ""
        return View(terms, answers, failed)
