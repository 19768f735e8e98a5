import pytest
import torch

from adaptive_spec.engines.embedded.quantised import ExactModel, FloatModel
from adaptive_spec.engines.embedded.shape import ModelShape
from adaptive_spec.engines.embedded.weights import random_weights

SHAPE = ModelShape(width=64, layers=2, heads=4, kv_heads=2, hidden=96)
DRAFT = ModelShape(width=64, layers=1, heads=4, kv_heads=2, hidden=96)


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def target() -> ExactModel:
    """An untrained target: its greedy output is as sensitive to a flipped bit as any."""
    return ExactModel(SHAPE, random_weights(SHAPE, seed=1))


@pytest.fixture(scope="session")
def draft() -> FloatModel:
    """The target without its last layer: right often enough that accepted and rejected tokens both occur."""
    return FloatModel(DRAFT, {k: v for k, v in random_weights(SHAPE, seed=1).items() if "blocks.1" not in k})
