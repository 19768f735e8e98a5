"""`adaptive-spec record`: a live engine's steps in a trace, within bounds."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from adaptive_spec.cli.record import TraceBuffer
from adaptive_spec.storage.trace import load_trace
from tests.support.numbers_engine import NumbersEngine
from tests.support.processes import assert_one_line, run_cli, wait_for
from tests.support.wire import record_of


def test_the_buffer_keeps_the_newest_steps() -> None:
    buffer = TraceBuffer(most_steps=10, most_bytes=1 << 30)
    for i in range(25):
        buffer.add(record_of(i))
    assert [record.step for record in buffer.records] == list(range(15, 25))
    assert buffer.dropped == 15


def test_the_buffer_is_bounded_by_bytes_and_copies_out_of_the_ring() -> None:
    slot = np.zeros((64, 7), dtype=np.float32)
    buffer = TraceBuffer(most_steps=1_000_000, most_bytes=100_000)
    for i in range(200):
        buffer.add(replace(record_of(i), confidences=slot))
        assert buffer.bytes <= 100_000
    assert 0 < len(buffer.records) < 60
    slot[:] = 1.0
    assert not buffer.records[0].confidences.any()


def test_record_says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    assert_one_line(run_cli("record", "--runtime-dir", tmp_path, "--out", tmp_path / "t.npz"), "--runtime-dir", "no engine")
    NumbersEngine(tmp_path).close()
    assert_one_line(run_cli("record", "--runtime-dir", tmp_path, "--out", tmp_path / "no" / "t.npz"), "--out")
    result = run_cli("record", "--runtime-dir", tmp_path, "--out", tmp_path / "t.npz", "--duration", "0.2")
    assert_one_line(result, "no decode step")
    assert not (tmp_path / "t.npz").exists()


@pytest.mark.parametrize("ended_by", ["duration", "signal"])
def test_a_live_engine_is_recorded_and_replayed(tmp_path: Path, ended_by: str) -> None:
    numbers = NumbersEngine(tmp_path)
    out = tmp_path / "t.npz"
    command = [sys.executable, "-m", "adaptive_spec.cli", "record", "--runtime-dir", str(tmp_path), "--out", str(out)]
    command += ["--steps", "500"] + (["--duration", "6"] if ended_by == "duration" else [])
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        begun_s = time.monotonic()
        while process.poll() is None:
            numbers.run(0.2)
            if ended_by == "signal" and time.monotonic() - begun_s > 5.0:
                process.terminate()
                wait_for(lambda: process.poll() is not None, "the end of record")
        assert process.returncode == 0
        assert process.stdout is not None
        assert "steps of test numbers written to" in process.stdout.read()
    numbers.close()
    trace = load_trace(out)
    assert trace.info == numbers.info
    assert 2 <= len(trace.records) <= 500
    steps = [record.step for record in trace.records]
    assert steps == list(range(steps[0], steps[0] + len(steps)))
    result = run_cli("replay", out, "--policies", "adaptive,static-1", "--json", tmp_path / "r.json")
    assert result.returncode == 0, result.stderr
    assert "static-1" in result.stdout
    assert (tmp_path / "r.json").exists()
