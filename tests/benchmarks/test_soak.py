"""The evaluation of a soak, on numbers."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.soak import GROWTH, slow_call_lines, trend, trend_lines
from benchmarks.timed_tap import CALLS, KEPT, CallTimes, SlowCall

TIMES_S = [5.0 * i for i in range(720)]


def test_what_stays_the_same_is_flat() -> None:
    found = trend("series", "series", TIMES_S, [400.0] * 720)
    assert (found.first, found.last, found.slope_per_hour, found.grew, found.flat) == (400.0, 400.0, 0.0, 0.0, True)


def test_more_series_in_the_second_half_are_growth() -> None:
    found = trend("series", "series", TIMES_S, [400.0] * 500 + [430.0] * 220)
    assert not found.flat
    assert "GREW" in trend_lines([found])[1]


def test_a_leak_is_found_under_noise_and_its_slope_is_right() -> None:
    noise = np.random.default_rng(1).normal(0.0, 1.0, 720)
    leak = trend("sidecar_mb", "MB", TIMES_S, [120.0 + 20.0 * t / 3600.0 + n for t, n in zip(TIMES_S, noise, strict=True)])
    assert leak.slope_per_hour == pytest.approx(20.0, abs=1.5)
    assert leak.grew == pytest.approx(10.0, abs=0.8)
    assert not leak.flat
    assert trend("sidecar_mb", "MB", TIMES_S, (120.0 + noise).tolist()).flat


def test_growth_while_it_starts_is_none() -> None:
    values = [min(100.0, 20.0 + t) for t in TIMES_S]
    found = trend("engine_mb", "MB", TIMES_S, values)
    assert found.last - found.first > GROWTH["MB"]
    assert found.flat


def test_the_slowest_calls_are_kept_and_told_apart() -> None:
    times = CallTimes()
    for number in range(100):
        times.add(SlowCall(float(number), 0.01, 1, 0, 0, 0, False, number))
    times.add(SlowCall(200.0, 190.0, 0, 5, 0, 1, True, 7))
    assert times.calls == 101
    assert [slow.wall_ms for slow in times.slowest] == [200.0, *(float(n) for n in range(99, 100 - KEPT, -1))]
    assert [slow.ours for slow in times.slowest[:2]] == [True, False]
    document = {name: {"calls": 101, "total_ms": times.total_ms, "slowest": times.slowest} for name in CALLS}
    lines = slow_call_lines(document)
    assert "its own work" in lines[1]
    assert "took a policy over" in lines[1]
    assert "the thread was not run" in lines[2]
