"""Attention over the paged KV cache: token t of request r lies in slot req_to_token[r, t]."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own habit
from torch import Tensor

UNIFORM_TOKENS = 64
"""Up to so many new tokens each, requests of one length (verify, draft-extend) go through in one batched call."""


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, cap: float) -> Tensor:
    """q [b, t, hq, d], k and v [b, n, hk, d], mask bool [b, t, n] -> [b, t, hq, d]. cap: soft cap of the scores, 0 for none."""
    groups = q.shape[2] // k.shape[2]
    if cap > 0:
        k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
        scores = cap * torch.tanh(torch.einsum("bthd,blhd->bhtl", q, k) * scale / cap)
        weights = scores.masked_fill(~mask[:, None], float("-inf")).softmax(-1).nan_to_num(0.0)
        return torch.einsum("bhtl,blhd->bthd", weights, v)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask[:, None], scale=scale, enable_gqa=groups != 1
    )
    return out.transpose(1, 2)


def decode_attention_cpu(
    q, k_buffer, v_buffer, k_scale, v_scale, out, k, v, cache_loc, attn_logits, req_to_token, req_pool_indices, seq_lens,
    scaling, logit_cap, is_cross_attn, sliding_window, encoder_lens=None, sinks=None,
):  # fmt: skip
    """One new token a request: store its k and v, attend to everything before it and itself."""
    if k is not None and v is not None:
        k_buffer[cache_loc] = k.view(-1, *k_buffer.shape[1:]).to(k_buffer.dtype)
        v_buffer[cache_loc] = v.view(-1, *v_buffer.shape[1:]).to(v_buffer.dtype)
    position = torch.arange(int(seq_lens.max()))
    mask = position[None, :] < seq_lens[:, None]
    if sliding_window > 0:
        mask &= position[None, :] >= seq_lens[:, None] - sliding_window
    rows = req_to_token[req_pool_indices.long(), : len(position)].long().masked_fill(~mask, 0)
    keys, values = k_buffer[rows].to(q.dtype), v_buffer[rows].to(q.dtype)
    out.copy_(masked_attention(q.unsqueeze(1), keys, values, mask[:, None], scaling, logit_cap or 0.0).squeeze(1))


def extend_attention_cpu(
    q, k, v, out, k_buffer, v_buffer, k_scale, v_scale, req_to_token, req_pool_indices, seq_lens, extend_seq_lens,
    extend_start_loc, max_extend_len, scaling, logit_cap, is_cross_attn, sliding_window, encoder_lens=None, sinks=None,
    tree_mask=None, is_causal=True,
):  # fmt: skip
    """Several new tokens a request (prefill, verify, draft-extend); SGLang has already stored their k and v.

    tree_mask: bool [sum of t * t], which new tokens see which; without it they are causal.
    """
    lengths, starts = extend_seq_lens.tolist(), extend_start_loc.tolist()
    longest = max(lengths)
    uniform = min(lengths) == longest <= UNIFORM_TOKENS
    groups = [list(range(len(lengths)))] if uniform else [[i] for i in range(len(lengths))]
    mask_offset = 0
    for members in groups:
        t = lengths[members[0]]
        if t == 0:
            continue
        index = torch.tensor(members)
        ends = seq_lens[index]
        position = torch.arange(int(ends.max()))
        before_end = position[None, None, :] < ends[:, None, None]
        if tree_mask is not None:
            size = len(members) * t * t
            mask = before_end.expand(-1, t, -1).clone()
            for row, among in enumerate(tree_mask.view(-1)[mask_offset : mask_offset + size].view(-1, t, t).bool()):
                mask[row, :, int(ends[row]) - t : int(ends[row])] = among
            mask_offset += size
        else:
            own = ends[:, None] - t + torch.arange(t)[None, :]
            mask = before_end & (position[None, None, :] <= own[:, :, None]) if is_causal else before_end
            mask = mask.expand(len(members), t, len(position))
            if sliding_window > 0:
                mask = mask & (position[None, None, :] > own[:, :, None] - sliding_window)
        rows = req_to_token[req_pool_indices[index].long(), : len(position)].long()
        rows = rows.masked_fill(position[None, :] >= ends[:, None], 0)
        span = slice(starts[members[0]], starts[members[0]] + len(members) * t)
        queries = q[span].view(len(members), t, *q.shape[1:])
        keys, values = k_buffer[rows].to(q.dtype), v_buffer[rows].to(q.dtype)
        attended = masked_attention(queries, keys, values, mask, scaling, logit_cap or 0.0)
        out[span].copy_(attended.reshape(-1, *attended.shape[2:]))
