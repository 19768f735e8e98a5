from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptive_spec.engines.embedded.shape import DRAFT_SHAPE, TARGET_SHAPE
from adaptive_spec.engines.embedded.weights import (
    expected_shapes,
    load_prompts,
    load_weights,
    random_weights,
    save_weights,
    weights_folder,
)
from tests.engines.embedded.conftest import SHAPE


def test_the_shipped_files_are_small_and_loadable() -> None:
    files = list(weights_folder().iterdir())
    assert {file.name for file in files} >= {"target.safetensors", "draft.safetensors", "prompts.json"}
    assert sum(file.stat().st_size for file in files) <= 12_000_000
    for name, shape in (("target", TARGET_SHAPE), ("draft", DRAFT_SHAPE)):
        tensors = load_weights(weights_folder() / f"{name}.safetensors", shape)
        assert all(t.dtype == torch.int8 for k, t in tensors.items() if k.endswith(".weight"))
        assert all(t.float().abs().amax() > 0 for t in tensors.values())
        assert all((t > 0).all() for k, t in tensors.items() if k.endswith(".scale"))


def test_the_shipped_prompts_are_of_two_kinds_and_of_the_agreed_length() -> None:
    prompts = load_prompts()
    assert set(prompts) == {"prose", "code"}
    for texts in prompts.values():
        assert len(texts) == len(set(texts)) == 60
        assert all(96 <= len(text) <= 160 for text in texts)


def test_weights_survive_a_round_trip(tmp_path: Path) -> None:
    weights = random_weights(SHAPE, seed=5)
    save_weights(tmp_path / "w.safetensors", weights)
    again = load_weights(tmp_path / "w.safetensors", SHAPE)
    assert again.keys() == weights.keys() == expected_shapes(SHAPE).keys()
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]


@pytest.mark.parametrize("damage", ["missing", "truncated", "foreign", "other shape"])
def test_damaged_weights_are_refused_by_name(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(path, random_weights(SHAPE, seed=5))
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "foreign":
        path.write_bytes(b"not a tensor file")
    else:
        tensors = load_file(path)
        tensors["head.weight"] = tensors["head.weight"][:, :-1].contiguous()
        save_file(tensors, path)
    with pytest.raises(ValueError, match=r"weights .*w\.safetensors") as error:
        load_weights(path, SHAPE)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", '{"prose": ["a"]}', '{"prose": [1], "code": ["a"]}'])
def test_damaged_prompts_are_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ValueError, match=r"prompts .*p\.json"):
        load_prompts(tmp_path / "p.json")
