"""Traces: round trip, and one line for a damaged file."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adaptive_spec.errors import BadInput
from adaptive_spec.storage.archive import load_archive, save_archive
from adaptive_spec.storage.trace import TRACE, Trace, load_trace, save_trace
from tests.support.processes import assert_one_line, run_cli
from tests.support.wire import engine, record_of


def test_trace_round_trip(tmp_path: Path) -> None:
    records = tuple(record_of(i, rows=1 + i % 5, k=i % 8) for i in range(1, 40))
    save_trace(tmp_path / "t.npz", Trace(engine(), records, lost=3))
    trace = load_trace(tmp_path / "t.npz")
    assert (trace.info, trace.lost, len(trace.records)) == (engine(), 3, 39)
    for again, record in zip(trace.records, records, strict=True):
        for field in fields(record):
            wrote, read = getattr(record, field.name), getattr(again, field.name)
            assert np.array_equal(wrote, read)
            assert np.shape(wrote) == np.shape(read)


def test_a_file_that_is_not_a_trace_is_refused_in_one_line(tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    ("arrays", "meta"),
    [
        ({}, {"lost": float("inf")}),
        ({}, {"lost": float("nan")}),
        ({}, {"lost": -1}),
        ({}, {"lost": 1e3}),
        ({}, {"lost": "1"}),
        ({"confidences": np.float32(0.5)}, {}),
        ({"verify_len": np.uint8(1)}, {}),
        ({"request_ids": np.zeros((2, 2), np.uint32)}, {}),
        ({"counts": np.zeros((2, 10))}, {}),
        ({"counts": np.full((2, 10), "x")}, {}),
        ({"counts": np.full((2, 10), -1, np.int64)}, {}),
        ({"counts": np.full((2, 10), 2**62, np.int64)}, {}),
        ({"counts": np.array([[-1, 0, 0, 0, 6, 6, 2, 2, 2, 0]] * 2)}, {}),
        ({"seconds": np.full((2, 4), "x")}, {}),
        ({"seconds": np.full((2, 4), np.nan)}, {}),
        ({"confidences": np.full(24, "x")}, {}),
    ],
)
def test_whatever_a_trace_holds_it_is_one_line(
    tmp_path: Path, arrays: dict[str, np.ndarray[Any, Any]], meta: dict[str, object]
) -> None:
    path = tmp_path / "t.npz"
    save_trace(path, Trace(engine(), (record_of(1), record_of(2)), 0))
    good = load_archive(path, TRACE)
    changed = {name: np.asarray(array) for name, array in arrays.items()}
    save_archive(path, TRACE, good.arrays | changed, good.meta | meta)
    with pytest.raises(BadInput, match=r"^TRACE: '.*t.npz': must be a trace of adaptive-spec record: ") as error:
        load_trace(path)
    assert "\n" not in str(error.value)


def test_records_with_impossible_values_are_refused(tmp_path: Path) -> None:
    wrong = replace(record_of(1, rows=4, k=3), accept_len=np.full(4, 3, np.uint8), verify_len=np.full(4, 2, np.uint8))
    save_trace(tmp_path / "t.npz", Trace(engine(), (wrong,), 0))
    with pytest.raises(BadInput, match="step 1 has impossible values"):
        load_trace(tmp_path / "t.npz")


def test_a_k_that_the_engine_does_not_run_is_refused(tmp_path: Path) -> None:
    save_trace(tmp_path / "t.npz", Trace(engine(), (record_of(1), record_of(2, rows=1, k=engine().max_k + 1)), 0))
    with pytest.raises(BadInput, match="step 2 has impossible values"):
        load_trace(tmp_path / "t.npz")


def test_there_is_nothing_to_replay_of_an_engine_without_drafts(tmp_path: Path) -> None:
    info = replace(engine(), launch_k=0, candidates=(0,))
    save_trace(tmp_path / "t.npz", Trace(info, tuple(record_of(i, rows=1, k=0) for i in range(1, 9)), 0))
    assert_one_line(
        run_cli("replay", tmp_path / "t.npz"), "t.npz': must be of an engine that can draft, got one that runs K 0 only"
    )
