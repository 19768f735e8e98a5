"""The shipped pair of models, loaded, and what the engine says about itself."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.domain.policy import Granularity
from adaptive_spec.engines.embedded.kv_cache import PackedRows
from adaptive_spec.engines.embedded.quantised import ExactModel, FloatModel
from adaptive_spec.engines.embedded.shape import DRAFT_SHAPE, TARGET_SHAPE
from adaptive_spec.engines.embedded.weights import load_weights, weights_folder
from adaptive_spec.engines.torch_device import device_name
from adaptive_spec.errors import BadInput

MAX_BATCH = 16
MAX_K = 5
LAUNCH_K = 3
MAX_CONTEXT = 320
_PREFILL_ROWS = 160


@dataclass(frozen=True)
class Models:
    """Target and draft, shared by every decoder of the process; one forward at a time. name: of the target."""

    target: ExactModel
    draft: FloatModel
    name: str


def load_models(device: str = "cpu", folder: Path | None = None, max_batch: int = MAX_BATCH, max_k: int = MAX_K) -> Models:
    """Load the shipped weights, or those of `folder`, and run each kernel once, so that the first step is an ordinary one.

    Raise BadInput for a device this torch cannot use, and ValueError for weights that are missing or damaged.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise BadInput("device cuda is not available to this torch, allowed here: cpu")
    folder = folder or weights_folder()
    rows = max(max_batch * (max_k + 1), _PREFILL_ROWS)
    weights = load_weights(folder / "target.safetensors", TARGET_SHAPE)
    parameters = sum(tensor.numel() for name, tensor in weights.items() if name.endswith(".weight"))
    target = ExactModel(TARGET_SHAPE, weights, rows, MAX_CONTEXT, device)
    draft = FloatModel(DRAFT_SHAPE, load_weights(folder / "draft.safetensors", DRAFT_SHAPE), rows, MAX_CONTEXT, device)
    for model in (target, draft):
        cache = model.new_cache(1)
        for dense in (False, True):
            at = PackedRows.of(cache, np.zeros(8, dtype=np.int64), np.arange(8))
            model.forward(cache, torch.zeros(8, dtype=torch.int64, device=model.device), at, dense=dense)
    return Models(target, draft, f"byte-{parameters / 1e6:.1f}m")


def engine_info(models: Models, max_batch: int = MAX_BATCH, max_k: int = MAX_K, launch_k: int = LAUNCH_K) -> EngineInfo:
    """What the engine tells its sidecar."""
    return EngineInfo(
        name="embedded", model=models.name, gpu=device_name(models.target.device), tp=1, launch_k=launch_k,
        candidates=tuple(range(max_k + 1)), max_batch=max_batch, granularity=Granularity.REQUEST, holds_batch=True,
        pid=os.getpid(),
    )  # fmt: skip
