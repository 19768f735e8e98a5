from __future__ import annotations

from adaptive_spec.engines.sglang.eagle_draft_policy import SidecarDraftPolicy


class Stock:
    """SGLang's own policy: K 7 only below 8 requests, 0 only from 8 on."""

    candidate_steps = (0, 1, 3, 7)

    def __init__(self) -> None:
        self.seen: list[list[int]] = []
        self.graph_rows: list[int] | None = None

    def set_cuda_graph_bs(self, cuda_graph_bs: list[int] | None) -> None:
        self.graph_rows = cuda_graph_bs

    def get_steps_for_batch(self, batch_size: int) -> int:
        return 1

    def on_verify_complete(self, num_correct_drafts_per_req: list[int], batch_size: int) -> int | None:
        self.seen.append(num_correct_drafts_per_req)
        return 3

    def cuda_graph_bs_for_step(self, step: int) -> list[int] | None:
        if self.graph_rows is None:
            return None
        return [rows for rows in self.graph_rows if (rows < 8 if step == 7 else rows >= 8 if step == 0 else True)]


def _policy(decided: list[int | None]) -> tuple[SidecarDraftPolicy, Stock]:
    stock = Stock()
    return SidecarDraftPolicy(stock, 3, lambda: decided[0]), stock


def test_decides_only_when_it_is_ours_to_say() -> None:
    decided: list[int | None] = [None]
    policy, stock = _policy(decided)
    assert policy.get_steps_for_batch(4) == 1
    assert policy.on_verify_complete([1, 2], 2) == 3
    assert stock.seen == [[1, 2]]
    decided[0] = 7
    assert policy.get_steps_for_batch(4) == 7
    assert policy.on_verify_complete([1, 2], 2) is None
    assert stock.seen == [[1, 2]]


def test_never_asks_for_a_state_that_was_not_captured() -> None:
    decided: list[int | None] = [-1]
    policy, _ = _policy(decided)
    for wanted in (-1, 2, 5, 99):
        decided[0] = wanted
        assert policy.get_steps_for_batch(4) == 3, "K at launch"


def test_candidates_of_a_batch_are_those_with_a_graph() -> None:
    policy, _ = _policy([0])
    assert policy.allowed(1) == policy.allowed(100) == (0, 1, 3, 7), "no graphs, no limits"
    policy.set_cuda_graph_bs([1, 2, 4, 8, 16])
    assert policy.cuda_graph_bs_for_step(7) == [1, 2, 4]
    assert policy.allowed(3) == (1, 3, 7)
    assert policy.allowed(5) == (0, 1, 3), "padded to 8"
    assert policy.allowed(17) == (0, 1, 3, 7), "beyond all graphs everything runs without one"
    assert [policy.padded_rows(b) for b in (1, 3, 5, 16, 17)] == [1, 4, 8, 16, 17]
    assert [policy.nearest(3, k) for k in (0, 1, 2, 3, 6, 7)] == [1, 1, 1, 3, 3, 7]
    assert [policy.nearest(5, k) for k in (0, 2, 7)] == [0, 1, 3]
