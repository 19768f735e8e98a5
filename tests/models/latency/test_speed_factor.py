from __future__ import annotations

import math

import numpy as np
import pytest

from adaptive_spec.models.latency.robust_mean import FAR, RobustMeans
from adaptive_spec.models.latency.speed_factor import LASTING, WINDOW, SpeedFactor

SIGMA = 0.03


def follow(speed_factor: SpeedFactor, true: np.ndarray, rng: np.random.Generator, noise: float = SIGMA) -> int:
    """Feed residuals of machines whose speed factor is `true` [n]; returns how often it was news."""
    news = 0
    for value in true:
        speed_factor.follow(float(value - speed_factor.value + rng.normal(0.0, noise)), SIGMA)
        news += speed_factor.news() is not None
    return news


def test_a_jump_is_followed_within_two_windows_and_is_news_once() -> None:
    rng = np.random.default_rng(0)
    speed_factor = SpeedFactor()
    assert follow(speed_factor, np.zeros(400), rng) == 0
    follow(speed_factor, np.full(2 * WINDOW, 0.3), rng)
    assert speed_factor.value == pytest.approx(0.3, abs=0.03)
    assert follow(speed_factor, np.full(400, 0.3), rng) == 1


def test_a_slow_drift_is_followed_and_noise_is_averaged_out() -> None:
    rng = np.random.default_rng(1)
    speed_factor = SpeedFactor()
    assert follow(speed_factor, np.zeros(2000), rng) == 0
    assert abs(speed_factor.value) < SIGMA / 3
    follow(speed_factor, np.linspace(0.0, 0.2, 1000), rng)
    assert speed_factor.value == pytest.approx(0.2, abs=0.03)


def test_a_burst_shorter_than_lasting_is_no_news() -> None:
    rng = np.random.default_rng(2)
    speed_factor = SpeedFactor()
    follow(speed_factor, np.zeros(300), rng)
    assert follow(speed_factor, np.concatenate((np.full(LASTING - WINDOW, 0.4), np.zeros(300))), rng) == 0
    assert abs(speed_factor.value) < 0.02


def test_spikes_move_nothing() -> None:
    rng = np.random.default_rng(3)
    speed_factor = SpeedFactor()
    for _ in range(3000):
        spike = math.log(5.0) if rng.random() < 0.02 else 0.0
        speed_factor.follow(float(rng.normal(0.0, SIGMA)) + spike - speed_factor.value, SIGMA)
    assert abs(speed_factor.value) < 0.01


def test_a_cell_is_doubted_at_a_tempo_it_was_not_measured_at_and_believed_again_when_the_tempo_returns() -> None:
    rng = np.random.default_rng(4)
    table = RobustMeans(64)

    def feed(keys: list[int], factor: float, steps: int, start: int) -> None:
        for step in range(start, start + steps):
            key = keys[step % len(keys)]
            table.observe(key, 0.0, 0.001 * key * factor * float(np.exp(rng.normal(0.0, 0.01))), step)

    feed([8, 16], 1.0, 400, 0)
    settled = table.doubt(table.cells[16])
    feed([8], 1.2, 200, 400)
    doubted = table.doubt(table.cells[16])
    rows = {int(row[0]): row for row in table.rows()}
    assert settled < 0.01 < 0.08 < doubted
    assert rows[16][3] == pytest.approx(1.2 * 0.016, rel=0.03), "it is expected to have moved with the others"
    assert rows[16][1] < 0.1 * rows[8][1]
    feed([16], 1.2, 20, 600)
    assert table.doubt(table.cells[16]) < 0.01


def test_a_cell_that_changes_alone_makes_the_others_doubtful() -> None:
    rng = np.random.default_rng(5)
    table = RobustMeans(64)
    step = 0
    for _ in range(400):
        for key in (8, 16, 24):
            step += 1
            table.observe(key, 0.0, 0.001 * key * float(np.exp(rng.normal(0.0, 0.01))), step)
    assert table.doubt(table.cells[24]) < 0.01
    for i in range(400):
        step += 1
        key, slower = (16, 1.4) if i % 8 == 0 else (8, 1.0)
        table.observe(key, 0.0, 0.001 * key * slower * float(np.exp(rng.normal(0.0, 0.01))), step)
    assert table.doubt(table.cells[24]) > 0.1
    assert table.cells[16].mean_y * math.exp(table.speed_factor.value) == pytest.approx(1.4 * 0.016, rel=0.03)


def test_on_a_machine_in_turmoil_counts_not_seen_keep_a_sane_price() -> None:
    """Repeated bursts of up to ten times while only some counts are measured: no count may follow the speed factor away."""
    rng = np.random.default_rng(6)
    table = RobustMeans(64)
    for step in range(300):
        key = (8, 16, 24, 64)[step % 4]
        table.observe(key, 0.0, 0.001 * key * float(np.exp(rng.normal(0.0, 0.03))), step)
    step, slower = 300, 1.0
    for _ in range(400):
        slower = 1.0 if slower > 1.0 else float(rng.uniform(1.5, 10.0))
        for _ in range(int(rng.integers(5, 60))):
            step += 1
            key = int(rng.choice([8, 16, 24]))
            table.observe(key, 0.0, 0.001 * key * slower * float(np.exp(rng.normal(0.0, 0.1))), step)
    seconds = {int(row[0]): row[3] for row in table.rows()}
    assert 0.064 / 2.5 < seconds[64] < 0.064 * 2.5
    for _ in range(300):
        step += 1
        key = int(rng.choice([8, 16, 24]))
        table.observe(key, 0.0, 0.001 * key * float(np.exp(rng.normal(0.0, 0.03))), step)
    seconds = {int(row[0]): row[3] for row in table.rows()}
    assert [seconds[k] / k for k in (8, 16, 24)] == pytest.approx([0.001] * 3, rel=0.1)


def test_rows_doubt_every_cell_as_one_is_doubted_alone_and_leave_out_those_of_another_world() -> None:
    rng = np.random.default_rng(8)
    table = RobustMeans(64)
    for step in range(4000):
        key = int(rng.integers(1, 20)) if step < 2000 else int(rng.integers(8, 20))
        factor = 1.0 if step < 2000 else 1.4 if step < 3900 else 9.0
        table.observe(key, 0.0, 0.01 * (1 + key // 8) * factor * float(rng.lognormal(0.0, 0.02)), step)
        if step in (1999, 3899):
            rows = table.rows()
            assert len(rows) == len(table.cells)
            alone = [table.doubt(table.cells[int(key)]) for key in rows[:, 0]]
            np.testing.assert_allclose(rows[:, 6], alone, rtol=1e-12)
            weights = [
                1 / (1 / table.cells[int(k)].weight + (d / table.sigma) ** 2) for k, d in zip(rows[:, 0], alone, strict=True)
            ]
            np.testing.assert_allclose(rows[:, 1], weights, rtol=1e-12)
    assert set(table.rows()[:, 0].astype(int)) == {
        k for k, c in table.cells.items() if abs(table.speed_factor.announced - c.speed_factor) <= FAR
    }
    assert len(table.rows()) < len(table.cells)


def test_a_short_burst_makes_no_other_world() -> None:
    rng = np.random.default_rng(9)
    table = RobustMeans(64)
    for step in range(1000):
        table.observe(step % 10 + 1, 0.0, 0.01 * float(rng.lognormal(0.0, 0.02)), step)
    for step in range(1000, 1030):
        table.observe(1, 0.0, 0.08 * float(rng.lognormal(0.0, 0.02)), step)
    assert table.speed_factor.value > FAR
    assert len(table.rows()) == 10
