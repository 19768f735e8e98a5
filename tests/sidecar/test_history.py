from __future__ import annotations

from dataclasses import replace

from adaptive_spec.sidecar.history import INTERVAL_S, MAX_POINTS, History, HistoryPoint
from tests.sidecar.test_metrics import SNAPSHOT


def test_a_point_every_two_seconds() -> None:
    history = History()
    for tick in range(40):
        history.add(replace(SNAPSHOT, decode_steps=tick + 1, batch_size=2), 0.25 * tick)
    assert [m.time_s for m in history.points] == [0.0, 2.0, 4.0, 6.0, 8.0]
    assert history.points[-1] == HistoryPoint(8.0, 100.0, 100.0 / 0.9, 2, 3)


def test_no_steps_give_a_gap() -> None:
    history = History()
    for tick, steps in enumerate((5, 6, 6, 7)):
        history.add(replace(SNAPSHOT, decode_steps=steps), INTERVAL_S * tick)
    assert [m.goodput_tokens_per_s for m in history.points] == [100.0, 100.0, None, 100.0]
    history.add(None, 100.0)
    assert history.points[-1] == HistoryPoint(100.0, None, None, None, None)


def test_unknown_values_are_none() -> None:
    history = History()
    history.add(replace(SNAPSHOT, estimated_gain=None, batch_size=0), 0.0)
    assert history.points == (HistoryPoint(0.0, 100.0, None, None, None),)


def test_old_points_are_removed_and_earlier_results_stay() -> None:
    history = History()
    history.add(SNAPSHOT, 0.0)
    held = history.points
    for tick in range(1, MAX_POINTS + 5):
        history.add(SNAPSHOT, INTERVAL_S * tick)
    assert len(history.points) == MAX_POINTS
    assert len(held) == 1
