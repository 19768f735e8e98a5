"""SGLang's own adaptive policy as far as the plugin touches it: slots by batch size, routed through graph padding."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from types import SimpleNamespace

DEFAULT = {1: [1, 3, 5, 7], 8: [0, 1, 3], 32: [0, 1], 64: [0]}
"""SGLang's default configuration: K from a batch size on."""
GAPS = {1: [2, 4], 10: [0], 20: [1, 6]}


class Slots:
    """Each slot: its K (candidate_steps), what it would run (current_steps), and the counts it was given (seen)."""

    def __init__(self, configuration: dict[int, list[int]]) -> None:
        self.slots = {
            size: SimpleNamespace(candidate_steps=ks, current_steps=ks[len(ks) // 2], seen=[])
            for size, ks in configuration.items()
        }
        self.graph_rows: list[int] | None = None
        self.fails = False

    @property
    def candidate_steps(self) -> list[int]:
        return sorted({k for slot in self.slots.values() for k in slot.candidate_steps})

    def set_cuda_graph_bs(self, cuda_graph_bs: list[int] | None) -> None:
        self.graph_rows = sorted(cuda_graph_bs) if cuda_graph_bs else None

    def cuda_graph_bs_for_step(self, step: int) -> list[int] | None:
        if self.graph_rows is None:
            return None
        return [rows for rows in self.graph_rows if step in self._slot(rows).candidate_steps]

    def get_steps_for_batch(self, batch_size: int) -> int:
        return int(self._route(batch_size).current_steps)

    def on_verify_complete(self, num_correct_drafts_per_req: list[int], batch_size: int) -> int | None:
        if self.fails:
            raise RuntimeError("a policy that raises")
        self._route(batch_size).seen.append(num_correct_drafts_per_req)
        return None

    def _route(self, batch_size: int) -> SimpleNamespace:
        at = bisect_left(self.graph_rows or [], batch_size)
        return self._slot(self.graph_rows[at] if self.graph_rows and at < len(self.graph_rows) else batch_size)

    def _slot(self, rows: int) -> SimpleNamespace:
        sizes = sorted(self.slots)
        return self.slots[sizes[max(bisect_right(sizes, rows) - 1, 0)]]
