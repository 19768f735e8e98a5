"""The inference form of the byte models: packed ragged forward, for the target in arithmetic that is exact where order matters.

Speculative decoding is lossless only if a token's logits are the same bits whichever rows share the forward with it. So
in `ExactModel` every sum over more than two terms is a sum of integers that its type holds exactly:

- linear layers: `linear.py`.
- RMSNorm (Zhang and Sennrich, 2019, arXiv:1910.07467) is the factor sqrt(width) / |q| of the quantised row; its weight is
  folded into the next linear, and its epsilon (1e-5 against a mean square near 1) is left out.
- attention: q, k and v are rounded to multiples of 1/128, exponentials to 2^-15 of the largest and softmax weights to
  2^-13, all held as integers in float32. Every partial sum stays below 2^24 while |q| |k| < 1024 (Euclidean norms; below
  300 in the shipped target), |v| < 16 (below 8) and the context is at most 511.

What is left is elementwise. Latency then is a staircase in the number of packed rows, plus a part linear in context.
The draft's arithmetic cannot change what is output, so `FloatModel` runs the same weights in plain float32.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from adaptive_spec.engines.embedded.kv_cache import KVCache, PackedRows
from adaptive_spec.engines.embedded.linear import IntegerLinear, RowBuffer, qnnpack_available
from adaptive_spec.engines.embedded.shape import VOCABULARY, ModelShape

GRID = 128.0
EXPONENTIAL_BITS = 15
WEIGHT_BITS = 13
MAX_EXACT_CONTEXT = (1 << (24 - EXPONENTIAL_BITS)) - 1

Weights = Mapping[str, Tensor]
Linear = TypeVar("Linear")


@dataclass(frozen=True)
class _Block(Generic[Linear]):
    qkv: Linear
    attention_out: Linear
    gate_up: Linear
    down: Linear


class ByteModel(ABC, Generic[Linear]):
    """A byte model ready to decode: tokens of any requests in, logits out. Llama-style, see `network.py`.

    weights: tensors as `weights.py` stores them. max_rows: most rows of one forward. max_context: largest position + 1.
    """

    grid: float
    """Queries, keys and values are held in units of 1 / grid."""
    weight_unit: float
    """Softmax weights are held in units of this."""

    def __init__(self, shape: ModelShape, weights: Weights, max_rows: int, max_context: int, device: str) -> None:
        self.shape, self.max_rows, self.max_context, self.device = shape, max_rows, max_context, torch.device(device)
        norm = math.sqrt(shape.width)
        self._embedding = weights["embedding"].float().to(self.device)
        self._blocks: list[_Block[Linear]] = []
        for i in range(shape.layers):
            name = f"blocks.{i}."
            self._blocks.append(_Block(
                qkv=self._linear(weights, name + "qkv", norm * self.grid, _paired(shape)),
                attention_out=self._linear(weights, name + "attention_out", self.weight_unit / self.grid),
                gate_up=self._linear(weights, name + "gate_up", norm),
                down=self._linear(weights, name + "down", 1.0),
            ))  # fmt: skip
        self._head = self._linear(weights, "head", norm)
        half = shape.head_width // 2
        frequency = shape.rope_base ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.outer(torch.arange(max_context, dtype=torch.float64), frequency)
        self._rotation = torch.polar(torch.ones_like(angle), angle).to(torch.complex64)[:, None].to(self.device)

    def _linear(self, weights: Weights, name: str, factor: float, order: Tensor | None = None) -> Linear:
        weight, scale = weights[name + ".weight"], weights[name + ".scale"] * factor
        return self._make(weight, scale) if order is None else self._make(weight[order], scale[order])

    def new_cache(self, slots: int) -> KVCache:
        return KVCache(self.shape, slots, self.max_context, self.device)

    @torch.inference_mode()
    def forward(
        self, cache: KVCache, tokens: Tensor, at: PackedRows, wanted: Tensor | None = None, dense: bool = False
    ) -> Tensor:
        """Process tokens int64 [n] at the places `at`, write their keys and values, return logits float32 [n or wanted, 256].

        wanted: int64 rows whose logits are needed, None for all. dense: take the float32 kernel (the same bits, quicker
        for long prefills).
        """
        s = self.shape
        x = F.embedding(tokens, self._embedding)
        rotation = self._rotation.index_select(0, at.positions)
        groups = s.heads // s.kv_heads
        bias = at.bias.expand(-1, s.kv_heads, groups, -1, -1).reshape(at.requests * s.kv_heads, groups * at.width, at.context)
        for layer, block in enumerate(self._blocks):
            qkv = self._normed(block.qkv, x, dense)
            turned = qkv[:, : s.width + s.kv_width].view(at.rows, s.heads + s.kv_heads, s.head_width // 2, 2)
            torch.view_as_complex(turned).mul_(rotation)
            self._add(block.attention_out, self._attend(cache, layer, qkv, at, bias), x, dense)
            gate, up = self._normed(block.gate_up, x, dense).chunk(2, dim=-1)
            self._add(block.down, F.silu(gate).mul_(up), x, dense)
        if wanted is None:
            return self._normed(self._head, x, dense)
        return self._normed(self._head, x[wanted], dense) if len(wanted) else x.new_empty(0, VOCABULARY)

    @abstractmethod
    def _make(self, weight: Tensor, scale: Tensor) -> Linear:
        """Prepare a linear of int8 [out, in] and float32 [out]."""

    @abstractmethod
    def _normed(self, linear: Linear, x: Tensor, dense: bool) -> Tensor:
        """Return linear(RMSNorm(x)); sqrt(width) is in the linear's scale."""

    @abstractmethod
    def _add(self, linear: Linear, h: Tensor, x: Tensor, dense: bool) -> None:
        """Add linear(h) to x in place."""

    @abstractmethod
    def _mix(self, q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """Return softmax(q @ keys.T / sqrt(head_width) + bias) @ values, in units of weight_unit / grid.

        q: [b, n, head_width]. keys, values: [b, context, head_width]. bias: [b, n, context]. b counts requests and key heads.
        """

    def _attend(self, cache: KVCache, layer: int, qkv: Tensor, at: PackedRows, bias: Tensor) -> Tensor:
        """Grouped-query attention of qkv [n, width + 2 * kv_width] -> [n, width] in units of weight_unit / grid."""
        s = self.shape
        if self.grid != 1.0:
            qkv.round_()
        cache.write(layer, at.cache_rows, qkv[:, s.width :].reshape(-1, s.head_width))
        keys, values = cache.read(layer, at.first_slot, at.requests, at.context)
        q = qkv[:, : s.width]
        if at.grid_rows is not None:
            q = torch.zeros(at.requests * at.width, s.width, dtype=q.dtype, device=q.device).index_copy_(0, at.grid_rows, q)
        if at.width > 1:
            q = q.view(at.requests, at.width, s.heads, s.head_width).transpose(1, 2)
        mixed = self._mix(q.reshape(bias.shape[0], bias.shape[1], s.head_width), keys, values, bias)
        if at.width > 1:
            mixed = mixed.view(at.requests, s.heads, at.width, s.head_width).transpose(1, 2)
        mixed = mixed.reshape(-1, s.width)
        return mixed if at.grid_rows is None else mixed[at.grid_rows]


class ExactModel(ByteModel[IntegerLinear]):
    """The target: a row's logits are the same bits alone and in any batch.

    kernel: "auto" takes qnnpack where the build has it and the device is the CPU, "dense" never does (the same bits).
    """

    grid = GRID
    weight_unit = 2.0**-WEIGHT_BITS

    def __init__(
        self, shape: ModelShape, weights: Weights, max_rows: int = 192, max_context: int = 320, device: str = "cpu",
        kernel: str = "auto",
    ) -> None:  # fmt: skip
        if max_context > MAX_EXACT_CONTEXT:
            raise ValueError(f"max_context: must be in 1..{MAX_EXACT_CONTEXT} for exact sums, got {max_context}")
        self.qnnpack = kernel == "auto" and device == "cpu" and qnnpack_available()
        super().__init__(shape, weights, max_rows, max_context, device)
        widths = {shape.width, shape.hidden}
        self._buffers = {width: RowBuffer(width, max_rows, self.qnnpack, self.device) for width in widths}
        self._score_scale = 1.0 / (GRID * GRID * math.sqrt(shape.head_width))
        self._exponential_bits = torch.tensor(EXPONENTIAL_BITS * math.log(2.0), device=self.device)
        self._one = torch.tensor(2.0**WEIGHT_BITS, device=self.device)

    def _make(self, weight: Tensor, scale: Tensor) -> IntegerLinear:
        return IntegerLinear(weight, scale, self.device, self.qnnpack)

    def _normed(self, linear: IntegerLinear, x: Tensor, dense: bool) -> Tensor:
        rows, q, _ = self._buffers[linear.width].quantise(x)
        return linear(rows, dense).div_(torch.linalg.vector_norm(q, 2, -1, keepdim=True))

    def _add(self, linear: IntegerLinear, h: Tensor, x: Tensor, dense: bool) -> None:
        rows, _, step = self._buffers[linear.width].quantise(h)
        x.addcmul_(linear(rows, dense), step)

    def _mix(self, q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        scores = torch.add(bias, torch.bmm(q, keys.transpose(1, 2)), alpha=self._score_scale)
        top = scores.amax(-1, keepdim=True).sub_(self._exponential_bits)
        weights = scores.sub_(top).exp_().round_()
        weights.mul_(self._one / weights.sum(-1, keepdim=True)).round_()
        return torch.bmm(weights, values)


class FloatModel(ByteModel[Tensor]):
    """The draft: the shipped weights in plain float32."""

    grid = 1.0
    weight_unit = 1.0

    def __init__(
        self, shape: ModelShape, weights: Weights, max_rows: int = 192, max_context: int = 320, device: str = "cpu"
    ) -> None:
        super().__init__(shape, weights, max_rows, max_context, device)
        self._score_scale = 1.0 / math.sqrt(shape.head_width)

    def _make(self, weight: Tensor, scale: Tensor) -> Tensor:
        return (weight * scale[:, None]).to(self.device).t()

    def _normed(self, linear: Tensor, x: Tensor, dense: bool) -> Tensor:
        return torch.mm(x, linear).div_(torch.linalg.vector_norm(x, 2, -1, keepdim=True))

    def _add(self, linear: Tensor, h: Tensor, x: Tensor, dense: bool) -> None:
        x.addmm_(h, linear)

    def _mix(self, q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        scores = torch.baddbmm(bias, q, keys.transpose(1, 2), alpha=self._score_scale)
        return torch.bmm(scores.softmax(-1), values)


def _paired(shape: ModelShape) -> Tensor:
    """Order of the qkv outputs that puts the two halves of a rotated pair side by side (value heads stay as they are)."""
    half = shape.head_width // 2
    pairs = torch.stack((torch.arange(half), torch.arange(half) + half), dim=1).reshape(-1)
    heads = torch.arange(shape.heads + shape.kv_heads)[:, None] * shape.head_width + pairs
    return torch.cat((heads.reshape(-1), torch.arange(shape.width + shape.kv_width, shape.width + 2 * shape.kv_width)))
