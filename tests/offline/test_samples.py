from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from adaptive_spec.errors import BadInput
from adaptive_spec.offline.samples import read_calibration, read_latency

L, C = "num_tokens,latency_ms\n", "cumulative_score,accepted\n"


def _write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "s.csv"
    path.write_text(text)
    return path


def test_latency(tmp_path: Path) -> None:
    samples = read_latency(_write(tmp_path, f"# made by hand\n\n{L}# repeated counts are welcome\n1,2.5\n1, 3e0 \n64,10\n\n\n"))
    assert samples.num_tokens.tolist() == [1, 1, 64]
    np.testing.assert_allclose(samples.latency_s, [0.0025, 0.003, 0.01])


def test_calibration(tmp_path: Path) -> None:
    pairs = read_calibration(_write(tmp_path, f"\ufeff{C}0.5,1\n1,0\n1e-9,0"))
    assert pairs.cumulative_score.tolist() == [0.5, 1.0, 1e-9]
    assert pairs.accepted.tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "file is empty; must begin with the header num_tokens,latency_ms"),
        ("# only this\n", "file is empty; must begin with the header"),
        (L, "no rows; must have at least one"),
        ("num_tokens,latency\n1,2\n", "line 1: header: must be num_tokens,latency_ms, got 'num_tokens,latency'"),
        ("latency_ms,num_tokens\n1,2\n", "line 1: header"),
        ("1,2\n", "line 1: header: must be num_tokens,latency_ms, got '1,2'"),
        (f"{L}1,nan\n", "line 2: latency_ms: must be a number in 1e-06..3.6e+06, got 'nan'"),
        (f"{L}1,inf\n", "line 2: latency_ms: must be a number in 1e-06..3.6e+06, got 'inf'"),
        (f"{L}1,2\n1,-3\n", "line 3: latency_ms: must be a number in 1e-06..3.6e+06, got '-3'"),
        (f"{L}1,0\n", "line 2: latency_ms: must be a number in 1e-06..3.6e+06, got '0'"),
        (f"{L}1,\n", "line 2: latency_ms: must be a number in 1e-06..3.6e+06, got ''"),
        (f"{L},1\n", "line 2: num_tokens: must be a whole number in 1..65536, got ''"),
        (f"{L}0,1\n", "line 2: num_tokens: must be a whole number in 1..65536, got '0'"),
        (f"{L}1.5,1\n", "line 2: num_tokens: must be a whole number in 1..65536, got '1.5'"),
        (f"{L}65537,1\n", "line 2: num_tokens: must be a whole number in 1..65536, got '65537'"),
        (f"{L}one,1\n", "line 2: num_tokens: must be a whole number in 1..65536, got 'one'"),
        (f"{L}1\n", "line 2: must be two fields, num_tokens,latency_ms, got '1'"),
        (f"{L}1,2,3\n", "line 2: must be two fields, num_tokens,latency_ms, got '1,2,3'"),
        (f"{L}1,2\n\n3,4\n", "line 3: must be two fields, num_tokens,latency_ms, got ''"),
        (f'{L}"1,2\n', "line 2: "),
    ],
)
def test_bad_latency_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    path = _write(tmp_path, text)
    with pytest.raises(BadInput) as error:
        read_latency(path)
    assert str(error.value).startswith(f"{path}: ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("0,1", "cumulative_score: must be a number in (0, 1], got '0'"),
        ("1.0001,1", "cumulative_score: must be a number in (0, 1], got '1.0001'"),
        ("nan,1", "cumulative_score: must be a number in (0, 1], got 'nan'"),
        ("-0.2,1", "cumulative_score: must be a number in (0, 1], got '-0.2'"),
        ("high,1", "cumulative_score: must be a number in (0, 1], got 'high'"),
        ("0.5,2", "accepted: must be 0 or 1, got '2'"),
        ("0.5,true", "accepted: must be 0 or 1, got 'true'"),
        ("0.5,1.0", "accepted: must be 0 or 1, got '1.0'"),
        ("0.5,", "accepted: must be 0 or 1, got ''"),
    ],
)
def test_bad_calibration_is_one_line(tmp_path: Path, row: str, words: str) -> None:
    with pytest.raises(BadInput, match="line 3: ") as error:
        read_calibration(_write(tmp_path, f"{C}0.5,0\n{row}\n"))
    assert words in str(error.value)


def test_unreadable(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be read: No such file"):
        read_latency(tmp_path / "none.csv")
    (tmp_path / "s.csv").write_bytes(L.encode() + b"\xff,1\n")
    with pytest.raises(BadInput, match="not UTF-8"):
        read_latency(tmp_path / "s.csv")
