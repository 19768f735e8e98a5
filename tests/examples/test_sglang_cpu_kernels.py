"""The CPU kernel stand-in of examples/sglang-cpu against the plainest form of the same arithmetic."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

STAND_IN = Path(__file__).parents[2] / "examples" / "sglang-cpu" / "kernel_stand_in"
HEADS, KV_HEADS, DIM, SLOTS = 4, 2, 8, 64


@pytest.fixture(scope="module")
def kernels() -> Iterator[ModuleType]:
    sys.path.insert(0, str(STAND_IN))
    yield importlib.import_module("sgl_kernel")
    sys.path.remove(str(STAND_IN))
    for name in [name for name in sys.modules if name.split(".")[0] == "sgl_kernel"]:
        del sys.modules[name]


class Paged:
    """A KV cache in which the tokens of some requests lie scattered."""

    def __init__(self, lengths: list[int]) -> None:
        torch.manual_seed(0)
        self.lengths = torch.tensor(lengths)
        self.keys, self.values = torch.randn(SLOTS, KV_HEADS, DIM), torch.randn(SLOTS, KV_HEADS, DIM)
        self.req_to_token = torch.randperm(SLOTS)[: len(lengths) * 12].view(len(lengths), 12)
        self.pool = torch.arange(len(lengths))

    def plain(self, q: Tensor, row: int, visible: Tensor) -> Tensor:
        """One query [heads, dim] of a request over the tokens where `visible` [12] holds."""
        slots = self.req_to_token[row][visible]
        keys = self.keys[slots].repeat_interleave(HEADS // KV_HEADS, dim=1)
        values = self.values[slots].repeat_interleave(HEADS // KV_HEADS, dim=1)
        weights = torch.einsum("hd,lhd->hl", q, keys).mul(0.3).softmax(-1)
        return torch.einsum("hl,lhd->hd", weights, values)


def _extend(
    kernels: ModuleType, cache: Paged, new: list[int], tree_mask: Tensor | None, window: int = 0
) -> tuple[Tensor, Tensor]:
    q = torch.randn(sum(new), HEADS, DIM)
    out = torch.empty_like(q)
    lengths = torch.tensor(new)
    kernels.extend_attention_cpu(
        q, None, None, out, cache.keys, cache.values, 1.0, 1.0, cache.req_to_token, cache.pool, cache.lengths, lengths,
        lengths.cumsum(0) - lengths, max(new), 0.3, 0.0, False, window, tree_mask=tree_mask,
    )  # fmt: skip
    return q, out


@pytest.mark.parametrize("new", [[3, 3, 3], [1, 4, 2]])
@pytest.mark.parametrize("window", [0, 2])
def test_extend_is_causal(kernels: ModuleType, new: list[int], window: int) -> None:
    cache = Paged([5, 9, 12])
    q, out = _extend(kernels, cache, new, None, window)
    at = 0
    for row, t in enumerate(new):
        for i in range(t):
            own = int(cache.lengths[row]) - t + i
            position = torch.arange(12)
            visible = (position <= own) & ((position > own - window) if window else True)
            torch.testing.assert_close(out[at + i], cache.plain(q[at + i], row, visible))
        at += t


def test_extend_follows_the_tree(kernels: ModuleType) -> None:
    cache = Paged([5, 9])
    tree = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool)
    q, out = _extend(kernels, cache, [3, 3], torch.cat([tree.flatten(), tree.flatten()]))
    for row in range(2):
        end = int(cache.lengths[row])
        for i in range(3):
            visible = torch.zeros(12, dtype=torch.bool)
            visible[: end - 3] = True
            visible[end - 3 : end] = tree[i]
            torch.testing.assert_close(out[3 * row + i], cache.plain(q[3 * row + i], row, visible))


def test_decode_stores_and_attends(kernels: ModuleType) -> None:
    cache = Paged([4, 7])
    q, k, v = torch.randn(2, HEADS, DIM), torch.randn(2, KV_HEADS, DIM), torch.randn(2, KV_HEADS, DIM)
    places = cache.req_to_token[torch.arange(2), cache.lengths - 1]
    out = torch.empty_like(q)
    kernels.decode_attention_cpu(
        q, cache.keys, cache.values, 1.0, 1.0, out, k, v, places, None, cache.req_to_token, cache.pool, cache.lengths,
        0.3, 0.0, False, 0,
    )  # fmt: skip
    assert torch.equal(cache.keys[places], k)
    for row in range(2):
        torch.testing.assert_close(out[row], cache.plain(q[row], row, torch.arange(12) < cache.lengths[row]))


def _chain(kernels: ModuleType, rows: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    mask = torch.empty(rows * n * n, dtype=torch.bool)
    positions = torch.empty(rows * n, dtype=torch.long)
    index, child, sibling = (torch.empty(rows, n, dtype=torch.long) for _ in range(3))
    kernels.build_tree_kernel_efficient_cpu(
        None, None, torch.tensor([10, 20])[:rows], mask, positions, index, child, sibling, 1, n - 1, n, 1
    )
    assert positions.tolist() == [10, 11, 12, 20, 21, 22]
    assert mask.view(rows, n, n)[0].tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    return index, child, sibling


def test_chain_is_accepted_up_to_its_first_error(kernels: ModuleType) -> None:
    index, child, sibling = _chain(kernels, 2, 3)
    candidates = torch.tensor([[5, 6, 7], [5, 9, 7]])
    target = torch.tensor([[6, 7, 8], [6, 7, 8]])  # what the target says behind each of them
    predicts, accepted = torch.full((6,), -1), torch.empty(2, dtype=torch.long)
    accept_index = torch.full((2, 3), -1)
    kernels.verify_tree_greedy_cpu(predicts, accept_index, accepted, candidates, index, child, sibling, target)
    assert accepted.tolist() == [2, 0]
    assert accept_index.tolist() == [[0, 1, 2], [3, -1, -1]]
    assert predicts.tolist() == [6, 7, 8, 6, -1, -1]


def test_tree_tries_the_sibling(kernels: ModuleType) -> None:
    mask, positions = torch.empty(9, dtype=torch.bool), torch.empty(3, dtype=torch.long)
    index, child, sibling = (torch.empty(1, 3, dtype=torch.long) for _ in range(3))
    # Two candidates for the first position, both children of the root.
    kernels.build_tree_kernel_efficient_cpu(
        torch.tensor([[-1, 0]]), torch.tensor([[0, 1]]), torch.tensor([10]), mask, positions, index, child, sibling, 2, 1, 3, 1
    )
    assert positions.tolist() == [10, 11, 11]
    assert mask.view(3, 3).tolist() == [[True, False, False], [True, True, False], [True, False, True]]
    predicts, accepted, accept_index = torch.full((3,), -1), torch.empty(1, dtype=torch.long), torch.full((1, 2), -1)
    kernels.verify_tree_greedy_cpu(
        predicts, accept_index, accepted, torch.tensor([[5, 6, 7]]), index, child, sibling, torch.tensor([[7, 1, 2]])
    )
    assert accepted.tolist() == [1]
    assert accept_index.tolist() == [[0, 2]]


def test_slots(kernels: ModuleType) -> None:
    table, slots = torch.zeros(3, 8, dtype=torch.int32), torch.tensor([11, 12, 13, 14, 15])
    kernels.assign_req_to_token_pool_cpu(torch.tensor([0, 2]), table, torch.tensor([1, 4]), torch.tensor([3, 7]), slots, 8)
    assert table[0].tolist() == [0, 11, 12, 0, 0, 0, 0, 0]
    assert table[2].tolist() == [0, 0, 0, 0, 13, 14, 15, 0]
    again = torch.zeros(5, dtype=torch.long)
    kernels.assign_extend_cache_locs_cpu(torch.tensor([0, 2]), table, torch.tensor([1, 4]), torch.tensor([3, 7]), again, 8)
    assert again.tolist() == slots.tolist()
    bonus = torch.zeros(2, dtype=torch.long)
    kernels.fill_bonus_tokens_cpu(torch.tensor([1, 2, 3, 4, 5, 6]), torch.tensor([2, 3]), bonus, 3)
    assert bonus.tolist() == [2, 6]
    layers = [torch.arange(12, dtype=torch.float32).view(6, 2) for _ in range(2)]
    pointers, strides = torch.tensor([layer.data_ptr() for layer in layers]), torch.tensor([8, 8])
    kernels.copy_all_layer_kv_cache_cpu(pointers, strides, torch.tensor([0, 1]), torch.tensor([1, 4]))
    assert layers[0][:2].tolist() == [[2, 3], [8, 9]], "as if copied at once, not one after another"


def test_what_is_not_served_says_so(kernels: ModuleType) -> None:
    with pytest.raises(NotImplementedError, match="multi-layer"):
        kernels.rotate_input_ids_cpu()
