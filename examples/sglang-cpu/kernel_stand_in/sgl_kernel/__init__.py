"""A stand-in, in plain PyTorch, for SGLang's CPU kernel package, which no registry has.

It holds what SGLang 0.5.23 reaches when it serves a dense Llama with `--attention-backend intel_amx` and EAGLE, EAGLE3,
STANDALONE or NGRAM; names and argument orders are SGLang's. It is right, not fast: a real server on it has real scheduling,
batching and acceptance, and latencies of plain PyTorch. `convert_weight_packed` is left out on purpose: SGLang takes its own
native PyTorch path for every linear, norm and activation layer where that name is missing.
"""

from __future__ import annotations

from sgl_kernel.attention import decode_attention_cpu, extend_attention_cpu
from sgl_kernel.kv_bookkeeping import (
    assign_draft_cache_locs_contiguous_cpu,
    assign_extend_cache_locs_cpu,
    assign_req_to_token_pool_cpu,
    build_draft_decode_metadata_cpu,
    copy_all_layer_kv_cache_cpu,
    fill_accept_out_cache_loc_cpu,
    fill_bonus_tokens_cpu,
)
from sgl_kernel.tree import build_tree_kernel_efficient_cpu, rotate_input_ids_cpu, verify_tree_greedy_cpu

__version__ = "0.0.0+cpu.stand.in"
__all__ = [
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "assign_req_to_token_pool_cpu",
    "build_draft_decode_metadata_cpu",
    "build_tree_kernel_efficient_cpu",
    "copy_all_layer_kv_cache_cpu",
    "decode_attention_cpu",
    "extend_attention_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "rotate_input_ids_cpu",
    "verify_tree_greedy_cpu",
]


def _register() -> None:
    import torch

    torch.ops.sgl_kernel.decode_attention_cpu = decode_attention_cpu
    torch.ops.sgl_kernel.extend_attention_cpu = extend_attention_cpu


_register()
