"""The sidecar's policy behind SGLang's public protocol `AdaptiveSpecPolicy`, by which its AdaptiveController asks for K."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from adaptive_spec.engines.common.steps_in_flight import MOST_OPEN
from adaptive_spec.wire.slot import MAX_BATCH_LIMIT

LAUNCH = -1
"""Decided: the launch K."""


class _Asked(NamedTuple):
    """K of one step. stock: SGLang's own policy decided it."""

    batch_size: int
    k: int
    stock: bool


class SidecarDraftPolicy:
    """Replaces SGLang's own policy. Never returns a K whose state was not captured.

        K = what was decided for the step just begun     while a policy of the sidecar acts
          = K at launch                                  where `decided` says LAUNCH
          = what SGLang's own policy says                otherwise: shadow, no policy that acts, detached

    SGLang's own policy sees the counts of every step, also of those whose K it did not choose (`_teach`), so that it can decide
    at once when no policy of the sidecar acts. Everything here follows from calls that SGLang makes on every rank alike, so
    SGLang's own policies stay equal on all ranks, even if hooks fail on one of them.

    stock: SGLang's own policy. launch_k: K at launch. decided: returns K of the step just begun, LAUNCH, or None where SGLang's
    own policy decides; never raises. What the protocol does not name is passed on to `stock`.
    """

    def __init__(self, stock: Any, launch_k: int, decided: Callable[[], int | None]) -> None:
        self._stock, self._launch_k, self._decided = stock, launch_k, decided
        self._graph_rows: list[int] | None = None
        self._rows_of: dict[int, frozenset[int]] = {}
        """Batch sizes that the configuration lists each K for; empty where the own policy does not tell."""
        self._allowed: dict[int, tuple[int, ...]] = {}
        self._asked: deque[_Asked] = deque(maxlen=MOST_OPEN)
        """Steps whose results have not come, oldest first."""
        self._captured: tuple[int, ...] = tuple(sorted({*stock.candidate_steps, launch_k}))
        self.teach_failures = 0
        """Times SGLang's own policy raised on the counts of a step that it did not decide."""

    def __getattr__(self, name: str) -> Any:
        """What only SGLang's own policy has: methods that a later protocol adds."""
        if name == "_stock":  # not set yet: an object that copy or pickle is making
            raise AttributeError(name)
        return getattr(self._stock, name)

    # -- the protocol --------------------------------------------------------------------------------------------------

    @property
    def candidate_steps(self) -> list[int]:
        return list(self._stock.candidate_steps)

    def set_cuda_graph_bs(self, cuda_graph_bs: list[int] | None, *args: Any, **kwargs: Any) -> None:
        """Also learns for which batch sizes the configuration lists each K: SGLang's own policy tells for graph sizes, so every
        batch size is set as one for a moment.
        """
        self._graph_rows = sorted(cuda_graph_bs) if cuda_graph_bs else None
        self._allowed.clear()
        largest = max(MAX_BATCH_LIMIT, *(self._graph_rows or (1,)))
        try:
            self._stock.set_cuda_graph_bs(list(range(1, largest + 1)))
            listed = {k: self._stock.cuda_graph_bs_for_step(k) for k in self._stock.candidate_steps}
            self._rows_of = {} if None in listed.values() else {k: frozenset(rows) for k, rows in listed.items()}
        finally:
            self._stock.set_cuda_graph_bs(cuda_graph_bs, *args, **kwargs)

    def cuda_graph_bs_for_step(self, step: int, *args: Any, **kwargs: Any) -> list[int] | None:
        steps: list[int] | None = self._stock.cuda_graph_bs_for_step(step, *args, **kwargs)
        return steps

    def get_steps_for_batch(self, batch_size: int, *args: Any, **kwargs: Any) -> int:
        decided = self._decided()
        if decided is None:
            k = int(self._stock.get_steps_for_batch(batch_size, *args, **kwargs))
        else:
            k = decided if decided in self.allowed(batch_size) else self._launch_k
        self._asked.append(_Asked(batch_size, k, decided is None))
        return k

    def on_verify_complete(
        self, num_correct_drafts_per_req: list[int], batch_size: int = 0, *args: Any, **kwargs: Any
    ) -> int | None:
        asked = self._step_of_result(batch_size)
        if asked is not None and not asked.stock:
            try:
                self._teach(num_correct_drafts_per_req, batch_size, asked.k, args, kwargs)
            except Exception:
                self.teach_failures += 1
            return None  # the next step is decided when it begins
        step: int | None = self._stock.on_verify_complete(num_correct_drafts_per_req, batch_size, *args, **kwargs)
        return step if self._decided() is None else None

    # -- what can run --------------------------------------------------------------------------------------------------

    @property
    def captured(self) -> tuple[int, ...]:
        """K that have a captured state, ascending; the launch K always has."""
        return self._captured

    @captured.setter
    def captured(self, captured: Iterable[int]) -> None:
        self._captured = tuple(sorted({*captured, self._launch_k}))
        self._allowed.clear()

    def padded_rows(self, batch_size: int) -> int:
        """Requests after padding to the next graph size; a batch beyond all graphs runs as it is."""
        rows = self._graph_rows
        at = bisect_left(rows, batch_size) if rows else 0
        return rows[at] if rows and at < len(rows) else batch_size

    def allowed(self, batch_size: int) -> tuple[int, ...]:
        """K for a batch size, ascending: those that the configuration lists for it after padding, and the launch K.

        With graphs, another K would run without one. Without graphs it could run, but is not in the server's configuration.
        """
        padded = self.padded_rows(batch_size)
        found = self._allowed.get(padded)
        if found is None:
            listed = self._rows_of
            found = tuple(k for k in self._captured if k == self._launch_k or not listed or padded in listed.get(k, ()))
            self._allowed[padded] = found
        return found

    def allowed_from(self, max_batch: int) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """`EngineInfo.allowed_from` for batch sizes 1..max_batch; () where every captured K is allowed throughout."""
        found: list[tuple[int, tuple[int, ...]]] = []
        for batch_size in range(1, max_batch + 1):
            allowed = self.allowed(batch_size)
            if not found or found[-1][1] != allowed:
                found.append((batch_size, allowed))
        return () if all(allowed == self._captured for _, allowed in found) else tuple(found)

    def nearest(self, batch_size: int, k: int) -> int:
        """The largest allowed K not above k, else the smallest allowed one."""
        allowed = self.allowed(batch_size)
        at = bisect_left(allowed, k + 1)
        return allowed[at - 1] if at else allowed[0]

    # -- SGLang's own policy meanwhile ---------------------------------------------------------------------------------

    def _step_of_result(self, batch_size: int) -> _Asked | None:
        """The step whose result comes now: results come in the order of their steps. None if it is not known."""
        at = next((i for i, asked in enumerate(self._asked) if asked.batch_size == batch_size), None)
        if at is None:
            return None
        for _ in range(at):
            self._asked.popleft()
        return self._asked.popleft()

    def _teach(self, counts: list[int], batch_size: int, k: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Let SGLang's own policy learn from a step that ran K = k.

        It assumes that its current K ran. So that is set to the largest of its candidates not above k, and counts are cut to
        it: exactly what would have been counted had that K run. Its answer, a next K, is not used.
        """
        route = getattr(self._stock, "_route", None)
        if route is not None:
            slot = route(batch_size)
            told = max((c for c in slot.candidate_steps if c <= k), default=None)
            if told is None:
                return  # every K of its own is longer: a shorter draft says nothing about it
            slot.current_steps = told
            counts = [min(count, told) for count in counts]
        self._stock.on_verify_complete(counts, batch_size, *args, **kwargs)
