"""Every order of events of two and three ranks, searched: one policy in every step, nothing lost. And each rule is needed."""

from __future__ import annotations

import pytest

from tests.engines.sglang.rank_model import Rules, World, fault, start, steps
from tests.wire.protocol_model import search

NIGHTLY = [Rules(), Rules(ranks=3, versions=1)]
"""Half a minute and more each."""


@pytest.mark.parametrize(
    "rules",
    [
        Rules(versions=1),
        Rules(failures=0),
        Rules(terms=(7, 8)),
        *(pytest.param(rules, marks=pytest.mark.nightly) for rules in NIGHTLY),
    ],
)
def test_no_order_of_events_breaks_the_ranks(rules: Rules) -> None:
    found = search(start(rules), steps(rules), fault)
    assert found.fault == ""
    assert found.states > 100


@pytest.mark.parametrize(
    ("rules", "wrong"),
    [
        (Rules(waits_for_all=False, failures=0), "unknown"),
        (Rules(serials=False, failures=0), "unknown"),
        (Rules(whole_view=False, failures=0), "unknown"),
        (Rules(keeps_reading=False, failures=0), "lost"),
        (Rules(alike=False), "disagreement"),
        (Rules(in_order=False, failures=0), "disagreement"),
        (Rules(lease=False, versions=1), "steered"),
        (Rules(checks_terms=False, terms=(7, 8)), "terms"),
    ],
)
def test_each_rule_of_the_ranks_is_needed(rules: Rules, wrong: str) -> None:
    """Without it the search finds the fault that it prevents."""

    def this_one(world: World) -> str:
        found = fault(world)
        return found if found.startswith(wrong) else ""

    assert search(start(rules), steps(rules), this_one).fault
