"""EngineInfo: its JSON form, its profile name, and damaged input."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.domain.policy import Granularity

INFO = EngineInfo("embedded", "m", "cpu", 2, 3, (0, 1, 3), 8, Granularity.REQUEST, True, 42)


def test_json_round_trip() -> None:
    assert EngineInfo.from_json(INFO.to_json()) == INFO


@pytest.mark.parametrize(
    ("model", "gpu", "name"),
    [
        ("toy", "cpu", "toy_cpu_tp2"),
        ("org/model v1.5", "NVIDIA H100 80GB", "org-model-v1.5_NVIDIA-H100-80GB_tp2"),
        ("../../etc", "", "etc_unknown_tp2"),
    ],
)
def test_profile_name_is_one_safe_file_name(model: str, gpu: str, name: str) -> None:
    assert replace(INFO, model=model, gpu=gpu).profile_name == name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"candidates": []}, "candidates"),
        ({"candidates": [3, 1]}, "candidates"),
        ({"candidates": [1, 1]}, "candidates"),
        ({"candidates": [-1, 1]}, "candidates"),
        ({"candidates": None}, "damaged"),
        ({"granularity": "token"}, "damaged"),
        ({"colour": "red"}, "damaged"),
    ],
)
def test_damaged_json_is_a_value_error(changes: dict[str, object], words: str) -> None:
    fields = json.loads(INFO.to_json())
    with pytest.raises(ValueError, match=words):
        EngineInfo.from_json(json.dumps({**fields, **changes}).encode())


@pytest.mark.parametrize("data", [b"", b"[]", b"\xff", b'{"name": "x"}'])
def test_what_is_no_engine_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="damaged"):
        EngineInfo.from_json(data)
