"""Traces: what is kept, how much of it, and that a damaged file is one line."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from adaptive_spec.cli.record import TraceBuffer
from adaptive_spec.errors import BadInput
from adaptive_spec.storage.archive import save_archive
from adaptive_spec.storage.trace import Trace, load_trace, save_trace
from tests.support.numbers_engine import NumbersEngine
from tests.support.processes import assert_one_line, run_cli, wait_for
from tests.support.wire import engine, record_of


def test_a_trace_comes_back_as_it_was_written(tmp_path: Path) -> None:
    records = tuple(record_of(i, rows=1 + i % 5, k=i % 8) for i in range(1, 40))
    save_trace(tmp_path / "t.npz", Trace(engine(), records, lost=3))
    trace = load_trace(tmp_path / "t.npz")
    assert (trace.info, trace.lost, len(trace.records)) == (engine(), 3, 39)
    for again, record in zip(trace.records, records, strict=True):
        for field in fields(record):
            wrote, read = getattr(record, field.name), getattr(again, field.name)
            assert np.array_equal(wrote, read)
            assert np.shape(wrote) == np.shape(read)


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


def test_what_is_no_trace_is_refused_in_one_line(tmp_path: Path) -> None:
    for name, words in (("none.npz", "no such file"), ("text.npz", "trace"), ("other.npz", "trace"), ("torn.npz", "damaged")):
        path = tmp_path / name
        if name == "text.npz":
            path.write_text("hello")
        elif name == "other.npz":
            save_archive(path, "calibration", {"a": np.zeros(3)})
        elif name == "torn.npz":
            save_trace(path, Trace(engine(), (record_of(1), record_of(2)), 0))
            path.write_bytes(path.read_bytes()[:-200])
        with pytest.raises(BadInput, match=words) as error:
            load_trace(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
    assert_one_line(run_cli("replay", tmp_path / "text.npz"), "TRACE", "text.npz")


def test_records_that_say_the_impossible_are_refused(tmp_path: Path) -> None:
    wrong = replace(record_of(1, rows=4, k=3), accept_len=np.full(4, 3, np.uint8), verify_len=np.full(4, 2, np.uint8))
    save_trace(tmp_path / "t.npz", Trace(engine(), (wrong,), 0))
    with pytest.raises(BadInput, match="step 1 says the impossible"):
        load_trace(tmp_path / "t.npz")


def test_record_says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    assert_one_line(run_cli("record", "--runtime-dir", tmp_path, "--out", tmp_path / "t.npz"), "--runtime-dir", "no engine")
    NumbersEngine(tmp_path).close()
    assert_one_line(run_cli("record", "--runtime-dir", tmp_path, "--out", tmp_path / "no" / "t.npz"), "--out")
    result = run_cli("record", "--runtime-dir", tmp_path, "--out", tmp_path / "t.npz", "--duration", "0.2")
    assert_one_line(result, "no step")
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
