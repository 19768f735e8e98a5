"""SidecarDraftPolicy: who chooses K, which K a batch size allows, and what SGLang's own policy is told meanwhile."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from adaptive_spec.engines.sglang.eagle_draft_policy import LAUNCH, SidecarDraftPolicy
from tests.engines.sglang.slots import DEFAULT, GAPS, Slots


class Stock:
    """A policy with nothing but the protocol, of which a later version has more arguments and a method."""

    candidate_steps = (0, 1, 3, 7)

    def __init__(self) -> None:
        self.seen: list[tuple[list[int], int, tuple[Any, ...]]] = []
        self.activated: list[int] = []

    def set_cuda_graph_bs(self, cuda_graph_bs: list[int] | None) -> None: ...

    def get_steps_for_batch(self, batch_size: int) -> int:
        return 1

    def on_verify_complete(self, num_correct_drafts_per_req: list[int], batch_size: int, *more: Any) -> int | None:
        self.seen.append((num_correct_drafts_per_req, batch_size, more))
        return 3

    def cuda_graph_bs_for_step(self, step: int) -> list[int] | None:
        return None

    def on_state_activated(self, steps: int) -> None:
        self.activated.append(steps)


def _policy(stock: Any, decided: int | None = None, launch_k: int = 3) -> tuple[SidecarDraftPolicy, list[int | None]]:
    said = [decided]
    return SidecarDraftPolicy(stock, launch_k, lambda: said[0]), said


def test_sglangs_policy_decides_where_ours_does_not() -> None:
    policy, decided = _policy(Stock())
    assert policy.get_steps_for_batch(4) == 1
    assert policy.on_verify_complete([1, 2, 0, 0], 4) == 3
    decided[0] = 7
    assert policy.get_steps_for_batch(4) == 7
    assert policy.on_verify_complete([1, 2, 0, 0], 4) is None
    decided[0] = LAUNCH
    assert policy.get_steps_for_batch(4) == 3


def test_a_k_that_is_not_allowed_is_never_returned() -> None:
    policy, decided = _policy(Slots(DEFAULT))
    policy.set_cuda_graph_bs(None)
    for wanted in (2, 5, 99, 7):
        decided[0] = wanted
        assert policy.get_steps_for_batch(16) == 3, "the launch K"
    assert policy.get_steps_for_batch(4) == 7


@pytest.mark.parametrize("graphs", [None, [1, 2, 4, 8, 16, 32, 64]])
def test_the_default_configuration(graphs: list[int] | None) -> None:
    policy, _ = _policy(Slots(DEFAULT))
    policy.set_cuda_graph_bs(graphs)
    assert policy.allowed(1) == policy.allowed(4) == (1, 3, 5, 7)
    assert policy.allowed(8) == policy.allowed(16) == (0, 1, 3)
    assert policy.allowed(32) == (0, 1, 3), "3 is the launch K"
    assert policy.allowed(64) == policy.allowed(200) == (0, 3)
    padded = graphs is not None
    assert policy.allowed(5) == ((0, 1, 3) if padded else (1, 3, 5, 7)), "padded to 8"
    assert policy.allowed_from(16) == ((1, (1, 3, 5, 7)), (5 if padded else 8, (0, 1, 3)))
    assert [size for size, _ in policy.allowed_from(128)] == ([1, 5, 33] if padded else [1, 8, 64])
    assert [policy.nearest(16, k) for k in (0, 1, 2, 5, 7)] == [0, 1, 1, 3, 3]
    assert [policy.nearest(2, k) for k in (0, 1, 2, 6)] == [1, 1, 1, 5], "0 is not allowed here"
    assert policy.cuda_graph_bs_for_step(7) == (graphs and [1, 2, 4]), "asking left the graph sizes as SGLang set them"


def test_a_configuration_with_gaps_and_states_that_were_not_captured() -> None:
    policy, _ = _policy(Slots(GAPS), launch_k=2)
    policy.set_cuda_graph_bs([4, 12, 24])
    assert [policy.padded_rows(b) for b in (1, 4, 5, 24, 25)] == [4, 4, 12, 24, 25]
    assert [policy.allowed(b) for b in (1, 5, 24, 25)] == [(2, 4), (0, 2), (1, 2, 6), (1, 2, 6)]
    policy.captured = (0, 1, 2, 4)
    assert policy.allowed(24) == (1, 2)
    assert policy.captured == (0, 1, 2, 4)


def test_one_set_for_all_batch_sizes_is_no_limit() -> None:
    policy, _ = _policy(Slots({1: [0, 1, 3, 5]}))
    policy.set_cuda_graph_bs(None)
    assert policy.allowed_from(16) == ()
    unknown, _ = _policy(Stock())
    unknown.set_cuda_graph_bs([1, 2])
    assert unknown.allowed(2) == (0, 1, 3, 7), "a policy that tells nothing limits nothing"


def test_unknown_methods_and_arguments_reach_sglangs_policy() -> None:
    stock = Stock()
    policy, _ = _policy(stock)
    policy.on_state_activated(5)
    assert stock.activated == [5]
    policy.get_steps_for_batch(2)
    assert policy.on_verify_complete([1, 1], 2, "more") == 3
    assert stock.seen == [([1, 1], 2, ("more",))]
    with pytest.raises(AttributeError, match="no_such_thing"):
        policy.no_such_thing  # noqa: B018  # the attribute is what is asked for


def _fed(k: int, counts: list[int], launch_k: int = 3) -> SimpleNamespace:
    """Slot of batch size 2 of the default configuration after one step of ours with K = k."""
    stock = Slots(DEFAULT)
    policy, _ = _policy(stock, k, launch_k)
    policy.set_cuda_graph_bs(None)
    assert policy.get_steps_for_batch(len(counts)) == k
    assert policy.on_verify_complete(counts, len(counts)) is None
    return stock.slots[1]


def test_sglangs_policy_is_fed_with_the_k_that_ran() -> None:
    slot = _fed(7, [6, 7])
    assert (slot.current_steps, slot.seen) == (7, [[6, 7]])
    slot = _fed(1, [1, 0])
    assert (slot.current_steps, slot.seen) == (1, [[1, 0]])


def test_a_k_that_is_not_its_own_counts_as_its_next_smaller_one() -> None:
    """With K = 4, as many are accepted within 3 as with K = 3."""
    slot = _fed(4, [4, 2], launch_k=4)
    assert (slot.current_steps, slot.seen) == (3, [[3, 2]])
    assert _fed(0, [0, 0], launch_k=0).seen == [], "all its own are longer: nothing is said about them"


def test_each_result_is_taken_with_the_k_of_its_own_step() -> None:
    """The overlap scheduler: the result of a step comes after the next one has begun, and a step may have no result."""
    stock = Slots(DEFAULT)
    policy, decided = _policy(stock, 7)
    policy.set_cuda_graph_bs(None)
    policy.get_steps_for_batch(2)
    decided[0] = 1
    policy.get_steps_for_batch(3)
    policy.on_verify_complete([7, 7], 2)
    assert stock.slots[1].current_steps == 7
    decided[0] = 5
    policy.get_steps_for_batch(1)  # the result of the step of 3 never comes
    policy.on_verify_complete([5], 1)
    assert stock.slots[1].current_steps == 5
    assert stock.slots[1].seen == [[7, 7], [5]]


def test_a_failure_of_sglangs_policy_on_our_steps_is_counted() -> None:
    stock = Slots(DEFAULT)
    policy, decided = _policy(stock, 3)
    policy.set_cuda_graph_bs(None)
    stock.fails = True
    policy.get_steps_for_batch(2)
    assert policy.on_verify_complete([1, 1], 2) is None
    assert policy.teach_failures == 1
    decided[0] = None
    policy.get_steps_for_batch(2)
    with pytest.raises(RuntimeError):
        policy.on_verify_complete([1, 1], 2)
