from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptive_spec.models.latency.plan_cost import PlanCostModel, non_negative_least_squares
from adaptive_spec.models.latency.robust_mean import STALE_STEPS, RobustMean, RobustMeans
from adaptive_spec.models.latency.staircase import LatencyModel, fit_cells
from adaptive_spec.offline.fit_samples import fit_samples
from tests.support.simulated_server import staircase


def feed(
    model: LatencyModel, counts: np.ndarray, curve: object, rng: np.random.Generator, noise: float = 0.02, start: int = 0
) -> int:
    shifts = 0
    for step, tokens in enumerate(counts, start):
        seconds = curve(int(tokens)) * float(np.exp(rng.normal(0.0, noise)))  # type: ignore[operator]  # a Curve
        shifts += model.observe(int(tokens), 1000, seconds, step) is not None
    return shifts


@given(
    samples=st.lists(
        st.tuples(st.sampled_from([1, 2, 3, 5, 8, 13, 21, 34, 55]), st.floats(0.0, 1e5), st.floats(0.8, 1.2)),
        min_size=1,
        max_size=80,
    ),
    memory=st.floats(2.0, 500.0),
)
def test_incremental_refit_equals_batch_refit_on_the_same_weighted_data(
    samples: list[tuple[int, float, float]], memory: float
) -> None:
    decay = 1.0 - 1.0 / memory
    cells: dict[int, RobustMean] = {}
    history: dict[int, list[tuple[float, float]]] = {}
    for key, x, factor in samples:
        y = factor * 0.01 * (1 + key // 8)
        cells.setdefault(key, RobustMean()).add(x, y, decay)
        history.setdefault(key, []).append((x, y))
    batch = {}
    for key, values in history.items():
        weight = np.power(decay, np.arange(len(values) - 1, -1, -1.0))
        batch[key] = RobustMean.from_weighted(np.array([v[0] for v in values]), np.array([v[1] for v in values]), weight)

    def rows(source: dict[int, RobustMean]) -> np.ndarray:
        return np.array([[k, c.weight, c.mean_x, c.mean_y, len(history[k]), 0.0, 0.0] for k, c in sorted(source.items())])

    one, other = rows(cells), rows(batch)
    np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-300)  # subnormal numbers round to 0 or not
    at = np.arange(1, 80)
    a, b = fit_cells(one, 0.02, 0.0, 0.15), fit_cells(other, 0.02, 0.0, 0.15)
    if [s.first for s in a.segments] == [s.first for s in b.segments]:
        np.testing.assert_allclose(a.predict(at), b.predict(at), rtol=1e-9)
    else:
        # Two partitions of equal cost: rounding may pick either, but then both must be equally good.
        assert len(a.segments) == len(b.segments) or a.mape == pytest.approx(b.mape, abs=0.02)


def test_the_model_finds_the_staircase_in_noise_and_spikes() -> None:
    rng = np.random.default_rng(0)
    curve = staircase(tile=16)
    model = LatencyModel(64, 0.15)
    for step in range(6000):
        tokens = int(rng.integers(1, 65))
        spike = 5.0 if rng.random() < 0.01 else 1.0
        model.observe(tokens, 1000, curve(tokens) * spike * float(np.exp(rng.normal(0, 0.03))), step)
    fit = model.refit()
    assert fit is not None
    assert [b.tokens for b in fit.boundaries] == [16, 32, 48]
    predicted, error = fit.predict(np.arange(1, 65))
    truth = np.array([curve(t) for t in range(1, 65)])
    assert np.abs(predicted / truth - 1).max() < 0.02
    assert (error > 0).all()


def test_first_replays_do_not_move_the_summary() -> None:
    model = LatencyModel(64, 0.15)
    for step, seconds in enumerate([0.020, 0.0101, 0.0100, 0.0099, 0.0102]):
        model.observe(32, 0, seconds, step)
    fit = model.refit()
    assert fit is not None
    assert fit.mean_s[0] == pytest.approx(0.0100, rel=0.02)


