from __future__ import annotations

from dataclasses import replace

from adaptive_spec.sidecar.history import INTERVAL_S, MOMENTS, History, Moment
from tests.sidecar.test_metrics import SNAPSHOT


def test_a_moment_every_two_seconds() -> None:
    history = History()
    for tick in range(40):
        history.note(replace(SNAPSHOT, decode_steps=tick + 1, batch_size=2), 0.25 * tick)
    assert [m.time_s for m in history.moments] == [0.0, 2.0, 4.0, 6.0, 8.0]
    assert history.moments[-1] == Moment(8.0, 100.0, 100.0 / 0.9, 2, 3)


def test_a_standstill_is_a_gap() -> None:
    history = History()
    for tick, steps in enumerate((5, 6, 6, 7)):
        history.note(replace(SNAPSHOT, decode_steps=steps), INTERVAL_S * tick)
    assert [m.goodput_tokens_per_s for m in history.moments] == [100.0, 100.0, None, 100.0]
    history.note(None, 100.0)
    assert history.moments[-1] == Moment(100.0, None, None, None, None)


def test_what_is_not_known_is_none() -> None:
    history = History()
    history.note(replace(SNAPSHOT, measured_gain=None, batch_size=0), 0.0)
    assert history.moments == (Moment(0.0, 100.0, None, None, None),)


def test_old_moments_go_and_handed_out_ones_stay() -> None:
    history = History()
    history.note(SNAPSHOT, 0.0)
    held = history.moments
    for tick in range(1, MOMENTS + 5):
        history.note(SNAPSHOT, INTERVAL_S * tick)
    assert len(history.moments) == MOMENTS
    assert len(held) == 1
