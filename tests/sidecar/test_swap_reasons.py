from __future__ import annotations

from dataclasses import replace

from adaptive_spec.control.counters import Event
from adaptive_spec.control.snapshot import Snapshot
from adaptive_spec.domain.staircase import Boundary
from adaptive_spec.sidecar.swap_reasons import SwapReasons
from tests.sidecar.test_metrics import SNAPSHOT


def _at(time_s: float, boundaries: tuple[int, ...], events: tuple[Event, ...], verified: int = 0, accepted: int = 0) -> Snapshot:
    return replace(
        SNAPSHOT, time_s=time_s, boundaries=tuple(Boundary(tokens, 1.5) for tokens in boundaries), events=events, batch_size=48,
        draft_tokens=(0,) * 7, verified_tokens=(verified,) + (0,) * 6, accepted_tokens=(accepted,) + (0,) * 6,
    )  # fmt: skip


FIRST = Event(1.0, "swap", "K 3→5 at batch 48: sweep")
SECOND = Event(30.0, "swap", "K 5→3 at batch 48: drift")
DRIFT = Event(29.0, "drift", "latency drift: verify latency moved by +20%")


def _added(before: tuple[int, ...], after: tuple[int, ...]) -> str:
    reasons = SwapReasons()
    assert reasons.explain(_at(1.0, before, (FIRST,))) == (FIRST,), "the first swap has nothing to compare with"
    events = reasons.explain(_at(30.0, after, (FIRST, DRIFT, SECOND)))
    assert events[:2] == (FIRST, DRIFT)
    assert (events[2].time_s, events[2].kind) == (30.0, "swap")
    return events[2].text.removeprefix(SECOND.text)


def test_a_boundary_that_moved() -> None:
    assert _added((64, 256), (64, 192)) == "; boundary at 256 tokens moved to 192"


def test_added_and_removed_boundaries() -> None:
    assert _added((64, 128), (64,)) == "; boundary at 128 tokens is gone"
    assert _added((64,), (64, 128)) == "; new boundary at 128 tokens"
    assert _added((50,), (350,)) == "; boundary at 50 tokens is gone, new boundary at 350 tokens", (
        "too far apart to be the same boundary"
    )


def test_boundaries_beyond_the_batch_are_no_reason() -> None:
    assert _added((512, 20), (600, 20)) == ""
    assert _added((64, 20), (64, 30)) == ""


def test_no_change_no_reason() -> None:
    assert _added((64, 128), (64, 128)) == ""


def test_acceptance_that_changed() -> None:
    reasons = SwapReasons()
    for second in range(12):
        reasons.explain(_at(float(second), (64,), (), 100 * second, 71 * second))
    reasons.explain(_at(12.0, (64,), (replace(FIRST, time_s=12.0),), 1200, 852))
    for second in range(1, 20):
        reasons.explain(_at(12.0 + second, (64,), (), 1200 + 100 * second, 852 + 55 * second))
    events = reasons.explain(_at(32.0, (64,), (SECOND,), 3200, 1952))
    assert events[0].text == f"{SECOND.text}; first draft token accepted 71% → 55%"


def test_reasons_stay_with_their_event() -> None:
    reasons = SwapReasons()
    reasons.explain(_at(1.0, (64, 256), (FIRST,)))
    events = reasons.explain(_at(30.0, (64, 192), (FIRST, SECOND)))
    assert reasons.explain(_at(40.0, (64,), (FIRST, SECOND))) == events
    assert reasons.explain(_at(41.0, (64,), ())) == ()


def test_two_swaps_of_one_change_have_one_reason() -> None:
    reasons = SwapReasons()
    third = replace(SECOND, time_s=33.0, text="K 3→2 at batch 48: gain")
    later = replace(SECOND, time_s=60.0, text="K 2→3 at batch 48: gain")
    reasons.explain(_at(1.0, (64, 256), (FIRST,)))
    reasons.explain(_at(30.0, (64, 192), (FIRST, SECOND)))
    events = reasons.explain(_at(33.0, (64, 192), (FIRST, SECOND, third)))
    assert [e.text.partition("; ")[2] for e in events] == ["", *["boundary at 256 tokens moved to 192"] * 2]
    assert reasons.explain(_at(60.0, (64, 192), (third, later)))[-1] == later
