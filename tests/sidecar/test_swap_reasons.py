from __future__ import annotations

from dataclasses import replace

from adaptive_spec.control.counters import Event
from adaptive_spec.control.snapshot import Snapshot
from adaptive_spec.domain.staircase import Boundary
from adaptive_spec.sidecar.swap_reasons import Story
from tests.sidecar.test_metrics import SNAPSHOT


def _at(time_s: float, boundaries: tuple[int, ...], events: tuple[Event, ...], verified: int = 0, accepted: int = 0) -> Snapshot:
    return replace(
        SNAPSHOT, time_s=time_s, boundaries=tuple(Boundary(tokens, 1.5) for tokens in boundaries), events=events, batch_size=48,
        draft_tokens=(0,) * 7, verified_tokens=(verified,) + (0,) * 6, accepted_tokens=(accepted,) + (0,) * 6,
    )  # fmt: skip


FIRST = Event(1.0, "swap", "K 3→5 at batch 48: sweep")
SECOND = Event(30.0, "swap", "K 5→3 at batch 48: drift")
DRIFT = Event(29.0, "drift", "latency drift: verify latency moved by +20%")


def _told(before: tuple[int, ...], after: tuple[int, ...]) -> str:
    story = Story()
    assert story.tell(_at(1.0, before, (FIRST,))) == (FIRST,), "nothing to compare the first with"
    told = story.tell(_at(30.0, after, (FIRST, DRIFT, SECOND)))
    assert told[:2] == (FIRST, DRIFT)
    assert (told[2].time_s, told[2].kind) == (30.0, "swap")
    return told[2].text.removeprefix(SECOND.text)


def test_a_boundary_that_moved() -> None:
    assert _told((64, 256), (64, 192)) == "; boundary at 256 tokens moved to 192"


def test_boundaries_that_come_and_go() -> None:
    assert _told((64, 128), (64,)) == "; boundary at 128 tokens is gone"
    assert _told((64,), (64, 128)) == "; new boundary at 128 tokens"
    assert _told((50,), (350,)) == "; boundary at 50 tokens is gone, new boundary at 350 tokens", "too far apart to be one"


def test_what_the_batch_cannot_reach_is_no_reason() -> None:
    assert _told((512, 20), (600, 20)) == ""
    assert _told((64, 20), (64, 30)) == ""


def test_no_change_no_words() -> None:
    assert _told((64, 128), (64, 128)) == ""


def test_acceptance_that_changed() -> None:
    story = Story()
    for second in range(12):
        story.tell(_at(float(second), (64,), (), 100 * second, 71 * second))
    story.tell(_at(12.0, (64,), (replace(FIRST, time_s=12.0),), 1200, 852))
    for second in range(1, 20):
        story.tell(_at(12.0 + second, (64,), (), 1200 + 100 * second, 852 + 55 * second))
    told = story.tell(_at(32.0, (64,), (SECOND,), 3200, 1952))
    assert told[0].text == f"{SECOND.text}; first draft token accepted 71% → 55%"


def test_words_stay_with_their_event_and_go_with_it() -> None:
    story = Story()
    story.tell(_at(1.0, (64, 256), (FIRST,)))
    told = story.tell(_at(30.0, (64, 192), (FIRST, SECOND)))
    assert story.tell(_at(40.0, (64,), (FIRST, SECOND))) == told
    assert story.tell(_at(41.0, (64,), ())) == ()


def test_two_swaps_of_one_change_have_one_reason() -> None:
    story = Story()
    third = replace(SECOND, time_s=33.0, text="K 3→2 at batch 48: gain")
    later = replace(SECOND, time_s=60.0, text="K 2→3 at batch 48: gain")
    story.tell(_at(1.0, (64, 256), (FIRST,)))
    story.tell(_at(30.0, (64, 192), (FIRST, SECOND)))
    told = story.tell(_at(33.0, (64, 192), (FIRST, SECOND, third)))
    assert [e.text.partition("; ")[2] for e in told] == ["", *["boundary at 256 tokens moved to 192"] * 2]
    assert story.tell(_at(60.0, (64, 192), (third, later)))[-1] == later
