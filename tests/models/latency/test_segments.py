from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptive_spec.models.latency import segments
from adaptive_spec.models.latency.segments import FLAT, STEEP_PENALTIES, fit_segments, partition
from adaptive_spec.offline.fit_samples import fit_samples
from tests.curves import load


def cost_of(x: np.ndarray, y: np.ndarray, w: np.ndarray, penalty: float) -> float:
    """Weighted squared residual and prior of the best line over all points."""
    mean_x, mean_y = np.average(x, weights=w), np.average(y, weights=w)
    xx, xy, yy = w @ (x - mean_x) ** 2, w @ ((x - mean_x) * (y - mean_y)), w @ (y - mean_y) ** 2
    if len(x) == 1:
        return 0.0
    ridge = (mean_x / (mean_y * FLAT)) ** 2
    return float(yy - max(xy**2 / (xx + ridge), xy**2 / xx - STEEP_PENALTIES * penalty))


def least_cost(x: np.ndarray, y: np.ndarray, w: np.ndarray, penalty: float) -> float:
    """Of all partitions, without dropping any break."""
    least = [-penalty]
    for end in range(1, len(x) + 1):
        least.append(min(least[i] + penalty + cost_of(x[i:end], y[i:end], w[i:end], penalty) for i in range(end)))
    return least[-1]


@given(
    y=st.lists(st.floats(0.5, 5.0), min_size=1, max_size=40),
    gap=st.integers(1, 40),
    weight=st.sampled_from([0.1, 1.0, 50.0, 2000.0]),
    trend=st.floats(-0.01, 0.1),
    penalty=st.floats(0.001, 20.0),
)
def test_partition_reaches_the_least_cost(y: list[float], gap: int, weight: float, trend: float, penalty: float) -> None:
    n = len(y)
    rng = np.random.default_rng(n)
    x, w = np.cumsum(rng.integers(1, gap + 1, n)).astype(float), weight * rng.uniform(0.1, 10.0, n)
    values = np.array(y) + 5.0 * np.maximum(trend * x, -0.09)
    starts = partition(x, values, w, penalty)
    pieces = [slice(*ends) for ends in zip(starts, [*starts[1:], n], strict=True)]
    found = sum(cost_of(x[p], values[p], w[p], penalty) for p in pieces) + penalty * (len(starts) - 1)
    assert found == pytest.approx(least_cost(x, values, w, penalty), rel=1e-9, abs=1e-7)


