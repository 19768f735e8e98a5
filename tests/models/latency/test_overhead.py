"""Overhead is a difference of measured times: its mean is learnt without bias, whatever the noise."""

from __future__ import annotations

import numpy as np
import pytest

from adaptive_spec.models.latency.overhead import OverheadModel


@pytest.mark.parametrize("sd_ms", [0.02, 0.05, 0.1, 0.2])
@pytest.mark.parametrize("samples", [8, 50, 400])
def test_additive_noise_gives_no_bias(sd_ms: float, samples: int) -> None:
    learnt = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        model = OverheadModel(7, 8)
        for n in range(samples):
            model.observe(5, 4, 1e-4 + sd_ms * 1e-3 * rng.standard_normal())
            if n % 10 == 0:
                model.refit()
        model.refit()
        learnt.append(1e3 * model.predict(7, 8)[0][5, 4])
    # Overheads are kept >= 0, which raises the mean of few samples with noise of twice the overhead.
    assert np.mean(learnt) == pytest.approx(
        0.1, abs=0.015 + 2.0 * sd_ms / np.sqrt(60 * min(samples, 256)) + (samples < 9) * 0.1 * sd_ms
    )


def test_plans_never_run_cost_the_common_overhead() -> None:
    rng = np.random.default_rng(1)
    model = OverheadModel(7, 64)
    for _ in range(400):
        model.observe(3, 8, 5e-4 + 2e-5 * rng.standard_normal())
    model.refit()
    seconds, error_s = model.predict(7, 64)
    assert seconds[7, 64] == pytest.approx(5e-4, rel=0.15)
    assert error_s[7, 64] > 3.0 * error_s[3, 8]


def test_spikes_are_clipped_and_a_lasting_change_is_followed() -> None:
    rng = np.random.default_rng(2)
    model = OverheadModel(3, 8)
    for n in range(300):
        model.observe(2, 4, (5e-3 if n % 50 == 25 else 1e-4) + 1e-5 * rng.standard_normal())
        model.refit()
    assert model.predict(3, 8)[0][2, 4] == pytest.approx(1e-4, rel=0.1)
    for _ in range(60):
        model.observe(2, 4, 6e-4 + 1e-5 * rng.standard_normal())
        model.refit()
    assert model.predict(3, 8)[0][2, 4] == pytest.approx(6e-4, rel=0.1)


def test_the_state_comes_back_and_a_damaged_one_is_refused() -> None:
    model = OverheadModel(3, 8)
    for k in range(50):
        model.observe(k % 4, 1 + k % 8, 1e-4 * (1 + k % 4))
    model.refit()
    again = OverheadModel(3, 8)
    again.restore(model.state())
    np.testing.assert_allclose(again.predict(3, 8)[0], model.predict(3, 8)[0])
    for damaged in (model.state()[:, :3], np.full((4, 6), np.nan), -model.state()):
        with pytest.raises(ValueError, match="overhead"):
            again.restore(damaged)
