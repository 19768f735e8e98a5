from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from adaptive_spec.domain.policy import Granularity
from adaptive_spec.models.latency.padding import Padding
from tests.support.simulated_server import SimulatedServer, engine_info, staircase

RECORD = SimulatedServer(engine_info(Granularity.BATCH), staircase()).step()


def learnt(granularity: Granularity = Granularity.BATCH) -> Padding:
    """Batch sizes 3, 8, 12, 16 and 40, padded to multiples of 8, at K = 2."""
    padding = Padding(granularity)
    for b in (3, 8, 12, 16, 40):
        padded = 3 * 8 * -(-b // 8)
        padding.observe(dataclasses.replace(RECORD, batch_size=b, k=2, num_tokens=3 * b, padded_tokens=padded))
    return padding


def test_sizes_map_to_buckets_as_far_as_they_are_known() -> None:
    table = learnt().table(48)
    assert table[3] == 8
    assert table[5] == 8, "never seen, but the smallest bucket that holds it is known"
    assert table[11] == 16
    assert table[10] == 10, "6 is more padding than was ever seen"
    assert table[20] == 20, "40 holds it, but an unknown smaller bucket may too"
    assert table[48] == 48, "beyond every known bucket"


def test_without_padding_every_size_is_its_own_bucket() -> None:
    np.testing.assert_array_equal(Padding(Granularity.BATCH).table(4), np.arange(5))


def test_padded_token_counts() -> None:
    assert learnt().padded_to([0, 2]) == {
        3: 8, 9: 24, 8: 8, 24: 24, 12: 16, 36: 48, 16: 16, 48: 48, 40: 40, 120: 120,
    }  # fmt: skip
    assert learnt(Granularity.REQUEST).padded_to([0, 2]) == {9: 24, 24: 24, 36: 48, 48: 48, 120: 120}


def test_sizes_that_were_not_seen_for_long_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaptive_spec.models.latency.padding.MOST_SIZES", 3)
    assert learnt().seen == {12: 16, 16: 16, 40: 40}


def test_state_round_trip_and_refusal() -> None:
    twin = Padding(Granularity.BATCH)
    twin.restore(learnt().state())
    np.testing.assert_array_equal(twin.table(48), learnt().table(48))
    for damaged in (np.array([[8.0, 3.0]]), np.array([[-1.0, 3.0]]), np.array([1.0]), np.array([[1.0, np.nan]])):
        with pytest.raises(ValueError, match="padding: must be rows"):
            twin.restore(damaged)