@pytest.mark.parametrize("tile", [8, 40, 150])
def test_many_points_are_partitioned_as_well_in_two_steps(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(tile)
    x = np.arange(1.0, 1025.0)
    y = 1.2 ** np.minimum((x - 1) // tile, 20) * (1.0 + 0.1 * x / 1024) * np.exp(0.01 * rng.standard_normal(1024))
    w, penalty = 1.0 / (5e-4 * y * y), 3.0 * np.log(1024)
    found = partition(x, y, w, penalty)
    monkeypatch.setattr(segments, "EXACT_POINTS", 1024)
    assert found == partition(x, y, w, penalty)
    assert found == list(range(0, min(21 * tile, 1024), tile))


def test_each_line_is_the_best_of_its_segment() -> None:
    rng = np.random.default_rng(2)
    x, w = np.arange(1.0, 41.0), rng.uniform(1e5, 1e6, 40)
    y = np.where(x <= 20, 1.0 + 0.002 * x, 2.0 + 0.05 * x)
    fitted = fit_segments(x, y, w, 10.0)
    assert [(s.first, s.last) for s in fitted] == [(1, 20), (21, 40)]
    for segment, (intercept, slope) in zip(fitted, ((1.0, 0.002), (2.0, 0.05)), strict=True):
        assert (segment.intercept_s, segment.slope_s_per_token) == pytest.approx((intercept, slope), rel=1e-3)


@pytest.mark.parametrize("n", [31, 32, 33, 64, 65, 200])
def test_partition_across_blocks_finds_every_step_of_a_staircase(n: int) -> None:
    x = np.arange(1.0, n + 1)
    y = 1.0 + np.floor((x - 1) / 16)
    assert partition(x, y, np.full(n, 1e4), 10.0) == list(range(0, n, 16))


@pytest.mark.parametrize("seed", range(50))
def test_weights_beyond_a_floats_precision_end_in_a_partition(seed: int) -> None:
    """Once, nothing was left of a light point in the sums, and the breaks were followed for ever."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 60))
    x = np.sort(rng.choice(np.arange(1.0, 1 << 20), n, replace=False))
    starts = partition(x, 10.0 ** rng.uniform(-7.0, 3.5, n), 10.0 ** rng.uniform(-8.0, 30.0, n), 1.0)
    assert starts[0] == 0
    assert starts == sorted(set(starts))
    assert starts[-1] < n


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


CASES = {
    # Pairs around every boundary; counts of a server with padded graphs; cards without tiles.
    "pairs": ([1, 2, 4, 8, 16, 32, 33, 64, 65, 128, 129, 256, 257, 512, 513],
              [2.0, 2.0, 2.03, 2.04, 2.11, 2.21, 2.99, 3.11, 4.19, 4.42, 6.59, 6.85, 10.41, 8.82, 13.17],
              [32, 64, 128, 256, 512]),
    "padded": ([2, 4, 8, 16, 32, 64, 128, 256], [5.0, 4.99, 5.05, 5.08, 6.35, 6.46, 8.75, 13.54], [16, 64, 128]),
    "linear": ([1, 2, 4, 8, 16, 32, 64], [25.0, 31.0, 43.0, 67.0, 115.0, 211.0, 403.0], []),
    "proportional": ([8, 16, 32, 64, 128], [8.0, 16.0, 32.0, 64.0, 128.0], []),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_sparse_grids_give_boundaries_and_lines_that_can_be(name: str) -> None:
    counts, ms, boundaries = CASES[name]
    rng = np.random.default_rng(3)
    tokens = np.repeat(counts, 8)
    fit = fit_samples(tokens, np.repeat(ms, 8) * 1e-3 * np.exp(0.008 * rng.standard_normal(len(tokens))), 0.15)
    assert [b.tokens for b in fit.boundaries] == boundaries
    for segment in fit.segments:
        assert segment.intercept_s >= -1e-12
        assert segment.slope_s_per_token * segment.first <= 1.05 * max(ms) * 1e-3
    if boundaries == []:
        between = np.arange(counts[0], counts[-1])
        np.testing.assert_allclose(fit.line_s(between), np.interp(between, counts, ms) * 1e-3, rtol=0.06)


def staircase_on(rng: np.random.Generator, grid_kind: str) -> tuple[np.ndarray, ...]:
    """A random staircase on one kind of grid: counts, boundaries, their true jump ratios, samples (tokens, seconds)."""
    top, tile = int(rng.choice([256, 512, 1024])), int(rng.choice([16, 32, 64, 96, 128, 160]))
    edges = np.arange(tile, top, tile) if rng.random() < 0.5 else 2 ** np.arange(3, int(np.log2(top)))
    # Counts that double hide a boundary among others: a jump at most doublings looks like a line.
    large = rng.permutation(len(edges)) < (4 if grid_kind == "doubling" else 7)
    jumps = np.where(large, rng.uniform(0.2, 0.7, len(edges)), rng.uniform(0.0, 0.01, len(edges)))
    doublings = 2 ** np.arange(int(np.log2(top)) + 1)
    ks = rng.choice(7, 2, replace=False) + 2
    graphs = np.array([1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128])
    grids = {
        "dense": np.arange(1, top + 1), "doubling": doublings, "pairs": np.concatenate((doublings, edges, edges + 1)),
        "padded": (graphs[:, None] * ks).ravel(),
    }  # fmt: skip
    grid = np.unique(grids[grid_kind])
    grid = grid[grid <= top]
    rise, base = rng.uniform(0.0, 0.06), rng.uniform(1e-3, 30e-3)
    true = np.array([base * np.prod(1 + jumps[edges < t]) * (1 + rise * ((t - 1) % tile) / tile) for t in range(1, top + 2)])
    tokens = np.repeat(grid, int(rng.choice([3, 5, 20])))
    seconds = true[tokens - 1] * np.exp(rng.uniform(0.004, 0.02) * rng.standard_normal(len(tokens)))
    return grid, edges, true[edges] / true[edges - 1], tokens, seconds


@pytest.mark.parametrize("grid_kind", ["dense", "doubling", "pairs", "padded"])
def test_recall_and_precision_on_random_staircases(grid_kind: str) -> None:
    """Jumps of 17 % or more are found, steps below 12 % are not; between, noise decides; two jumps in one gap are not judged."""
    rng = np.random.default_rng(17)
    hits = misses = false = 0
    for _ in range(60):
        grid, edges, ratios, tokens, seconds = staircase_on(rng, grid_kind)
        fit = fit_samples(tokens, seconds, 0.15)
        found = {b.tokens for b in fit.boundaries}
        for low, high in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
            inside = ratios[(edges >= low) & (edges < high)]
            if (inside >= 1.17).sum() == 1:
                hits, misses = hits + (low in found), misses + (low not in found)
            elif not (inside >= 1.12).any() and np.prod(inside) < 1.12:
                false += low in found
        assert min(s.intercept_s for s in fit.segments) >= 0.0
    assert hits / (hits + misses) >= 0.97
    assert hits / max(hits + false, 1) >= 0.97
