"""Make a target model, its EAGLE, EAGLE3 and stand-alone drafts and their tokenizer, from nothing but random numbers.

The vocabulary is cut into six cycles ("regions") of 128 tokens, a0 a1 ... a127 a0 ... to f. The target continues every token
with its successor in the cycle, by construction of its output matrix, so the right output of every prompt is known. A share of
each region's tokens is hard for the drafts: there they guess wrong. So the region a prompt starts in decides how much of the
draft is accepted (drafts of 3 tokens: about 3.0, 2.9, 1.9, 1.7, 1.2 and 0 of them), and how sure the draft is says something
about whether it is right. The last coordinate of an embedding carries the hardness; the target does not look at it.

    python build_models.py --out DIR [--hidden 256 --layers 2 --inter 512 --heads 4 --kv-heads 2]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

SPECIAL, REGION_TOKENS = 8, 128
HARD_SHARE = {"a": 0.0, "b": 0.1, "c": 0.3, "d": 0.5, "e": 0.8, "f": 1.0}
VOCABULARY = -(-(SPECIAL + REGION_TOKENS * len(HARD_SHARE)) // 64) * 64
WRONG = VOCABULARY - 1
"""The token a draft proposes at a hard token."""
TOP_LOGIT = 12.0
EAGLE3_ATTENTION = 1.6


class Shapes:
    """Sizes of the target; the drafts have one layer of the same sizes."""

    def __init__(self, hidden: int, layers: int, inter: int, heads: int, kv_heads: int) -> None:
        self.hidden, self.layers, self.inter, self.heads, self.kv_heads = hidden, layers, inter, heads, kv_heads
        self.head_dim = hidden // heads


def small_random(*shape: int, std: float = 0.02) -> Tensor:
    return torch.randn(*shape) * std


def successors_and_hardness() -> tuple[Tensor, Tensor]:
    """Successor of every token, and how much its embedding misleads a draft (0: not at all)."""
    successor, hardness = torch.arange(VOCABULARY), torch.zeros(VOCABULARY)
    generator = torch.Generator().manual_seed(1)
    for region, share in enumerate(HARD_SHARE.values()):
        base = SPECIAL + region * REGION_TOKENS
        for i in range(REGION_TOKENS):
            successor[base + i] = base + (i + 1) % REGION_TOKENS
            if float(torch.rand((), generator=generator)) < share:
                low, high = (1.02, 1.25) if share == 1.0 else (0.85, 1.2)
                hardness[base + i] = low + (high - low) * float(torch.rand((), generator=generator))
    return successor, hardness


def layer(prefix: str, s: Shapes, first_norm: bool = True) -> dict[str, Tensor]:
    """A Llama layer that is almost the identity and leaves the hardness coordinate alone."""
    weights = {
        prefix + "self_attn.q_proj.weight": small_random(s.hidden, s.hidden),
        prefix + "self_attn.k_proj.weight": small_random(s.kv_heads * s.head_dim, s.hidden),
        prefix + "self_attn.v_proj.weight": small_random(s.kv_heads * s.head_dim, s.hidden),
        prefix + "self_attn.o_proj.weight": small_random(s.hidden, s.hidden, std=0.002),
        prefix + "mlp.gate_proj.weight": small_random(s.inter, s.hidden),
        prefix + "mlp.up_proj.weight": small_random(s.inter, s.hidden),
        prefix + "mlp.down_proj.weight": small_random(s.hidden, s.inter, std=0.002),
        prefix + "post_attention_layernorm.weight": torch.ones(s.hidden),
    }
    if first_norm:
        weights[prefix + "input_layernorm.weight"] = torch.ones(s.hidden)
    weights[prefix + "self_attn.o_proj.weight"][-1] = 0
    weights[prefix + "mlp.down_proj.weight"][-1] = 0
    return weights


def eagle3_draft(s: Shapes, output: Tensor, wrong: Tensor) -> dict[str, Tensor]:
    """The token's embedding enters an EAGLE3 draft through attention alone: let every token attend to itself."""
    h = s.hidden

    def embedding_half(scale: float) -> Tensor:
        return torch.cat([torch.eye(h) * scale, torch.zeros(h, h)], dim=1)

    out = torch.eye(h)
    out[:, h - 1] = wrong
    return {
        "midlayer.self_attn.q_proj.weight": embedding_half(EAGLE3_ATTENTION),
        "midlayer.self_attn.k_proj.weight": embedding_half(EAGLE3_ATTENTION),
        "midlayer.self_attn.v_proj.weight": embedding_half(1.0),
        "midlayer.self_attn.o_proj.weight": out,
        "midlayer.mlp.gate_proj.weight": small_random(s.inter, h),
        "midlayer.mlp.up_proj.weight": small_random(s.inter, h),
        "midlayer.mlp.down_proj.weight": small_random(h, s.inter, std=0.002),
        "midlayer.input_layernorm.weight": torch.ones(h),
        "midlayer.hidden_norm.weight": torch.ones(h),
        "midlayer.post_attention_layernorm.weight": torch.ones(h),
        "norm.weight": torch.ones(h),
        "fc.weight": small_random(h, h, std=1e-4),
        "lm_head.weight": output,
    }


