"""The sidecar's policy behind SGLang's public protocol `AdaptiveSpecPolicy`, by which its AdaptiveController asks for K."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Any


class SidecarDraftPolicy:
    """Replaces SGLang's own policy. Never returns a K whose state was not captured.

        K = what was decided for the step just begun     while the plugin decides
          = K at launch                                  when the plugin is active but detached or failing
          = what SGLang's own policy says                otherwise (shadow, or not attached)

    stock: SGLang's own policy; it knows candidates and graph sizes, and learns while its K is used. launch_k: K at launch.
    decided: returns K of the step just begun, -1 for the launch K, None where SGLang's own policy decides.
    """

    def __init__(self, stock: Any, launch_k: int, decided: Callable[[], int | None]) -> None:
        self._stock, self._launch_k, self._decided = stock, launch_k, decided
        self._graph_rows: list[int] | None = None
        self._allowed: dict[int, tuple[int, ...]] = {}
        self.captured: tuple[int, ...] = tuple(sorted({*stock.candidate_steps, launch_k}))
        """K that have a captured state, ascending; the launch K always has."""

    @property
    def candidate_steps(self) -> list[int]:
        return list(self._stock.candidate_steps)

    def set_cuda_graph_bs(self, cuda_graph_bs: list[int] | None) -> None:
        self._stock.set_cuda_graph_bs(cuda_graph_bs)
        self._graph_rows = sorted(cuda_graph_bs) if cuda_graph_bs else None

    def cuda_graph_bs_for_step(self, step: int) -> list[int] | None:
        steps: list[int] | None = self._stock.cuda_graph_bs_for_step(step)
        return steps

    def get_steps_for_batch(self, batch_size: int) -> int:
        decided = self._decided()
        if decided is None:
            return int(self._stock.get_steps_for_batch(batch_size))
        return decided if decided in self.captured else self._launch_k

    def on_verify_complete(self, num_correct_drafts_per_req: list[int], batch_size: int) -> int | None:
        if self._decided() is not None:
            return None  # the next step is decided when it begins
        step: int | None = self._stock.on_verify_complete(num_correct_drafts_per_req, batch_size)
        return step

    def padded_rows(self, batch_size: int) -> int:
        """Requests after padding to the next graph size; a batch beyond all graphs runs as it is."""
        rows = self._graph_rows
        at = bisect_left(rows, batch_size) if rows else 0
        return rows[at] if rows and at < len(rows) else batch_size

    def allowed(self, batch_size: int) -> tuple[int, ...]:
        """K whose graphs were captured for this batch size, ascending; all captured K where no graphs are used.

        The configuration captures a K only for the batch sizes it lists it for; elsewhere it would run without a graph.
        """
        rows = self._graph_rows
        padded = self.padded_rows(batch_size)
        if rows is None or padded > rows[-1]:
            return self.captured
        found = self._allowed.get(padded)
        if found is None:
            found = tuple(k for k in self.captured if k == self._launch_k or padded in (self.cuda_graph_bs_for_step(k) or ()))
            self._allowed[padded] = found
        return found

    def nearest(self, batch_size: int, k: int) -> int:
        """The largest allowed K not above k, else the smallest allowed one."""
        allowed = self.allowed(batch_size)
        at = bisect_left(allowed, k + 1)
        return allowed[at - 1] if at else allowed[0]
