"""The ring and the page as small state machines, searched exhaustively: every order of the steps of a writer and a reader.

Each pread and pwrite is cut into pieces that the other side can come between, since the kernel promises no atomicity. The writer
may be killed between any two of them: on that path it takes no more steps. States are tuples of numbers, so that they can be
remembered. `tests/wire/test_protocol_model.py` also removes each part of the protocol, and expects the fault that it prevents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

State = TypeVar("State")
NOTHING = -1


class Found(NamedTuple):
    """fault: the first one, "" for none. states: how many were visited."""

    fault: str
    states: int


def search(start: State, steps: Callable[[State], Iterator[State]], fault: Callable[[State], str]) -> Found:
    """Visit every state that can be reached from `start`."""
    seen, waiting = {start}, [start]
    while waiting:
        state = waiting.pop()
        if found := fault(state):
            return Found(found, len(seen))
        for following in steps(state):
            if following not in seen:
                seen.add(following)
                waiting.append(following)
    return Found("", len(seen))


# -- the ring --------------------------------------------------------------------------------------------------------------


class RingRules(NamedTuple):
    """slots: that can be read. spare: slots more than that. looks_again: the reader reads the cursor after its copy too.
    cursor_last: the writer moves the cursor behind the record. inverted: the cursor comes with its inversion.
    """

    slots: int = 2
    spare: int = 1
    looks_again: bool = True
    cursor_last: bool = True
    inverted: bool = True
    records: int = 5


class RingState(NamedTuple):
    """The file, the writer and one reader.

    low, high, inverse: the halves of the cursor (base 2) and its inversion, as written. file: two parts of each slot, with the
    index they belong to. written: records. writing: pieces of the current record that are done. position: of the reader. phase:
    what it does next. end: cursor before the copy. copy: the parts. got: (index, part, part) of the last accepted record. lost:
    records passed over. idle: the reader has found nothing new since the writer's last step.
    """

    low: int = 0
    high: int = 0
    inverse: int = 0
    file: tuple[int, ...] = ()
    written: int = 0
    writing: int = 0
    position: int = 0
    phase: int = 0
    seen_low: int = 0
    seen_high: int = 0
    end: int = 0
    copy: tuple[int, ...] = ()
    got: tuple[int, int, int] = (0, 0, 0)
    lost: int = 0
    torn: int = 0
    idle: bool = False


BASE = 2
"""The cursor is written in two pieces of this base, so that a carry can be seen half done."""


def ring_start(rules: RingRules) -> RingState:
    return RingState(file=(NOTHING,) * 2 * (rules.slots + rules.spare))


def ring_steps(rules: RingRules) -> Callable[[RingState], Iterator[RingState]]:
    """Return the steps: one piece of the writer's work, or one of the reader's."""
    stride = rules.slots + rules.spare

    def part(state: RingState, number: int) -> RingState:
        at = 2 * (state.written % stride) + number
        return state._replace(file=(*state.file[:at], state.written, *state.file[at + 1 :]))

    def announce(state: RingState, piece: int) -> RingState:
        after = state.written + 1
        if piece == 0:
            return state._replace(low=after % BASE)
        return state._replace(high=after // BASE) if piece == 1 else state._replace(inverse=after)

    order = [lambda s: part(s, 0), lambda s: part(s, 1)]
    cursor = [lambda s: announce(s, 0), lambda s: announce(s, 1), lambda s: announce(s, 2)]
    program = order + cursor if rules.cursor_last else cursor + order

    def writer(state: RingState) -> Iterator[RingState]:
        if state.written < rules.records:
            after = program[state.writing](state)
            done = state.writing + 1 == len(program)
            yield after._replace(writing=0 if done else state.writing + 1, written=state.written + done, idle=False)

    def cursor_of(state: RingState) -> int:
        """The cursor that the reader has read, NOTHING when it does not believe it."""
        cursor = BASE * state.seen_high + state.seen_low
        return NOTHING if rules.inverted and cursor != state.inverse else cursor

    def reader(state: RingState) -> Iterator[RingState]:
        if state.phase in (0, 4):
            yield state._replace(seen_low=state.low, phase=state.phase + 1)
        elif state.phase == 1:
            end = cursor_of(state._replace(seen_high=state.high))
            if end <= state.position:
                yield state._replace(phase=0, seen_low=0, seen_high=0, idle=end != NOTHING)
                return
            skipped = max(end - rules.slots - state.position, 0)
            yield state._replace(
                seen_low=0, end=end, position=state.position + skipped, lost=state.lost + skipped, phase=2, copy=()
            )  # fmt: skip
        elif state.phase in (2, 3):
            at = 2 * (state.position % stride) + state.phase - 2
            phase = 6 if state.phase == 3 and not rules.looks_again else state.phase + 1
            yield state._replace(copy=(*state.copy, state.file[at]), phase=phase)
        elif state.phase == 5:
            again = cursor_of(state._replace(seen_high=state.high))
            if again == NOTHING:
                yield state._replace(phase=4, seen_low=0)
                return
            overwritten = again > state.position + rules.slots + rules.spare - 1
            yield state._replace(seen_low=0, phase=7 if overwritten else 6)
        else:
            torn = state.phase == 7
            yield state._replace(
                phase=0, position=state.position + 1, torn=state.torn + torn, copy=(), end=0,
                got=state.got if torn else (state.position, state.copy[0], state.copy[1]),
            )  # fmt: skip

    def steps(state: RingState) -> Iterator[RingState]:
        yield from writer(state)
        yield from reader(state)

    return steps


def ring_fault(state: RingState) -> str:
    """What must never be: a record that is not whole, one that was never written, or one that a waiting reader never sees."""
    index, *parts = state.got
    if parts != [index, index]:
        return f"torn: record {index} was accepted with parts of {parts}"
    if state.position > state.written + 1:
        return f"position {state.position} with {state.written} records"
    if state.idle and state.phase == 0 and state.writing == 0 and state.position < state.written:
        return f"lost wake-up: at {state.position} of {state.written}"
    return ""


# -- the page --------------------------------------------------------------------------------------------------------------


class PageRules(NamedTuple):
    """buffers: of payloads. checksum: the payload's. sequence_last: it is published behind the payload. retries: a reader that
    failed reads again once the sequence changes; False: it remembers only what it adopted.
    """

    buffers: int = 2
    checksum: bool = True
    sequence_last: bool = True
    retries: bool = True
    publications: int = 5


class PageState(NamedTuple):
    """sequence: on the page. file: three parts of each buffer (header and two of the payload), with the sequence they belong to.
    published: by the writer. seen: sequence the reader looked at last. policy: adopted, its parts.
    """

    sequence: int = 0
    file: tuple[int, ...] = ()
    published: int = 0
    writing: int = 0
    phase: int = 0
    seen: int = 0
    wanted: int = 0
    copy: tuple[int, ...] = ()
    policy: tuple[int, int] = (0, 0)
    idle: bool = False


def page_start(rules: PageRules) -> PageState:
    return PageState(file=(0,) * 3 * rules.buffers)


def page_steps(rules: PageRules) -> Callable[[PageState], Iterator[PageState]]:
    """Return the steps: one piece of the writer's work, or one of the reader's."""

    def part(state: PageState, number: int) -> PageState:
        sequence = state.published + 1
        at = 3 * (sequence % rules.buffers) + number
        return state._replace(file=(*state.file[:at], sequence, *state.file[at + 1 :]))

    parts = [lambda s: part(s, 1), lambda s: part(s, 2), lambda s: part(s, 0)]
    announce = [lambda s: s._replace(sequence=s.published + 1)]
    program = parts + announce if rules.sequence_last else announce + parts

    def steps(state: PageState) -> Iterator[PageState]:
        if state.published < rules.publications:
            after = program[state.writing](state)
            done = state.writing + 1 == len(program)
            yield after._replace(writing=0 if done else state.writing + 1, published=state.published + done, idle=False)
        if state.phase == 0:
            if state.sequence == state.seen:
                yield state._replace(idle=True)
            else:
                yield state._replace(phase=1, seen=state.sequence, wanted=state.sequence, copy=())
        elif state.phase <= 3:
            at = 3 * (state.wanted % rules.buffers) + state.phase - 1
            yield state._replace(copy=(*state.copy, state.file[at]), phase=state.phase + 1)
        else:
            header, *payload = state.copy
            whole = header == state.wanted and (not rules.checksum or payload == [header, header])
            policy = (payload[0], payload[1]) if whole else state.policy
            seen = state.seen if whole or rules.retries else NOTHING
            yield state._replace(phase=0, wanted=0, copy=(), policy=policy, seen=seen)

    return steps


def page_fault(state: PageState) -> str:
    """What must never be: a policy of two, an older one again, or a newest one that a waiting reader never sees."""
    first, second = state.policy
    if first != second:
        return f"torn: a policy with parts of {first} and {second}"
    if state.idle and state.phase == 0 and state.writing == 0 and first != state.published:
        return f"lost: policy {first} is in use, {state.published} was published"
    return ""
