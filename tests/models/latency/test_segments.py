from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptive_spec.models.latency.segments import line, partition
from adaptive_spec.offline.fit_samples import fit_samples
from tests.curves import load


def cost_of(starts: list[int], x: np.ndarray, y: np.ndarray, w: np.ndarray, penalty: float) -> float:
    total = penalty * (len(starts) - 1)
    for first, last in zip(starts, [*starts[1:], len(x)], strict=True):
        intercept, slope = line(x[first:last], y[first:last], w[first:last])
        total += float(w[first:last] @ (y[first:last] - intercept - slope * x[first:last]) ** 2)
    return total


@given(
    y=st.lists(st.floats(0.5, 5.0), min_size=1, max_size=8),
    gaps=st.lists(st.integers(1, 40), min_size=8, max_size=8),
    weights=st.lists(st.floats(0.1, 50.0), min_size=8, max_size=8),
    penalty=st.floats(0.001, 20.0),
)
def test_partition_reaches_the_brute_force_minimum(y: list[float], gaps: list[int], weights: list[float], penalty: float) -> None:
    n = len(y)
    x, values, w = np.cumsum(gaps[:n]).astype(float), np.array(y), np.array(weights[:n])
    best = min(cost_of([0, *breaks], x, values, w, penalty) for size in range(n) for breaks in combinations(range(1, n), size))
    found = cost_of(partition(x, values, w, penalty), x, values, w, penalty)
    assert found == pytest.approx(best, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("n", [31, 32, 33, 64, 65, 200])
def test_partition_across_blocks_finds_every_step_of_a_staircase(n: int) -> None:
    x = np.arange(1.0, n + 1)
    y = 1.0 + np.floor((x - 1) / 16)
    assert partition(x, y, np.full(n, 1e4), 10.0) == list(range(0, n, 16))


def test_partition_of_nothing_is_nothing() -> None:
    assert partition(np.zeros(0), np.zeros(0), np.zeros(0), 1.0) == []


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ("a100_llama3-8b_tp1", [128, 256, 384, 576, 768]),
        ("h100_llama2-70b_tp4", [128, 256, 384, 512]),
        ("b300_dsv4-flash_tp4", []),
    ],
)
def test_boundaries_of_published_curves(curve: str, expected: list[int]) -> None:
    tokens, seconds = load(curve)
    fit = fit_samples(tokens, seconds, 0.15)
    assert [b.tokens for b in fit.boundaries if b.tokens < 1024] == expected
    assert fit.mape < 0.03
    for boundary in fit.boundaries:
        i = int(np.flatnonzero(tokens == boundary.tokens)[0])
        assert boundary.jump_ratio == pytest.approx(seconds[i + 1] / seconds[i], rel=0.05)


def test_a_dip_is_a_segment_but_no_boundary() -> None:
    tokens, seconds = load("b300_dsv4-flash_tp4")
    fit = fit_samples(tokens, seconds, 0.10)
    predicted, _ = fit.predict(tokens)
    dips = np.flatnonzero(seconds[1:] < 0.93 * seconds[:-1])
    assert len(dips), "the curve is in the tests for its dips"
    for i in dips:
        assert predicted[i + 1] < predicted[i], "the model must follow a falling curve"
        assert all(b.tokens != tokens[i] for b in fit.boundaries)


def test_a_slope_across_a_gap_is_no_jump() -> None:
    tokens = np.array([1, 2, 4, 8, 16, 32, 64, 128, 256])
    fit = fit_samples(tokens, 0.001 * tokens.astype(float), 0.15)
    assert fit.boundaries == ()
