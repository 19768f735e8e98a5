"""The ranks' protocol alone: every order of events of some length, and each rule by itself."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from adaptive_spec.domain.policy import Policy
from adaptive_spec.engines.sglang.ranks import COUNTED_S, LEASE_PASSES, MARK, Message, Steering, carried, try_policy
from tests.engines.sglang.eagle_rank import Board
from tests.engines.sglang.rank_policies import random_policy, rank_info

POLICIES = [replace(random_policy(version, random.Random(version)), acting=True) for version in range(1, 12)]


class Pair:
    """Two ranks and the page. The broadcast reaches both in the same loop; what rank 1 states arrives with `deliver`."""

    def __init__(self, terms: tuple[int, int] = (7, 7), timeout_s: float = 60.0, lost: frozenset[int] = frozenset()) -> None:
        self.board = Board(2)
        self.undelivered: list[Callable[[], None]] = []
        self.can_follow = True
        self.told: list[int] = []
        self.ranks = [Steering(0, timeout_s), Steering(1, timeout_s, self._check)]
        for number, rank in enumerate(self.ranks):
            rank.on_leave = lambda number=number: self.told.append(number)  # type: ignore[misc]
            rank.join(self.board.notes(number, terms[number]) if number not in lost else _Nowhere())
        if 1 not in lost:
            self._delay()
        self.page: Policy | None = None
        self.now_s, self.sent = 0.0, list[Message]()

    def _check(self, policy: Policy) -> None:
        if not self.can_follow:
            raise ValueError("not this one")

    def _delay(self) -> None:
        notes: Any = self.ranks[1]._notes
        now = {"answer": notes.answer, "fail": notes.fail}
        for name, call in now.items():
            setattr(notes, name, lambda value, call=call: self.undelivered.append(lambda: call(value)))

    def deliver(self) -> None:
        undelivered, self.undelivered[:] = list(self.undelivered), []
        for call in undelivered:
            call()

    def loop(self, seconds: float = 1.0) -> None:
        self.now_s += seconds
        message = self.ranks[0].outgoing(lambda: self.page, self.now_s)
        if message is not None:
            self.sent.append(message)
            for rank in self.ranks:
                rank.incoming(tuple(message))
        for rank in self.ranks:
            rank.forward_pass += 1

    def use(self, policy: Policy) -> None:
        self.page = policy
        for _ in range(4):
            self.loop()
            self.deliver()

    @property
    def policies(self) -> list[Policy | None]:
        return [rank.policy for rank in self.ranks]

    @property
    def versions(self) -> list[int]:
        return [policy.version if policy is not None else 0 for policy in self.policies]


class _Nowhere:
    """Notes of a rank whose thread reaches nobody."""

    waiting = False
    view: Any = None

    def answer(self, number: int) -> None: ...

    def fail(self, reason: str) -> None: ...

    def end(self) -> None: ...


def _publish(pair: Pair) -> None:
    pair.page = POLICIES[(pair.page.version if pair.page is not None else 1) % len(POLICIES)]


EVENTS: dict[str, Callable[[Pair], None]] = {
    "the page has a new policy": _publish,
    "the page is stale": lambda pair: setattr(pair, "page", None),
    "what rank 1 stated arrives": Pair.deliver,
    "rank 1 cannot follow what comes next": lambda pair: setattr(pair, "can_follow", False),
    "rank 1 can again": lambda pair: setattr(pair, "can_follow", True),
    "rank 1 fails": lambda pair: pair.ranks[1].fail("a hook"),
    "rank 0 fails": lambda pair: pair.ranks[0].fail("a hook"),
    "nothing": lambda pair: None,
}


@pytest.mark.parametrize("first", EVENTS)
def test_in_every_order_of_events_both_ranks_act_alike(first: str) -> None:
    """All orders of four events, from a policy in use: the same policy on both ranks in every step, and a failure leaves."""
    for rest in itertools.product(EVENTS, repeat=3):
        pair = Pair()
        pair.use(POLICIES[0])
        assert pair.versions == [1, 1]
        for event in (first, *rest):
            EVENTS[event](pair)
            pair.loop()
            assert pair.versions[0] == pair.versions[1], (first, *rest)
            assert pair.ranks[0].left == pair.ranks[1].left, (first, *rest)
        pair.deliver()
        pair.loop()
        failed = {"rank 0 fails", "rank 1 fails"} & {first, *rest}
        assert bool(pair.ranks[1].left) == bool(failed), (first, *rest)
        assert pair.told == ([0, 1] if failed else [])


def test_a_policy_is_used_once_every_rank_has_answered() -> None:
    pair = Pair()
    pair.page = POLICIES[0]
    for _ in range(5):
        pair.loop()
    assert [message.kind for message in pair.sent] == ["begin", "offer"]
    assert pair.versions == [0, 0]
    pair.deliver()
    pair.loop()
    assert pair.versions == [1, 1]
    assert [rank.adopted for rank in pair.ranks] == [1, 1]


def test_a_stale_page_is_the_fallback_and_needs_no_second_offer() -> None:
    pair = Pair()
    pair.use(POLICIES[0])
    pair.page = None
    pair.loop()
    assert pair.versions == [0, 0]
    pair.page = POLICIES[0]
    pair.loop()
    assert pair.versions == [1, 1]
    assert [message.kind for message in pair.sent] == ["begin", "offer", "use", "none", "use"]
    assert [rank.adopted for rank in pair.ranks] == [1, 1]


def test_what_one_rank_cannot_follow_none_uses() -> None:
    pair = Pair()
    pair.use(POLICIES[0])
    pair.can_follow = False
    pair.use(POLICIES[1])
    assert pair.versions == [1, 1]
    assert pair.ranks[0].refused == 1
    pair.can_follow = True
    pair.use(POLICIES[2])
    assert pair.versions == [3, 3]


def test_a_rank_0_that_sends_nothing_more_steers_no_longer_than_its_lease() -> None:
    pair = Pair()
    pair.use(POLICIES[0])
    passed = 0
    while pair.versions == [1, 1] and passed < 2 * LEASE_PASSES:
        for rank in pair.ranks:
            rank.forward_pass += 1
        passed += 1
    assert passed == pytest.approx(LEASE_PASSES, abs=10)
    assert pair.versions == [0, 0], "in the same step"


def test_the_lease_is_renewed() -> None:
    pair = Pair()
    pair.use(POLICIES[0])
    for _ in range(3 * LEASE_PASSES):
        pair.loop()
        assert pair.versions == [1, 1]
    assert [message.kind for message in pair.sent].count("use") == pytest.approx(6, abs=1)


@pytest.mark.parametrize(
    ("terms", "reason"),
    [((7, 8), "the ranks' settings or versions differ"), ((7, 0), "a hook failed while the server started on rank 1")],
)
def test_ranks_that_differ_never_begin(terms: tuple[int, int], reason: str) -> None:
    pair = Pair(terms)
    pair.use(POLICIES[0])
    assert pair.ranks[0].left == reason
    assert not pair.sent


def test_a_rank_without_the_plugin_is_named_after_the_timeout() -> None:
    pair = Pair(timeout_s=5.0, lost=frozenset({1}))
    pair.page = POLICIES[0]
    for _ in range(int(5.0 / COUNTED_S)):
        pair.loop()
        assert not pair.ranks[0].left
    pair.loop()
    pair.loop()
    assert pair.ranks[0].left == "rank 1 did not answer within 5 s: is the plugin switched on there?"
    assert not pair.sent


def test_an_answer_that_never_comes_makes_all_leave() -> None:
    pair = Pair(timeout_s=5.0)
    pair.use(POLICIES[0])
    pair.page = POLICIES[1]
    for _ in range(int(5.0 / COUNTED_S) + 3):
        pair.loop()
    assert [rank.left for rank in pair.ranks] == ["rank 1 did not answer a policy within 5 s"] * 2


def test_a_pause_of_all_ranks_is_no_late_answer() -> None:
    pair = Pair(timeout_s=5.0)
    pair.use(POLICIES[0])
    pair.page = POLICIES[1]
    pair.loop()
    pair.loop(30.0)  # one rank was stopped, so rank 0 waited in SGLang's broadcast
    pair.deliver()
    pair.loop()
    assert pair.versions == [2, 2]


def test_a_page_that_cannot_be_read_makes_all_leave() -> None:
    pair = Pair()
    pair.use(POLICIES[0])

    def broken() -> Policy | None:
        raise OSError("the page is gone")

    message = pair.ranks[0].outgoing(broken, pair.now_s + 1.0)
    assert message is not None
    assert (message.kind, message.text) == ("leave", "rank 0: OSError: the page is gone")


def test_the_page_is_looked_at_a_few_hundred_times_a_second() -> None:
    """The scheduler of an idle server loops without a pause."""
    steering, looks = Steering(0), [0]
    steering.join(Board(1).notes(0, 7))

    def newest() -> None:
        looks[0] += 1

    for loop in range(10_000):
        message = steering.outgoing(newest, 1e-4 * loop)
        if message is not None:
            steering.incoming(message)
    assert 150 <= looks[0] <= 210


def test_an_unknown_policy_put_to_use_is_a_failure() -> None:
    steering = Steering(1)
    steering.join(Board(2).notes(1, 7))
    steering.incoming(Message(MARK, "use", 4, 100))
    assert steering.policy is None
    assert steering._failure == "policy 4 was put to use and is not known"


def test_messages_are_split_from_requests() -> None:
    message = tuple(Message(MARK, "none"))
    requests = [object(), ("adaptive-spec",), ["adaptive-spec", 1, 2, 3, 4, 5]]
    assert carried([*requests, message]) == (requests, [message])
    assert carried(requests) == (requests, [])
    assert type(message) is tuple


def test_a_policy_is_tried_as_a_tap_would() -> None:
    check = try_policy(rank_info())
    check(POLICIES[0])
    damaged = replace(POLICIES[0], k_table=np.zeros((0, 0), np.uint8))
    with pytest.raises(IndexError):
        check(damaged)
