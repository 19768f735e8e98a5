"""Every order of the steps of writer and reader: no torn read, no lost record or policy. And each rule is needed."""

from __future__ import annotations

import pytest

from tests.wire.protocol_model import (
    PageRules,
    RingRules,
    RingState,
    page_fault,
    page_start,
    page_steps,
    ring_fault,
    ring_start,
    ring_steps,
    search,
)


@pytest.mark.parametrize("rules", [RingRules(), RingRules(slots=3, records=6), RingRules(slots=1, records=4)])
def test_no_order_of_steps_breaks_the_ring(rules: RingRules) -> None:
    found = search(ring_start(rules), ring_steps(rules), ring_fault)
    assert found.fault == ""
    assert found.states > 1000


@pytest.mark.parametrize("rules", [RingRules(looks_again=False), RingRules(cursor_last=False), RingRules(inverted=False)])
def test_each_rule_of_the_ring_is_needed(rules: RingRules) -> None:
    def torn(state: RingState) -> str:
        fault = ring_fault(state)
        return fault if fault.startswith("torn") else ""

    assert search(ring_start(rules), ring_steps(rules), torn).fault


def test_without_the_spare_slot_a_record_that_is_whole_is_given_up() -> None:
    """Correct too, but of two records of an idle writer only one can be read: the older could be in the making."""

    def gives_up(state: RingState) -> str:
        return "torn" if state.torn else ""

    with_spare, without = RingRules(records=2), RingRules(records=2, spare=0)
    assert search(ring_start(with_spare), ring_steps(with_spare), gives_up).fault == ""
    assert search(ring_start(without), ring_steps(without), gives_up).fault == "torn"


def test_no_order_of_steps_breaks_the_page() -> None:
    rules = PageRules()
    found = search(page_start(rules), page_steps(rules), page_fault)
    assert found.fault == ""
    assert found.states > 500


@pytest.mark.parametrize(
    ("rules", "fault"),
    [(PageRules(checksum=False), "torn"), (PageRules(sequence_last=False), "lost")],
)
def test_each_rule_of_the_page_is_needed(rules: PageRules, fault: str) -> None:
    assert fault in search(page_start(rules), page_steps(rules), page_fault).fault