def test_one_sample_is_enough_to_predict_and_says_how_little_it_knows() -> None:
    model = LatencyModel(64, 0.15)
    assert model.refit() is None
    model.observe(8, 0, 0.01, 0)
    fit = model.refit()
    assert fit is not None
    near, far = fit.predict(np.array([8])), fit.predict(np.array([256]))
    assert near[0][0] == pytest.approx(0.01)
    assert far[1][0] / far[0][0] > 5 * near[1][0] / near[0][0]


def test_a_shift_moves_cells_that_were_not_visited_and_makes_them_doubtful() -> None:
    rng = np.random.default_rng(1)
    curve = staircase(tile=16)
    model = LatencyModel(64, 0.15)
    feed(model, rng.integers(1, 65, 3000), curve, rng)
    before = model.refit()
    assert before is not None
    shifts = feed(model, np.full(60, 20), lambda t: 1.3 * curve(t), rng, start=3000)
    after = model.refit()
    assert after is not None
    assert shifts == 1
    predicted, error = after.predict(np.array([20, 60]))
    assert predicted == pytest.approx([1.3 * curve(20), 1.3 * curve(60)], rel=0.05)
    old_error = before.predict(np.array([60]))[1][0] / before.predict(np.array([60]))[0][0]
    assert error[1] / predicted[1] > 5 * old_error


def test_a_curve_that_changes_under_it_is_followed() -> None:
    rng = np.random.default_rng(2)
    model = LatencyModel(64, 0.15)
    feed(model, rng.integers(1, 65, 4000), staircase(tile=16), rng)
    assert model.refit() is not None
    new = staircase(tile=24, base_s=0.008)
    feed(model, rng.integers(1, 65, 4000), new, rng, start=4000)
    fit = model.refit()
    assert fit is not None
    assert [b.tokens for b in fit.boundaries] == [24, 48]
    predicted, _ = fit.predict(np.arange(1, 65))
    assert np.abs(predicted / np.array([new(t) for t in range(1, 65)]) - 1).max() < 0.05


def test_no_shift_is_seen_in_noise_alone() -> None:
    rng = np.random.default_rng(3)
    model = LatencyModel(64, 0.15)
    assert feed(model, rng.integers(1, 65, 20_000), staircase(tile=16), rng, noise=0.03) == 0


def test_old_cells_begin_again_when_they_are_measured_again() -> None:
    table = RobustMeans(64)
    for step in range(20):
        table.observe(8, 0.0, 0.020, step)
    for step in range(STALE_STEPS, STALE_STEPS + 3):
        table.observe(8, 0.0, 0.010, step)
    assert table.cells[8].mean_y == pytest.approx(0.010), "a count that once measured badly is believed when measured again"


def test_context_term_is_recovered_from_neighbouring_steps() -> None:
    rng = np.random.default_rng(4)
    model = LatencyModel(64, 0.15)
    per_token, kv = 2e-8, 50_000.0
    for step in range(8000):
        kv = kv + 60 if rng.random() > 0.02 else float(rng.integers(20_000, 120_000))
        model.observe(int(rng.choice([16, 32])), int(kv), (0.01 + per_token * kv) * float(np.exp(rng.normal(0, 0.02))), step)
        if step % 500 == 0:
            model.refit()
    model.refit()
    assert model.context_s_per_token == pytest.approx(per_token, rel=0.3)


def test_no_context_term_is_claimed_where_there_is_none() -> None:
    rng = np.random.default_rng(5)
    model = LatencyModel(64, 0.15)
    for step in range(4000):
        model.observe(16, int(rng.integers(1000, 50_000)), 0.01 * float(np.exp(rng.normal(0, 0.02))), step)
    model.refit()
    assert model.context_s_per_token * 25_000 < 0.02 * 0.01


