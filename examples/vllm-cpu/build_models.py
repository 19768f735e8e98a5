"""Make the tiny models of the SGLang kit in vLLM's formats, from nothing but random numbers.

Target, tokenizer, regions and hardness are those of `examples/sglang-cpu/build_models.py`; see there. What differs:

- EAGLE has no bias, and its architecture is LlamaForCausalLM.
- EAGLE3 adds the residual before its norm, with a small hidden norm: else the previous token's direction stays in the residual.
- The stand-alone draft guesses wrong at hard tokens too: its output matrix reads the hardness coordinate.
- `lora`: an adapter of the target with small random weights, which does not change its greedy outputs.
- With --informative the hard tokens are those at which the draft hesitates: its confidence there is 0.4 to 0.6, elsewhere near
  1.0. So the confidence tells which draft tokens are worth verifying.

    python build_models.py --out DIR [--informative] [--hidden 256 --layers 2 --inter 512 --heads 4 --kv-heads 2]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

_SHARED = Path(__file__).parents[1] / "sglang-cpu" / "build_models.py"
_spec = importlib.util.spec_from_file_location("sglang_cpu_models", _SHARED)
assert _spec is not None
assert _spec.loader is not None
shared = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = shared
_spec.loader.exec_module(shared)

HIDDEN_NORM = 1e-2
LORA_RANK = 8
HESITATION = 0.03
"""Half-width of the hardness around 1.0, where right and wrong token are equally likely: the logits differ by 12 times that."""


def hesitant(embedding: Tensor) -> None:
    """Draw the hardness of every hard token again, near 1.0, where the draft's two best tokens are almost equally likely."""
    hard = embedding[:, -1] > 0.0
    generator = torch.Generator().manual_seed(2)
    embedding[hard, -1] = 1.0 + HESITATION * (2.0 * torch.rand(int(hard.sum()), generator=generator) - 1.0)


def stand_alone(output: Tensor) -> Tensor:
    """The output matrix of a draft that errs: the wrong token's logit is the hardness."""
    erring: Tensor = output.clone()
    erring[shared.WRONG] = 0.0
    erring[shared.WRONG, -1] = shared.TOP_LOGIT / output.shape[1] ** 0.5
    return erring


def adapter(layers: int, hidden: int) -> dict[str, Tensor]:
    weights = {}
    for i in range(layers):
        name = f"base_model.model.model.layers.{i}.self_attn.q_proj."
        weights[name + "lora_A.weight"] = shared.small_random(LORA_RANK, hidden)
        weights[name + "lora_B.weight"] = shared.small_random(hidden, LORA_RANK)
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--informative", action="store_true")
    for name, value in {"hidden": 256, "layers": 2, "inter": 512, "heads": 4, "kv-heads": 2, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    a = parser.parse_args()
    words = shared.tokenizer()
    built = shared.build(shared.Shapes(a.hidden, a.layers, a.inter, a.heads, a.kv_heads), a.seed)
    for folder, (config, weights) in built.items():
        if folder == "eagle":
            del weights["fc.bias"]
            config["architectures"] = ["LlamaForCausalLM"]
        elif folder == "eagle3":
            config["norm_before_residual"] = True
            weights["midlayer.hidden_norm.weight"] = torch.full((a.hidden,), HIDDEN_NORM)
        elif folder == "standalone":
            weights["lm_head.weight"] = stand_alone(weights["lm_head.weight"])
        if a.informative and "model.embed_tokens.weight" in weights:
            hesitant(weights["model.embed_tokens.weight"])
        _write(a.out / folder, "config.json", config, "model.safetensors", weights)
        words.save_pretrained(a.out / folder)
    lora = {"peft_type": "LORA", "r": LORA_RANK, "lora_alpha": LORA_RANK, "target_modules": ["q_proj"], "bias": "none",
            "base_model_name_or_path": "target", "task_type": "CAUSAL_LM"}  # fmt: skip
    _write(a.out / "lora", "adapter_config.json", lora, "adapter_model.safetensors", adapter(a.layers, a.hidden))


def _write(folder: Path, config_name: str, config: dict[str, object], name: str, weights: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / config_name).write_text(json.dumps(config, indent=1))
    contiguous = {key: value.clone().contiguous() for key, value in weights.items()}
    save_file(contiguous, folder / name, metadata={"format": "pt"})
    print(f"{folder.name}: {sum(v.numel() for v in weights.values()):,} parameters")


if __name__ == "__main__":
    main()
