"""Decoder layers with the shapes of real models and random weights: their verify forward takes the time of the real one.

Only times are of interest. A row is a token to verify; eight rows share a request and its KV cache, as with K = 7.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

ROWS_PER_REQUEST = 8


@dataclass(frozen=True)
class Shape:
    """layers: all of the model; the others are sizes of one tensor-parallel rank. source: where they are published."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    source: str


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama-3-8b", 32, 4096, 32, 8, 128, 14336, 128256, "config.json of Meta-Llama-3-8B"),
        Shape("qwen3-8b", 36, 4096, 32, 8, 128, 12288, 151936, "config.json of Qwen3-8B"),
        Shape("llama-2-70b-tp4", 80, 8192, 16, 2, 128, 7168, 8000, "config.json of Llama-2-70b, a quarter of each layer"),
    )
}


def narrowed(shape: Shape, factor: int) -> Shape:
    """The shape with every width divided by `factor`, for a device that is too slow for the whole one."""
    if factor == 1:
        return shape
    return replace(
        shape, name=f"{shape.name} at 1/{factor} of its width", hidden=shape.hidden // factor,
        heads=max(shape.heads // factor, 1), kv_heads=max(shape.kv_heads // factor, 1),
        intermediate=shape.intermediate // factor, vocabulary=shape.vocabulary // factor,
    )  # fmt: skip


class Forward:
    """The forward of some layers and the output head over 1..most rows. layers: how many of the shape's are computed."""

    def __init__(self, shape: Shape, layers: int, most: int, context: int, device: torch.device) -> None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        random = torch.Generator(device).manual_seed(0)

        def weights(*size: int) -> Tensor:
            drawn: Tensor = torch.randn(size, dtype=dtype, device=device, generator=random)
            return drawn.div_(size[-1] ** 0.5)

        self.shape, self.layers, self.device = shape, layers, device
        queries, keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
        self._layers = [
            (
                weights(queries + 2 * keys, shape.hidden), weights(shape.hidden, queries),
                weights(2 * shape.intermediate, shape.hidden), weights(shape.hidden, shape.intermediate),
            )
            for _ in range(layers)
        ]  # fmt: skip
        self._head = weights(shape.vocabulary, shape.hidden)
        requests = -(-most // ROWS_PER_REQUEST)
        self._cache = weights(2, requests, shape.kv_heads, context, shape.head_size)
        self._rows = weights(most, shape.hidden)

    @torch.inference_mode()
    def run(self, rows: int) -> Tensor:
        """Compute the most likely token of each of the first `rows` rows, [rows]."""
        shape, x = self.shape, self._rows[:rows]
        requests = -(-rows // ROWS_PER_REQUEST)
        keys, values = self._cache[0, :requests], self._cache[1, :requests]
        for qkv, out, up, down in self._layers:
            mixed = linear(rms_norm(x, (shape.hidden,)), qkv)[:, : shape.heads * shape.head_size]
            padded = mixed.new_zeros(requests * ROWS_PER_REQUEST, mixed.shape[1])
            padded[:rows] = mixed
            query = padded.view(requests, ROWS_PER_REQUEST, shape.heads, shape.head_size).transpose(1, 2)
            seen = scaled_dot_product_attention(query, keys, values, enable_gqa=shape.heads != shape.kv_heads)
            x = x + linear(seen.transpose(1, 2).reshape(len(padded), -1)[:rows], out)
            gate, value = linear(rms_norm(x, (shape.hidden,)), up).chunk(2, dim=-1)
            x = x + linear(silu(gate) * value, down)
        return linear(rms_norm(x, (shape.hidden,)), self._head).argmax(-1)
