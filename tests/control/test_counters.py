from __future__ import annotations

import pytest

from adaptive_spec.control.counters import Ledger


def test_lucky_trials_survive_a_restart() -> None:
    ledger = Ledger(3)
    ledger.probe_lost_s = -0.25
    again = Ledger(3)
    again.restore(ledger.state())
    assert again.probe_lost_s == -0.25


def test_other_counters_are_never_negative() -> None:
    ledger = Ledger(3)
    ledger.decode_s = -0.25
    with pytest.raises(ValueError, match="negative"):
        Ledger(3).restore(ledger.state())
