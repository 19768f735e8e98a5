"""The files the package ships: int8 weights of target and draft, and held-out prompts of both kinds."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from adaptive_spec.engines.embedded.linear import quantise_weight
from adaptive_spec.engines.embedded.shape import VOCABULARY, ModelShape
from adaptive_spec.engines.embedded.text import KINDS


def weights_folder() -> Path:
    """Folder of the shipped files."""
    return Path(str(resources.files("adaptive_spec.engines.embedded"))) / "weights"


def quantise_model(shape: ModelShape, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Float weights under the names of `network.py` -> the tensors that ship.

    `X.weight` int8 [out, in] and `X.scale` float32 [out] for every linear X and the head (the tied embedding), the norm
    before a linear folded into its columns; `embedding` float16 [256, width].
    """
    linears = {"head": state["embedding"] * state["final_norm"]}
    for i in range(shape.layers):
        name = f"blocks.{i}."
        linears[name + "qkv"] = state[name + "qkv.weight"] * state[name + "attention_norm"]
        linears[name + "attention_out"] = state[name + "attention_out.weight"]
        linears[name + "gate_up"] = state[name + "gate_up.weight"] * state[name + "mlp_norm"]
        linears[name + "down"] = state[name + "down.weight"]
    tensors = {"embedding": state["embedding"].half()}
    for name, weight in linears.items():
        tensors[name + ".weight"], tensors[name + ".scale"] = quantise_weight(weight)
    return tensors


def expected_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a weight file."""
    linears = {"head": (VOCABULARY, shape.width)}
    for i in range(shape.layers):
        linears[f"blocks.{i}.qkv"] = (shape.width + 2 * shape.kv_width, shape.width)
        linears[f"blocks.{i}.attention_out"] = (shape.width, shape.width)
        linears[f"blocks.{i}.gate_up"] = (2 * shape.hidden, shape.width)
        linears[f"blocks.{i}.down"] = (shape.width, shape.hidden)
    shapes: dict[str, tuple[int, ...]] = {"embedding": (VOCABULARY, shape.width)}
    for name, (rows, columns) in linears.items():
        shapes[name + ".weight"], shapes[name + ".scale"] = (rows, columns), (rows,)
    return shapes


def save_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a weight file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    temporary.chmod(0o644)  # they ship
    os.replace(temporary, path)


def load_weights(path: Path, shape: ModelShape) -> dict[str, Tensor]:
    """Read a weight file. Raise ValueError, naming the file, when it is missing, damaged or of another shape."""
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"weights {path}: cannot be read: {error}") from error
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = expected_shapes(shape)
    if found != expected:
        odd = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        wanted = expected.get(odd[0])
        raise ValueError(f"weights {path}: {odd[0]}: must have shape {wanted}, got {found.get(odd[0])}")
    return tensors


def random_weights(shape: ModelShape, seed: int) -> dict[str, Tensor]:
    """Weights of an untrained model, for tests and for timing."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {"embedding": torch.randn(VOCABULARY, shape.width, generator=generator).half()}
    for name, size in expected_shapes(shape).items():
        if name.endswith(".weight"):
            weight = torch.randn(size, generator=generator) / size[1] ** 0.5
            tensors[name], tensors[name.removesuffix("weight") + "scale"] = quantise_weight(weight)
    return tensors


def load_prompts(path: Path | None = None) -> dict[str, list[bytes]]:
    """Held-out prompts by kind; path None takes the shipped ones. Raise ValueError when the file is damaged."""
    path = path or weights_folder() / "prompts.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return {kind: [text.encode() for text in data[kind]] for kind in KINDS}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"prompts {path}: cannot be read: {error}") from error
