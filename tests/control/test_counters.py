from __future__ import annotations

import pytest

from adaptive_spec.control.counters import Counters


def test_a_negative_probe_loss_survives_a_restart() -> None:
    counters = Counters(3)
    counters.probe_lost_s = -0.25
    again = Counters(3)
    again.restore(counters.state())
    assert again.probe_lost_s == -0.25


def test_other_counters_are_never_negative() -> None:
    counters = Counters(3)
    counters.decode_s = -0.25
    with pytest.raises(ValueError, match="negative"):
        Counters(3).restore(counters.state())
