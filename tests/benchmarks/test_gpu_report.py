"""`make gpu-report` on the CPU, as small as it gets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from adaptive_spec.engines.simulated.scenario import load_scenario
from adaptive_spec.offline.samples import read_latency

SMALL = [
    "--device",
    "cpu",
    "--narrow",
    "32",
    "--layers",
    "1",
    "--every",
    "256",
    "--rounds",
    "3",
    "--seconds",
    "1",
    "--context",
    "8",
]


def report(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu_report", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_what_it_writes_can_be_read_again(tmp_path: Path) -> None:
    result = report("--out", str(tmp_path / "report"), *SMALL)
    assert result.returncode == 0, result.stderr
    assert "no CUDA device: this is the CPU" in result.stdout
    document = json.loads((tmp_path / "report" / "report.json").read_text())
    assert set(document["goodput_tokens_per_s"]) == {"adaptive", *(f"static-{k}" for k in range(6))}
    assert min(document["goodput_tokens_per_s"].values()) > 0
    assert document["tap"]["calls_us"] > 0
    assert document["cuda"] is False
    counts = [*range(1, 65), *range(320, 1025, 256)]
    assert load_scenario(tmp_path / "report" / "scenario.yaml").curve.tokens.tolist() == counts
    curve = [line for line in (tmp_path / "report" / "curve.csv").read_text().splitlines() if not line.startswith("#")]
    assert [int(line.split(",")[0]) for line in curve[1:]] == counts
    assert len(read_latency(tmp_path / "report" / "samples.csv").num_tokens) == 3 * len(counts)
    assert (tmp_path / "report" / "plots" / "latency_model.png").stat().st_size > 0


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for arguments in (["--out", str(tmp_path / "file" / "x")], ["--shape", "gpt-5", "--out", "x"], []):
        result = report(*arguments)
        assert result.returncode == 2
        assert result.stderr.startswith("gpu-report: ")
        assert result.stderr.count("\n") == 1
