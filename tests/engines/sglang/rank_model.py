"""The ranks' protocol as a small state machine, searched exhaustively: agreement at the start, and one policy in every step.

It follows `engines/sglang/ranks.py` and `rank_notes.py`: rank 0 decides once in a loop and broadcasts; every rank takes the
broadcasts in order and then runs the loop's step, if there is one. A step is a collective: it begins on a rank once all ranks
have begun the one before. A loop without a step lets rank 0 run ahead. Notes travel by a thread of each rank, at any later time
or never; rank 0's thread reads them one by one. Any rank may fail, and may be unable to follow a policy, at any point; a rank
that stops takes no more steps: on that path it is not chosen again. The page may be stale or have another policy whenever rank 0
looks. Steps are counted from the slowest rank's, so that there are finitely many states. `test_rank_model.py` also takes each
rule away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

LEASE_STEPS = 3
"""In place of `ranks.LEASE_PASSES`."""
PATIENCE = 2
"""Loops that rank 0 waits for terms and answers, in place of its timeout."""
LAG = 2
"""Broadcasts that rank 0 may be ahead."""


class Rules(NamedTuple):
    """waits_for_all: a policy is used once all ranks have answered. serials: an answer says to which offer. whole_view: answers
    count once there is one of every rank. keeps_reading: answers are read until all are there. alike: a rank that failed goes on
    like the others until all leave. lease: a policy acts until the stated step. in_order: a broadcast is taken before the step of
    its loop. checks_terms: rank 0 begins when all terms are equal.
    """

    waits_for_all: bool = True
    serials: bool = True
    whole_view: bool = True
    keeps_reading: bool = True
    alike: bool = True
    lease: bool = True
    in_order: bool = True
    checks_terms: bool = True
    ranks: int = 2
    versions: int = 2
    failures: int = 1
    terms: tuple[int, ...] = (7, 7, 7)


class Message(NamedTuple):
    """kind: "", "begin", "offer", "use", "none" or "leave". step: the loop has a step."""

    kind: str
    serial: int
    until: int
    step: bool


class Rank(NamedTuple):
    """offered, accepted: serials. step: the last one begun. decided: what it acted on in that step, 0 the fallback. sending:
    notes on their way to the store. taken: of the broadcasts that not all have taken.
    """

    offered: int = 0
    accepted: int = 0
    acting: bool = False
    until: int = 0
    left: bool = False
    steers: bool = False
    failed: bool = False
    step: int = 0
    decided: int = 0
    sending: tuple[str | int, ...] = ()
    taken: int = 0


class World(NamedTuple):
    """terms, answers, failed: in the store. view_...: as rank 0 has read them. reading: the part of the next view that is read.
    page: version that the page offers, 0 when it is stale. serial, ready, offered_version, own_answer, waiting, waited, refused:
    of rank 0.
    silent: steps since rank 0 sends nothing more, -1 while it does. fault: what must never be.
    """

    ranks: tuple[Rank, ...]
    terms: tuple[int | None, ...]
    answers: tuple[int, ...]
    failed: bool = False
    view_terms: tuple[int | None, ...] = ()
    view_answers: tuple[int, ...] = ()
    view_failed: bool = False
    reading: tuple[int, ...] | None = None
    log: tuple[Message, ...] = ()
    page: int = 0
    version: int = 0
    serial: int = 0
    ready: int = 0
    offered_version: int = 0
    own_answer: int = 0
    waiting: bool = False
    waited: int = 0
    refused: bool = False
    silent: int = -1
    fault: str = ""


def start(rules: Rules) -> World:
    """Each rank has stated its terms, which are on their way. Rank 0's are there."""
    ranks = tuple(Rank(sending=() if r == 0 else ("terms",)) for r in range(rules.ranks))
    terms = (rules.terms[0], *(None for _ in range(1, rules.ranks)))
    return World(ranks, terms, (0,) * rules.ranks, view_terms=terms)


def fault(world: World) -> str:
    return world.fault


def steps(rules: Rules) -> Callable[[World], Iterator[World]]:
    """Return every next event: of a rank, of a note, of rank 0's reader."""

    def following(world: World) -> Iterator[World]:
        for rank in range(1, rules.ranks):
            if world.ranks[rank].sending:
                yield _delivered(rules, world, rank)
            if world.ranks[rank].taken < len(world.log):
                for failing in _failures(rules, world, rank):
                    yield from _take(rules, failing, rank)
        yield from _read(rules, world)
        if len(world.log) < LAG:
            for failing in _failures(rules, world, 0):
                for seen in _page(rules, failing):
                    for step in (True, False):
                        yield from _loop_of_rank_0(rules, seen, step)

    return following