def test_plan_costs_generalise_to_plans_never_run() -> None:
    rng = np.random.default_rng(6)
    model = PlanCostModel(64, 64)
    for step in range(3000):
        k, b = int(rng.choice([1, 3, 5])), int(rng.choice([1, 4, 16, 32]))
        model.observe(k, b, (0.0002 + 0.0004 * k + 1e-5 * k * b) * float(np.exp(rng.normal(0, 0.03))), step)
    model.refit()
    seconds, error = model.predict(7, 64)
    assert seconds[7, 24] == pytest.approx(0.0002 + 0.0028 + 1e-5 * 7 * 24, rel=0.1)
    assert error[7, 24] == pytest.approx(np.hypot(0.08, 0.15 * np.log2(32 / 24)))
    assert error[3, 4] < 0.03
    assert error[3, 64] > error[3, 32] + 0.05


def test_a_large_batch_is_not_charged_for_what_small_ones_cannot_tell() -> None:
    rng = np.random.default_rng(9)
    model = PlanCostModel(64, 256)
    for step in range(600):
        k = int(rng.integers(1, 4))
        model.observe(k, 2, (0.0002 + 0.0017 * k) * float(np.exp(rng.normal(0, 0.03))), step)
    model.refit()
    seconds, error = model.predict(3, 256)
    assert seconds[3, 2] == pytest.approx(0.0053, rel=0.03)
    assert seconds[3, 128] < 2.5 * seconds[3, 2]
    assert error[3, 128] > 0.5


def test_an_absent_stage_costs_nothing() -> None:
    model = PlanCostModel(64, 8)
    for step in range(50):
        model.observe(step % 4, 2, 0.0, step)
    model.refit()
    assert model.predict(7, 8)[0].max() < 1e-5


def test_counts_between_two_tiles_lie_between_their_ends_and_are_unsure() -> None:
    rng = np.random.default_rng(10)
    model = LatencyModel(64, 0.15)
    # A falling tile on the right: its line, continued to the left, would climb above everything measured.
    measured = {8: 0.0140, 16: 0.0142, 32: 0.0145, 48: 0.0149, 288: 0.0312, 336: 0.0294, 384: 0.0294}
    for step in range(700):
        tokens = int(rng.choice(list(measured)))
        model.observe(tokens, 0, measured[tokens] * float(np.exp(rng.normal(0, 0.01))), step)
    fit = model.refit()
    assert fit is not None
    between = np.array([64, 128, 192, 240, 280])
    seconds, error = fit.predict(between)
    assert (seconds <= 0.033).all()
    assert (seconds >= 0.0145).all()
    assert (error[1:4] > 0.2 * seconds[1:4]).all()


def test_state_round_trip_and_refusal() -> None:
    rng = np.random.default_rng(7)
    model = LatencyModel(64, 0.15)
    feed(model, rng.integers(1, 65, 2000), staircase(tile=16), rng)
    model.refit()
    twin = LatencyModel(64, 0.15)
    twin.restore(model.state())
    assert twin.fit is not None
    assert model.fit is not None
    np.testing.assert_allclose(twin.fit.mean_s, model.fit.mean_s)
    assert [b.tokens for b in twin.fit.boundaries] == [b.tokens for b in model.fit.boundaries]
    broken = dict(model.state())
    broken["rows"] = broken["rows"].copy()
    broken["rows"][0, 3] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        twin.restore(broken)


def test_fit_samples_ignores_the_first_replays_and_spikes_of_repeated_counts() -> None:
    tokens = np.repeat([8, 16, 24, 32], 9)
    seconds = np.where(tokens <= 16, 0.010, 0.015)
    seconds[::9] *= 2.0
    fit = fit_samples(tokens, seconds, 0.15)
    assert [b.tokens for b in fit.boundaries] == [16]
    assert fit.boundaries[0].jump_ratio == pytest.approx(1.5, rel=0.02)


def test_non_negative_least_squares_matches_projection() -> None:
    system = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    assert non_negative_least_squares(system, np.array([3.0, 2.0, 1.0])) == pytest.approx([2.0, 0.0], abs=1e-9)
