"""The trainable form of the byte-level models: a Llama-style decoder (RMSNorm, RoPE, SwiGLU, grouped-query attention).

Only training uses this module; the decoder runs the quantised form of `quantised.py` on the same weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from adaptive_spec.engines.embedded.shape import VOCABULARY, ModelShape


def rope_table(shape: ModelShape, positions: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return cos and sin, each [positions, head_width / 2] (Su et al., 2021, arXiv:2104.09864)."""
    half = shape.head_width // 2
    frequency = shape.rope_base ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.outer(torch.arange(positions, dtype=torch.float64), frequency)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to x [..., head_width]; cos and sin broadcast against [..., head_width / 2]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Block(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        self.attention_norm = nn.Parameter(torch.ones(shape.width))
        self.qkv = nn.Linear(shape.width, shape.width + 2 * shape.kv_width, bias=False)
        self.attention_out = nn.Linear(shape.width, shape.width, bias=False)
        self.mlp_norm = nn.Parameter(torch.ones(shape.width))
        self.gate_up = nn.Linear(shape.width, 2 * shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        s = self.shape
        batch, length, _ = x.shape
        h = F.rms_norm(x, (s.width,), self.attention_norm, s.norm_epsilon)
        q, k, v = self.qkv(h).split((s.width, s.kv_width, s.kv_width), dim=-1)
        q = rotate(q.view(batch, length, s.heads, s.head_width).transpose(1, 2), cos, sin)
        k = rotate(k.view(batch, length, s.kv_heads, s.head_width).transpose(1, 2), cos, sin)
        v = v.view(batch, length, s.kv_heads, s.head_width).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, length, s.width))
        h = F.rms_norm(x, (s.width,), self.mlp_norm, s.norm_epsilon)
        gate, up = self.gate_up(h).chunk(2, dim=-1)
        out: Tensor = x + self.down(F.silu(gate) * up)
        return out


class ByteDecoder(nn.Module):
    """Decoder over bytes: tokens [batch, length] int64 in 0..255 -> logits [batch, length, 256]."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Parameter(torch.randn(VOCABULARY, shape.width) * 0.02)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.final_norm = nn.Parameter(torch.ones(shape.width))
        for block in self.blocks:
            for name in ("attention_out", "down"):
                nn.init.zeros_(getattr(block, name).weight)

    def forward(self, tokens: Tensor) -> Tensor:
        cos, sin = rope_table(self.shape, tokens.shape[1])
        x = F.embedding(tokens, self.embedding)
        for block in self.blocks:
            x = block(x, cos, sin)
        x = F.rms_norm(x, (self.shape.width,), self.final_norm, self.shape.norm_epsilon)
        return F.linear(x, self.embedding)
