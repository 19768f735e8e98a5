from __future__ import annotations

import pytest

from adaptive_spec.control.counters import Counters


def test_a_negative_probe_loss_survives_a_restart() -> None:
    counters = Counters(3)
    counters.probe_lost_s = -0.25
    again = Counters(3)
    again.restore(counters.state())
    assert again.probe_lost_s == -0.25


def test_event_ids_rise_and_are_not_used_again_after_a_restart() -> None:
    counters = Counters(3)
    for _ in range(150):
        counters.event(1.0, "swap", "K 1→2")
    assert [e.id for e in counters.events] == list(range(51, 151)), "the latest 100"
    again = Counters(3)
    again.restore(counters.state())
    again.event(2.0, "swap", "K 2→1")
    assert [e.id for e in again.events] == [151]


def test_other_counters_are_never_negative() -> None:
    counters = Counters(3)
    counters.decode_s = -0.25
    with pytest.raises(ValueError, match="negative"):
        Counters(3).restore(counters.state())
