"""What a switch of K leaves behind in SGLang: lines are limited, and the list of changes stays short and says the same."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, MutableSequence
from typing import Any

import pytest

from adaptive_spec.engines.sglang.switch_upkeep import (
    LINE_INTERVAL_S,
    LINES_AT_ONCE,
    LOGGERS,
    LimitLines,
    SwitchUpkeep,
    drop_overridden,
    limit_lines,
)

BEGIN = "Switch adaptive runtime state"


def _record(text: str) -> logging.LogRecord:
    return logging.LogRecord("sglang", logging.INFO, "file", 1, text, None, None)


def test_lines_are_limited_and_counted() -> None:
    now_s = [100.0]
    limit = LimitLines(BEGIN, lambda: now_s[0])
    passed = [limit.filter(_record(f"{BEGIN}: steps 1 -> 3")) for _ in range(LINES_AT_ONCE + 100)]
    assert sum(passed) == LINES_AT_ONCE
    assert limit.filter(_record("Capture CUDA graph")), "other lines pass"
    now_s[0] += LINE_INTERVAL_S
    next_one = _record(f"{BEGIN}: steps 3 -> 1")
    assert limit.filter(next_one)
    assert next_one.getMessage() == f"{BEGIN}: steps 3 -> 1 (100 lines like this one were left out before it by adaptive-spec)"
    now_s[0] += LINE_INTERVAL_S
    assert limit.filter(quiet := _record(BEGIN))
    assert quiet.getMessage() == BEGIN, "none was left out"


def test_each_logger_has_one_filter() -> None:
    try:
        limit_lines()
        limit_lines()
        assert [len(logging.getLogger(name).filters) for name in LOGGERS] == [1, 1]
    finally:
        for name in LOGGERS:
            logging.getLogger(name).filters.clear()


def _replayed(entries: MutableSequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for _, fields in entries:
        values.update(fields)
    return values


def test_the_list_stays_short_and_says_the_same() -> None:
    dice = random.Random(4)
    whole: list[tuple[str, Mapping[str, Any]]] = []
    short: list[tuple[str, Mapping[str, Any]]] = []
    for step in range(3000):
        if step % 500 == 7:  # another component's change of other fields, and of one of the same
            entry = (f"set_internal_state {step}", {"max_running": step, "speculative_num_steps": -step})
        else:
            k = dice.choice((0, 1, 3, 7))
            entry = ("adaptive_spec.restore", {"speculative_num_steps": k, "speculative_num_draft_tokens": k + 1})
        whole.append(entry)
        short.append(entry)
        drop_overridden(short)
        assert _replayed(short) == _replayed(whole)
    assert len(short) == 13, "six changes of others and the last switch before and after each"


def test_an_entry_with_a_field_of_its_own_stays() -> None:
    entries: list[tuple[str, Mapping[str, Any]]] = [("a", {"x": 1, "y": 1}), ("a", {"x": 2}), ("b", {"x": 3}), ("b", {"x": 4})]
    drop_overridden(entries)
    assert entries == [("a", {"x": 1, "y": 1}), ("a", {"x": 2}), ("b", {"x": 4})]


def test_a_list_that_is_not_there_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    upkeep = SwitchUpkeep()  # there is no SGLang here
    for _ in range(3):
        upkeep()
    assert upkeep.failures == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
