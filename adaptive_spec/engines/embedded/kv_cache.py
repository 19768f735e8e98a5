"""The KV cache of the embedded engine, and the positions of a packed forward's rows in it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from adaptive_spec.domain.arrays import Ints
from adaptive_spec.engines.embedded.shape import ModelShape

CONTEXT_BLOCK = 32
"""Contexts are padded to a multiple of this, so that vectorised elementwise kernels have no scalar remainder."""


class KVCache:
    """Keys and values of `slots` requests, one float32 tensor per layer.

    A layer is [2, slots, kv_heads, max_context, head_width], kept flat so that one scatter writes keys and values. Raises
    ValueError when max_context is not a multiple of CONTEXT_BLOCK.
    """

    def __init__(self, shape: ModelShape, slots: int, max_context: int, device: torch.device) -> None:
        if max_context % CONTEXT_BLOCK:
            raise ValueError(f"max_context: must be a multiple of {CONTEXT_BLOCK}, got {max_context}")
        self.shape, self.slots, self.max_context, self.device = shape, slots, max_context, device
        rows = 2 * slots * shape.kv_heads * max_context
        self._flat = [torch.zeros(rows, shape.head_width, device=device) for _ in range(shape.layers)]
        pair = np.arange(2)[:, None] * (slots * shape.kv_heads) + np.arange(shape.kv_heads)
        self._head_rows = pair.reshape(-1) * max_context
        # Row p: the mask of a token at position p. A look-up costs a third of building the mask.
        self._bias = torch.full((max_context, max_context), -torch.inf, device=device).triu(1)

    def rows_of(self, slots: Ints, positions: Ints) -> Ints:
        """Flat row of every (token, key or value, head): [n * 2 * kv_heads]."""
        base = slots * (self.shape.kv_heads * self.max_context) + positions
        return (base[:, None] + self._head_rows).reshape(-1)

    def bias_of(self, positions: Tensor, context: int) -> Tensor:
        """0 up to each position and -inf after it: [n, context]."""
        return self._bias.index_select(0, positions)[:, :context]

    def write(self, layer: int, rows: Tensor, keys_and_values: Tensor) -> None:
        """Write [n * 2 * kv_heads, head_width] to the rows `rows_of` gave."""
        self._flat[layer].index_copy_(0, rows, keys_and_values)

    def read(self, layer: int, first_slot: int, slots: int, context: int) -> tuple[Tensor, Tensor]:
        """Keys and values [slots * kv_heads, context, head_width] of consecutive slots, as views."""
        s, flat = self.shape, self._flat[layer]
        head = self.max_context * s.head_width
        size, stride = (slots * s.kv_heads, context, s.head_width), (head, s.head_width, 1)
        first = first_slot * s.kv_heads * head
        return flat.as_strided(size, stride, first), flat.as_strided(size, stride, first + self.slots * s.kv_heads * head)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot to another."""
        for layer in range(self.shape.layers):
            self._slot(layer, target, length).copy_(self._slot(layer, source, length))

    def save(self, slot: int, length: int) -> Tensor:
        """The first `length` positions: [layers, 2, kv_heads, length, head_width]."""
        return torch.stack([self._slot(layer, slot, length) for layer in range(self.shape.layers)])

    def restore(self, slot: int, saved: Tensor) -> None:
        """Write what `save` returned into a slot."""
        for layer in range(self.shape.layers):
            self._slot(layer, slot, saved.shape[3]).copy_(saved[layer])

    def _slot(self, layer: int, slot: int, length: int) -> Tensor:
        s = self.shape
        return self._flat[layer].view(2, self.slots, s.kv_heads, self.max_context, s.head_width)[:, slot, :, :length]


@dataclass(frozen=True)
class PackedRows:
    """The slot and position of each row of one forward. Rows of a request are consecutive, requests in slot order.

    first_slot .. first_slot + requests - 1: slots covered. width: most rows of one request. last: largest position.
    context: last + 1, padded. positions: int64 [rows]. cache_rows: see `KVCache.rows_of`. grid_rows: int64 [rows], row of
    each in a dense [requests, width] grid; None when the rows fill it in order. bias: float32 [requests, 1, 1, width, context],
    0 where a key may be seen, -inf where not.
    """

    rows: int
    first_slot: int
    requests: int
    width: int
    last: int
    context: int
    positions: Tensor
    cache_rows: Tensor
    grid_rows: Tensor | None
    bias: Tensor

    @classmethod
    def of(cls, cache: KVCache, slots: Ints, positions: Ints) -> PackedRows:
        """Lay out n rows; slots must not decrease, and positions must increase within a slot."""
        n, first = len(slots), int(slots[0])
        requests = int(slots[-1]) - first + 1
        local = slots - first
        counts = np.bincount(local, minlength=requests)
        width = int(counts.max())
        last = int(positions.max())
        context = _padded(last)
        places = torch.from_numpy(positions).to(cache.device)
        grid, grid_rows = places, None
        if n != requests * width:
            within = np.arange(n) - np.repeat(np.cumsum(counts) - counts, counts)
            index = local * width + within
            grid_rows = torch.from_numpy(index).to(cache.device)
            grid = torch.zeros(requests * width, dtype=torch.int64, device=cache.device).index_copy_(0, grid_rows, places)
        return cls(
            n, first, requests, width, last, context,
            places,
            torch.from_numpy(cache.rows_of(slots, positions)).to(cache.device),
            grid_rows,
            cache.bias_of(grid, context).view(requests, 1, 1, width, context),
        )  # fmt: skip

    def following(self, cache: KVCache) -> PackedRows:
        """The next position of every row, for one row per request; a fifth of the time `of` takes."""
        if self.rows != self.requests:
            raise ValueError(f"{self.rows} rows of {self.requests} requests have no single next position")
        context, positions = _padded(self.last + 1), self.positions + 1
        return replace(
            self, last=self.last + 1, context=context, positions=positions, cache_rows=self.cache_rows + 1,
            bias=cache.bias_of(positions, context).view(self.requests, 1, 1, 1, context),
        )  # fmt: skip


def _padded(last: int) -> int:
    return (last // CONTEXT_BLOCK + 1) * CONTEXT_BLOCK
