from __future__ import annotations

import numpy as np
import pytest

from adaptive_spec.offline.fit_samples import fit_samples


def test_fit_samples_ignores_the_first_replays_and_spikes_of_repeated_counts() -> None:
    tokens = np.repeat([8, 16, 24, 32], 9)
    seconds = np.where(tokens <= 16, 0.010, 0.015)
    seconds[::9] *= 2.0
    fit = fit_samples(tokens, seconds, 0.15)
    assert [b.tokens for b in fit.boundaries] == [16]
    assert fit.boundaries[0].jump_ratio == pytest.approx(1.5, rel=0.02)
