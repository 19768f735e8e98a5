from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from adaptive_spec.errors import BadInput
from adaptive_spec.offline.fit import fit_files
from adaptive_spec.storage.archive import load_archive
from tests.support.processes import assert_one_line, run_cli

CURVES = Path(__file__).parents[1] / "curves"
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Acceptance is score^1.5: a draft that is too sure of itself."""
    rng = np.random.default_rng(4)
    score = rng.uniform(0.01, 1.0, 6000)
    accepted = rng.random(6000) < score**1.5
    path = tmp_path_factory.mktemp("pairs") / "calibration.csv"
    rows = [f"{s:.6f},{int(a)}" for s, a in zip(score, accepted, strict=True)]
    path.write_text("\n".join(["# made of numbers", "cumulative_score,accepted", *rows]) + "\n")
    return path


def test_fit_of_a_measured_curve(tmp_path: Path, pairs: Path) -> None:
    out = tmp_path / "new" / "folder"
    curve = CURVES / "a100_llama3-8b_tp1.csv"
    result = run_cli("fit", "--latency", curve, "--calibration", pairs, "--out", out, "--json")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert [b for b in document["boundaries"] if b < 1024] == [128, 256, 384, 576, 768]
    assert document["latency_mape"] < 0.03
    firsts = [segment["first"] for segment in document["segments"]]
    lasts = [segment["last"] for segment in document["segments"]]
    assert firsts[0] == 1
    assert lasts[-1] == 2048
    assert all(a < b for a, b in zip(lasts[:-1], firsts[1:], strict=True))
    first = document["segments"][0]
    assert first["intercept_ms"] + first["slope_ms_per_token"] * 64 == pytest.approx(11.5, rel=0.05)
    calibration = document["calibration"]
    assert calibration["samples"] == 6000
    assert calibration["ece"] < 0.03
    assert 0.1 < calibration["brier"] < 0.25
    assert 0.3 < calibration["log_loss"] < 0.693

    written = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    plots = ["plots/calibration.png", "plots/latency_model.png", "plots/token_distribution.png"]
    assert written == ["calibration.npz", "latency_model.npz", *plots]
    for plot in plots:
        assert (out / plot).read_bytes()[:8] == PNG
    boundaries = load_archive(out / "latency_model.npz", "latency_model").arrays["boundaries"]
    assert boundaries[:, 0].tolist() == document["boundaries"]
    probability = load_archive(out / "calibration.npz", "calibration").arrays["probability"]
    assert (np.diff(probability) >= 0.0).all()


def test_one_file(tmp_path: Path, pairs: Path) -> None:
    document = fit_files(None, pairs, tmp_path, 0.15).document()
    assert not (tmp_path / "latency_model.npz").exists()
    assert document["boundaries"] is None
    assert document["segments"] is None
    assert document["calibration"]["kind"]


def test_one_row_is_enough(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("num_tokens,latency_ms\n4,2.0\n")
    (tmp_path / "c.csv").write_text("cumulative_score,accepted\n1,1\n")
    document = fit_files(tmp_path / "l.csv", tmp_path / "c.csv", tmp_path, 0.15).document()
    assert document["boundaries"] == []
    assert document["segments"][0]["first"] == document["segments"][0]["last"] == 4
    assert document["calibration"]["samples"] == 1


def test_output_for_people(tmp_path: Path) -> None:
    result = run_cli("fit", "--latency", CURVES / "a100_llama3-8b_tp1.csv", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "tile boundary" in result.stdout
    assert f"written to {tmp_path}" in result.stdout.replace("\n", "")


def test_bad_input_writes_nothing(tmp_path: Path, pairs: Path) -> None:
    bad = tmp_path / "bad.csv"
    bad.write_text("num_tokens,latency_ms\n1,1\n2,-1\n")
    out = tmp_path / "out"
    result = run_cli("fit", "--latency", bad, "--calibration", pairs, "--out", out)
    assert_one_line(result, str(bad), "line 3: latency_ms: must be a number in 1e-06..3.6e+06, got '-1'")
    assert not out.exists()


def test_out_that_cannot_be_written(tmp_path: Path, pairs: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"--out: .*file': cannot be written"):
        fit_files(None, pairs, tmp_path / "file", 0.15)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ("--out",)),
        (["--out", "x"], ("--latency", "--calibration", "at least one")),
        (["--out", "x", "--latency", "none.csv"], ("none.csv", "cannot be read")),
        (["--out", "x", "--latency", "none.csv", "--jump-threshold", "9"], ("--jump-threshold", "9", "0.02<=x<=2")),
        (["--out", "x", "--latency", "none.csv", "--jump-threshold", "wide"], ("--jump-threshold", "wide")),
    ],
)
def test_bad_options(tmp_path: Path, arguments: list[str], words: tuple[str, ...]) -> None:
    assert_one_line(run_cli("fit", *arguments, cwd=tmp_path), *words)
