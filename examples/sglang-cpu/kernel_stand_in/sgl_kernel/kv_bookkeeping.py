"""Which KV slots belong to which tokens: small copies that are kernels on a GPU."""

from __future__ import annotations

import ctypes

import torch


def build_draft_decode_metadata_cpu(req_to_token, req_pool_indices, seq_lens, topk, num_steps, pool_len):
    rows = req_to_token[req_pool_indices.long()]
    if topk == 1:
        return rows
    out = rows.repeat_interleave(topk, dim=0).clone()
    for b, s in enumerate(seq_lens.tolist()):
        for j in range(topk):
            out[b * topk + j, s : s + num_steps] = rows[b, s + j * num_steps : s + (j + 1) * num_steps]
    return out


def assign_req_to_token_pool_cpu(req_pool_indices, req_to_token, start, end, out_cache_loc, pool_len):
    at = 0
    for r, s, e in zip(req_pool_indices.tolist(), start.tolist(), end.tolist(), strict=True):
        req_to_token[r, s:e] = out_cache_loc[at : at + e - s].to(req_to_token.dtype)
        at += e - s


def assign_extend_cache_locs_cpu(req_pool_indices, req_to_token, start, end, out_cache_loc, pool_len):
    at = 0
    for r, s, e in zip(req_pool_indices.tolist(), start.tolist(), end.tolist(), strict=True):
        out_cache_loc[at : at + e - s] = req_to_token[r, s:e].to(out_cache_loc.dtype)
        at += e - s


def assign_draft_cache_locs_contiguous_cpu(req_pool_indices, req_to_token, seq_lens, out_cache_loc, pool_len, topk, num_steps):
    n = topk * num_steps
    columns = seq_lens.long()[:, None] + torch.arange(n)[None, :]
    out_cache_loc.view(-1, n).copy_(req_to_token[req_pool_indices.long()[:, None], columns])


def fill_bonus_tokens_cpu(accept_tokens, accept_lens, bonus_tokens, accept_stride):
    rows = accept_lens.shape[0]
    index = torch.arange(rows) * accept_stride + accept_lens.long() - 1
    bonus_tokens[:rows] = accept_tokens.view(-1)[index].to(bonus_tokens.dtype)


def fill_accept_out_cache_loc_cpu(accept_index, out_cache_loc, accept_out_cache_loc):
    flat = accept_index.view(-1)
    source = flat[flat > -1].long()
    accept_out_cache_loc[: source.numel()] = out_cache_loc[source]


def copy_all_layer_kv_cache_cpu(data_ptrs, strides, tgt_loc, src_loc):
    """Move KV slots in every layer's buffer; SGLang hands over raw addresses and row sizes in bytes."""
    sources, targets = src_loc.tolist(), tgt_loc.tolist()
    for base, size in zip(data_ptrs.tolist(), strides.tolist(), strict=True):
        rows = [ctypes.string_at(base + i * size, size) for i in sources]
        for i, row in zip(targets, rows, strict=True):
            ctypes.memmove(base + i * size, row, size)