def _page(rules: Rules, world: World) -> Iterator[World]:
    """What rank 0 may find on the page: nothing, the version of before, or a newer one."""
    yield world._replace(page=0)
    for version in range(max(world.version, 1), rules.versions + 1):
        yield world._replace(page=version, version=version)


def _failures(rules: Rules, world: World, number: int) -> Iterator[World]:
    """The world as it is, and with a failure of this rank; of rank 0 also one that lets it send nothing more."""
    yield world
    rank = world.ranks[number]
    if rank.failed or sum(one.failed for one in world.ranks) + (world.silent >= 0) >= rules.failures:
        return
    yield _with(world, number, rank._replace(failed=True, sending=(*rank.sending, "failed") if number else ()))
    if number == 0:
        yield world._replace(silent=0)


def _with(world: World, number: int, rank: Rank) -> World:
    return world._replace(ranks=(*world.ranks[:number], rank, *world.ranks[number + 1 :]))


# -- notes -------------------------------------------------------------------------------------------------------------


def _delivered(rules: Rules, world: World, number: int) -> World:
    note, *rest = world.ranks[number].sending
    after = _with(world, number, world.ranks[number]._replace(sending=tuple(rest)))
    if note == "terms":
        return after._replace(terms=(*world.terms[:number], rules.terms[number], *world.terms[number + 1 :]))
    if note == "failed":
        return after._replace(failed=True)
    assert isinstance(note, int)
    return after._replace(answers=(*world.answers[:number], note, *world.answers[number + 1 :]))


def _read(rules: Rules, world: World) -> Iterator[World]:
    """Rank 0's thread: terms, then the answer of each rank, then `failed`; then the view is replaced as a whole."""
    if world.reading is None:
        stale = world.view_terms != world.terms or world.view_failed != world.failed
        if stale or (None not in world.view_terms and world.waiting and world.view_answers != world.answers[1:]):
            yield world._replace(view_terms=world.terms, reading=())
    elif None not in world.view_terms and world.waiting and len(world.reading) < rules.ranks - 1:
        yield world._replace(reading=(*world.reading, world.answers[len(world.reading) + 1]))
    else:
        answers = world.reading if len(world.reading) == rules.ranks - 1 else world.view_answers
        waiting = world.waiting and rules.keeps_reading
        yield world._replace(view_answers=answers, view_failed=world.failed, reading=None, waiting=waiting)


# -- rank 0 ------------------------------------------------------------------------------------------------------------


def _loop_of_rank_0(rules: Rules, world: World, step: bool) -> Iterator[World]:
    """One loop of its scheduler: decide, broadcast, and take its own broadcast like the others."""
    first = world.ranks[0]
    if step and any(rank.step < first.step for rank in world.ranks):
        return
    after, kind, serial = (world, "", 0) if first.left or world.silent >= 0 else _decide(rules, world)
    message = Message(kind, serial, first.step + LEASE_STEPS if kind == "use" else 0, step)
    if step and world.silent >= 0:
        after = after._replace(silent=min(after.silent + 1, LEASE_STEPS + 2))
    after = after._replace(log=(*world.log, message))
    if not kind and not after.ranks[0].left and world.silent < 0 and (why := _unsettled(after)):
        after = after._replace(fault=why)
    yield from _take(rules, after, 0)


def _decide(rules: Rules, world: World) -> tuple[World, str, int]:
    """`Steering._decide`: (the world, kind and serial of the message)."""
    first = world.ranks[0]
    if first.failed or world.view_failed:
        return _leaving(world)
    if not first.steers:
        world = world._replace(waited=min(world.waited + 1, PATIENCE + 1))
        if None in world.view_terms:
            return _leaving(world) if world.waited > PATIENCE else (world, "", 0)
        if rules.checks_terms and len(set(world.view_terms)) > 1:
            return _leaving(world)
        return world, "begin", 0
    if world.waiting or not rules.keeps_reading:
        world = _answered(rules, world)
        if world.waited > PATIENCE:
            return _leaving(world)
    if not world.page:
        return world, "none" if first.acting else "", 0
    if world.ready and not (first.acting and first.accepted == world.ready):
        return world, "use", world.ready
    if not world.waiting and world.page != world.offered_version:
        serial = world.serial + 1
        world = world._replace(
            serial=serial, offered_version=world.page, own_answer=0, waited=0, waiting=True, refused=False
        )  # fmt: skip
        return world, "offer", serial
    due = first.acting and first.step >= first.until - LEASE_STEPS // 2
    return (world, "use", world.ready) if due and rules.lease else (world, "", 0)


def _answered(rules: Rules, world: World) -> World:
    answers = (world.own_answer, *world.view_answers) if rules.waits_for_all else (world.own_answer,)
    if not rules.serials:
        answers = tuple(world.serial if answer > 0 else answer for answer in answers)
    if -world.serial in answers:
        return world._replace(waiting=False, refused=True)
    whole = len(answers) == rules.ranks or not rules.whole_view or not rules.waits_for_all
    if whole and world.serial and all(answer == world.serial for answer in answers):
        return world._replace(ready=world.serial, waiting=False)
    return world._replace(waited=min(world.waited + 1, PATIENCE + 1)) if rules.keeps_reading else world


