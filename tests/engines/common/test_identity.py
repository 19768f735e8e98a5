"""The name and the fingerprint of a server."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from adaptive_spec.engines.common.identity import config_hash, fingerprint, model_name


@pytest.mark.parametrize(
    ("path", "served", "name"),
    [
        ("/mnt/models", "llama-70b", "llama-70b"),
        ("/mnt/models", ["llama-70b", "alias"], "llama-70b"),
        ("/mnt/models/llama", "/mnt/models/llama", "llama"),
        ("/mnt/models/", None, "models"),
        ("org/name", None, "name"),
        ("/c/hub/models--org--my-name/snapshots/0123abcd", None, "org/my-name"),
        ("/c/hub/models--org--my-name/snapshots/0123abcd/", [], "org/my-name"),
        ("/x", "  ", "x"),
        ("", None, "unknown"),
    ],
)
def test_the_name_of_a_model(path: str, served: object, name: str) -> None:
    assert model_name(path, served) == name


class _Loaded:
    def __init__(self, content: Any) -> None:
        self.content = content

    def to_dict(self) -> Any:
        return self.content


def test_a_configuration_is_the_same_wherever_it_lies(tmp_path: Path) -> None:
    content = {"hidden_size": 64, "layers": [1, 2]}
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "config.json").write_text(json.dumps({**content, "_name_or_path": place}))
    assert config_hash(tmp_path / "a") == config_hash(tmp_path / "b") == config_hash("org/name", _Loaded(content))
    assert config_hash("org/name", _Loaded({**content, "hidden_size": 65})) != config_hash(tmp_path / "a")


@pytest.mark.parametrize("text", ["", "[1]", "[" * 100_000, '{"a": 1', "\0"])
def test_a_configuration_that_cannot_be_read_is_left_out(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert config_hash(tmp_path) is None
    assert config_hash("org/name", _Loaded(None)) is None
    assert config_hash("org/name", object()) is None
    (tmp_path / "config.json").unlink()
    os.mkfifo(tmp_path / "config.json")
    assert config_hash(tmp_path) is None


def test_each_field_tells_engines_apart() -> None:
    fields: dict[str, Any] = {
        "engine": "sglang 0.5.23", "target": "t", "draft": "d", "target_path": "/m", "draft_path": "/d", "quantization": "fp8",
        "dtype": "bfloat16", "attention_backend": "fa3",
    }  # fmt: skip
    whole = fingerprint(**fields)
    assert list(whole) == sorted(whole)
    for name in ("engine", "target", "draft", "quantization", "dtype", "attention_backend"):
        assert fingerprint(**{**fields, name: "other"}) != whole
        assert dict(whole)[name] == fields[name]
    assert fingerprint(**{**fields, "target_path": "/elsewhere"}) == whole
    assert "quantization" not in dict(fingerprint(**{**fields, "quantization": None}))
    assert "draft" not in dict(fingerprint(**{**fields, "draft": None, "draft_path": None}))
