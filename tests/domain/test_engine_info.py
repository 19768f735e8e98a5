"""EngineInfo: its JSON form, its profile name, and damaged input."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

from adaptive_spec.domain.engine_info import EngineInfo, fingerprint_of, shortened
from adaptive_spec.domain.policy import Granularity

INFO = EngineInfo("embedded", "m", "cpu", 2, 3, (0, 1, 3), 8, Granularity.REQUEST, True, 42)


def test_json_round_trip() -> None:
    assert EngineInfo.from_json(INFO.to_json()) == INFO


@pytest.mark.parametrize(
    ("model", "gpu", "name"),
    [
        ("toy", "cpu", "toy_cpu_tp2"),
        ("org/model v1.5", "NVIDIA H100 80GB", "org-model-v1.5_NVIDIA-H100-80GB_tp2_286d967b"),
        ("../../etc", "", "etc_unknown_tp2_dc803b63"),
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


HOSTILE: list[tuple[dict[str, object], str]] = [
    ({"tp": "../../../tmp/x"}, "tp: must be a whole number in 1..4096"),
    ({"tp": 0}, "tp: must be"),
    ({"tp": True}, "tp: must be"),
    ({"tp": 2.0}, "tp: must be"),
    ({"tp": 10**400}, "tp: must be"),
    ({"tp": 10**5000}, "."),
    ({"pid": -1}, "pid: must be"),
    ({"pid": 2**31}, "pid: must be"),
    ({"launch_k": 33}, "launch_k: must be a whole number in 0..32"),
    ({"launch_k": -1}, "launch_k: must be"),
    ({"launch_k": float("inf")}, "launch_k: must be"),
    ({"candidates": [0, 33]}, "candidates: K: must be a whole number in 0..32"),
    ({"candidates": ["1"]}, "candidates: K: must be"),
    ({"candidates": [[[]]]}, "candidates: K: must be"),
    ({"max_batch": 0}, "max_batch: must be"),
    ({"max_batch": 4097}, "max_batch: must be a whole number in 1..4096"),
    ({"max_batch": None}, "max_batch: must be"),
    ({"model": "m" * 300}, "model: must be printable text of 1..200 characters"),
    ({"model": ""}, "model: must be"),
    ({"model": "a\nb"}, "model: must be"),
    ({"model": "\ud800"}, "model: must be"),
    ({"model": "\x00"}, "model: must be"),
    ({"model": ["m"]}, "model: must be"),
    ({"gpu": 7}, "gpu: must be"),
    ({"name": "x" * 33}, "name: must be"),
    ({"holds_batch": 1}, "holds_batch: must be true or false"),
    ({"allowed_from": [[1, [0, 99]]]}, "allowed_from: K: must be"),
    ({"allowed_from": [["1", [0]]]}, "allowed_from: batch size: must be"),
    ({"allowed_from": [[1]]}, "damaged"),
    ({"allowed_from": 5}, "damaged"),
    ({"fingerprint": [["a", 1]]}, "fingerprint: a: must be"),
    ({"fingerprint": [["a" * 41, "x"]]}, "fingerprint: name: must be"),
    ({"fingerprint": [[f"f{n}", "x"] for n in range(33)]}, "fingerprint: must have at most 32"),
    ({"fingerprint": {"a": "b"}}, "damaged"),
]


@pytest.mark.parametrize(("changes", "words"), HOSTILE)
def test_values_out_of_range_are_one_short_line(changes: dict[str, object], words: str) -> None:
    fields = json.loads(INFO.to_json())
    sys.set_int_max_str_digits(0)
    try:
        data = json.dumps({**fields, **changes}).encode()
    finally:
        sys.set_int_max_str_digits(4300)
    with pytest.raises(ValueError, match=words) as caught:
        EngineInfo.from_json(data)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("data", [b"[" * 100_000, b'{"name":' * 100_000, b'{"pid": 1e999}', b"1" * 10_000])
def test_json_that_breaks_parsers_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"damaged|pid"):
        EngineInfo.from_json(data)


def test_names_that_look_alike_have_folders_of_their_own() -> None:
    models = ["a/b", "a-b", "模型", "型模", "models", "a b", "x" * 200, "x" * 199]
    names = [replace(INFO, model=model).profile_name for model in models]
    names += [replace(INFO, fingerprint=(("dtype", dtype),)).profile_name for dtype in ("bfloat16", "float16")]
    assert len({*names, INFO.profile_name}) == len(names) + 1
    assert all(len(name) < 200 and "/" not in name for name in names)
    assert names[-1].startswith("m_cpu_tp2_")


def test_the_digest_is_of_all_but_the_process() -> None:
    assert replace(INFO, pid=7).digest == INFO.digest
    others = [
        replace(INFO, model="other"), replace(INFO, launch_k=1), replace(INFO, candidates=(0, 1)), replace(INFO, max_batch=9),
        replace(INFO, fingerprint=(("dtype", "float16"),)), replace(INFO, allowed_from=((1, (0, 1, 3)),)),
    ]  # fmt: skip
    digests = {info.digest for info in (INFO, *others)}
    assert len(digests) == len(others) + 1
    assert all(1 <= digest < 2**64 for digest in digests)


def test_a_fingerprint_is_always_within_the_limits() -> None:
    fields = {"dtype": "bfloat16", "none": None, "empty": "", "long": "v" * 500, "lines": "a\nb", "surrogate": "\ud800", "n": 3}
    fields |= {f"more{n}": n for n in range(50)}
    info = replace(INFO, fingerprint=fingerprint_of(fields))
    assert EngineInfo.from_json(info.checked().to_json()) == info
    assert dict(info.fingerprint)["dtype"] == "bfloat16"
    assert shortened("v" * 500) != shortened("v" * 499)
    assert shortened("a\nb") != shortened("a\tb")