def _leaving(world: World) -> tuple[World, str, int]:
    if world.ranks[0].steers:
        return world, "leave", 0
    return _with(world, 0, world.ranks[0]._replace(left=True, acting=False)), "", 0


def _unsettled(world: World) -> str:
    """What rank 0 should have seen, when it sends nothing although all that was said has arrived and was read."""
    first = world.ranks[0]
    said = any(rank.sending for rank in world.ranks) or any(rank.taken < len(world.log) - 1 for rank in world.ranks)
    read = world.reading is None and world.view_terms == world.terms and world.view_failed == world.failed
    read &= world.view_answers == world.answers[1:] or not world.waiting
    if said or not read or not first.steers or not world.page:
        return ""
    if any(rank.failed for rank in world.ranks):
        return "lost: a failure was stated and nobody leaves"
    if world.refused or (first.acting and first.accepted == world.serial and world.offered_version == world.page):
        return ""
    return f"lost: version {world.page} is not in use though every rank has answered"


# -- every rank --------------------------------------------------------------------------------------------------------


def _take(rules: Rules, world: World, number: int) -> Iterator[World]:
    """Take the next broadcast and run the loop's step."""
    rank = world.ranks[number]
    message = world.log[rank.taken]
    if message.step and any(other.step < rank.step for other in world.ranks):
        return
    ready = [rank._replace(taken=rank.taken + 1)]
    if message.step and number and not rules.in_order:
        ready = [_run(rules, one) for one in ready]
    ready = [after for one in ready for after in _incoming(one, message, number)]
    if message.step and not (number and not rules.in_order):
        ready = [_run(rules, one) for one in ready]
    for one in ready:
        after = _with(world, number, one)
        if number == 0 and message.kind == "offer" and not rank.left:
            after = after._replace(own_answer=message.serial if one.offered == message.serial else -message.serial)
        yield _trimmed(after._replace(fault=after.fault or _wrong(after, number, message)))


def _incoming(rank: Rank, message: Message, number: int) -> Iterator[Rank]:
    """`Steering.incoming`; of an offer, both answers."""
    if rank.left:
        yield rank
    elif message.kind == "use":
        accepted = rank.offered if rank.offered == message.serial else rank.accepted
        offered = 0 if rank.offered == message.serial else rank.offered
        yield rank._replace(accepted=accepted, offered=offered, acting=accepted == message.serial, until=message.until)
    elif message.kind == "none":
        yield rank._replace(acting=False)
    elif message.kind == "begin":
        yield rank._replace(steers=True)
    elif message.kind == "leave":
        yield rank._replace(left=True, acting=False)
    elif message.kind == "offer":
        for offered, answer in ((message.serial, message.serial), (0, -message.serial)):
            yield rank._replace(offered=offered, sending=(*rank.sending, answer) if number else ())
    else:
        yield rank


def _run(rules: Rules, rank: Rank) -> Rank:
    """Begin the next step: `Steering.policy` at this forward pass."""
    acts = rank.acting and not rank.left and (rank.step < rank.until or not rules.lease) and (not rank.failed or rules.alike)
    return rank._replace(step=rank.step + 1, decided=rank.accepted if acts else 0)


def _wrong(world: World, number: int, message: Message) -> str:
    rank = world.ranks[number]
    if message.kind == "use" and not rank.left and rank.accepted != message.serial:
        return f"unknown: rank {number} is to use policy {message.serial} and cannot"
    if len({terms for terms in world.terms if terms is not None}) > 1 and rank.steers:
        return "terms: ranks with other settings have begun"
    same = {other.decided for other in world.ranks if other.step == rank.step}
    if message.step and len(same) > 1:
        return f"disagreement: in step {rank.step} the ranks act on {sorted(same)}"
    if world.silent > LEASE_STEPS and rank.acting and rank.decided and message.step:
        return f"steered: rank 0 sends nothing, and policy {rank.decided} still acts"
    return ""


def _trimmed(world: World) -> World:
    """Without the broadcasts that all have taken; steps counted from the slowest rank's. An `until` in the past is 0."""
    taken, base = min(rank.taken for rank in world.ranks), min(rank.step for rank in world.ranks)
    if not taken and not base:
        return world
    ranks = tuple(r._replace(taken=r.taken - taken, step=r.step - base, until=max(r.until - base, 0)) for r in world.ranks)
    return world._replace(log=tuple(m._replace(until=max(m.until - base, 0)) for m in world.log[taken:]), ranks=ranks)