def build(s: Shapes, seed: int) -> dict[str, tuple[dict[str, object], dict[str, Tensor]]]:
    """Return configuration and weights of every model, by folder name."""
    torch.manual_seed(seed)
    h = s.hidden
    successor, hardness = successors_and_hardness()
    direction = torch.randn(VOCABULARY, h)
    direction[:, -1] = 0
    direction = direction / direction.norm(dim=-1, keepdim=True)
    embedding = direction.clone()
    embedding[:, -1] = hardness
    output = torch.zeros(VOCABULARY, h)
    output[successor[SPECIAL:]] = direction[SPECIAL:]  # the row of a token's successor points where the token's embedding does
    wrong = torch.nn.functional.normalize(torch.randn(h) * (torch.arange(h) < h - 1), dim=-1)
    output[WRONG] = wrong
    output_scaled = output * (TOP_LOGIT / h**0.5)  # behind an RMS norm a hidden state has length sqrt(h)

    target = {"model.embed_tokens.weight": embedding, "lm_head.weight": output_scaled, "model.norm.weight": torch.ones(h)}
    for i in range(s.layers):
        target |= layer(f"model.layers.{i}.", s)
    fc = torch.zeros(h, 2 * h)
    fc[:, :h] = torch.eye(h) * h**0.5  # an EAGLE draft has no final norm
    fc[:, h - 1] = wrong * h**0.5
    eagle = {"fc.weight": fc, "fc.bias": torch.zeros(h)} | layer("layers.0.", s, first_norm=False)
    alone = {"model.embed_tokens.weight": embedding, "lm_head.weight": output_scaled, "model.norm.weight": torch.ones(h)}
    alone |= layer("model.layers.0.", s)

    base: dict[str, object] = {
        "model_type": "llama", "hidden_size": h, "intermediate_size": s.inter, "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads, "head_dim": s.head_dim, "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096, "hidden_act": "silu", "rope_theta": 10000.0, "tie_word_embeddings": False,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "torch_dtype": "float32", "attention_bias": False,
    }  # fmt: skip
    one_layer = base | {"num_hidden_layers": 1}
    eagle3 = one_layer | {
        "architectures": ["LlamaForCausalLMEagle3"], "num_key_value_heads": s.heads, "draft_vocab_size": VOCABULARY,
        "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [0]},
    }  # fmt: skip
    return {
        "target": (base | {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": s.layers}, target),
        "eagle": (one_layer | {"architectures": ["LlamaForCausalLMEagle"]}, eagle),
        "standalone": (one_layer | {"architectures": ["LlamaForCausalLM"]}, alone),
        "eagle3": (eagle3, eagle3_draft(s, output_scaled, wrong)),
    }


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word: "a0", "a1", ..."""
    words = ["<s>", "</s>", "<pad>", "<unk>", *(f"<r{i}>" for i in range(SPECIAL - 4))]
    regions = [*HARD_SHARE, "g"]
    words += [f"{regions[t // REGION_TOKENS]}{t % REGION_TOKENS}" for t in range(VOCABULARY - SPECIAL)]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    for name, value in {"hidden": 256, "layers": 2, "inter": 512, "heads": 4, "kv-heads": 2, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    a = parser.parse_args()
    words = tokenizer()
    for name, (config, weights) in build(Shapes(a.hidden, a.layers, a.inter, a.heads, a.kv_heads), a.seed).items():
        folder = a.out / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        contiguous = {key: value.contiguous() for key, value in weights.items()}
        save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
        words.save_pretrained(folder)
        print(f"{name}: {sum(v.numel() for v in weights.values()):,} parameters")


if __name__ == "__main__":
    main()
