"""What each protection on the hot path costs: the same work with and without it, in turn, block after block.

A block is CALLS calls. Both kinds of a pair run in every round, in alternating order, so that a slow moment of the machine is in
both. Shown are the medians over the rounds, and the median of the rounds' differences and ratios. Where a protection cannot be
taken out of the product, what is measured without it is the same work by hand, written here.
"""

from __future__ import annotations

import gc
import json
import mmap
import os
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

from adaptive_spec.domain.step_record import StepFlag
from adaptive_spec.engine_side.planner import Planner
from adaptive_spec.engine_side.tap import NEVER, PAGE_NAME, BegunStep, EngineTap
from adaptive_spec.engines.common.hook_guard import Guard
from adaptive_spec.engines.common.steps_in_flight import FinishedStep, KnownConfidences, OpenStep, StepsInFlight
from adaptive_spec.wire.policy_page import PolicyPage, PolicyPageReader
from adaptive_spec.wire.policy_payload import decode_policy, encode_policy, payload_bytes
from adaptive_spec.wire.ring import HEADER_BYTES, RingReader, RingWriter
from adaptive_spec.wire.slot import HEAD, decode_slot
from benchmarks.hot_path import BATCH, LARGE_BATCH, MAX_K, policy_for
from benchmarks.ingestion import engine_info
from benchmarks.surroundings import folder_in_memory

CALLS = 200
RECORD = f"pwrite in place of a mapping: write a record, batch {BATCH}, K {MAX_K}"
POLICY = "pread in place of a mapping: read the policy"
RECORD_US, POLICY_US = 5.0, 1.0
"""What must hold: a record is written and the policy is read in at most this, median."""


class Pair(NamedTuple):
    """The same work without a protection and with it."""

    what: str
    without: Callable[[], object]
    protected: Callable[[], object]


class Cost(NamedTuple):
    """Microseconds of a call, and the medians of the rounds' differences and ratios."""

    what: str
    without_us: float
    with_us: float
    more_us: float
    ratio: float


def paired(pair: Pair, rounds: int, calls: int = CALLS) -> Cost:
    """Measure a pair."""
    taken = np.empty((rounds, 2))
    kinds = pair.without, pair.protected
    for kind in kinds:
        _block_us(kind, calls)
    gc.disable()
    try:
        for number in range(rounds):
            for side in (0, 1) if number % 2 else (1, 0):
                taken[number, side] = _block_us(kinds[side], calls)
    finally:
        gc.enable()
    without, protected = taken.T
    medians = [float(np.median(part)) for part in (without, protected, protected - without, protected / without)]
    return Cost(pair.what, *medians)


def _block_us(call: Callable[[], object], calls: int) -> float:
    begun_ns = time.perf_counter_ns()
    for _ in range(calls):
        call()
    return (time.perf_counter_ns() - begun_ns) / calls / 1e3


# -- the pairs ---------------------------------------------------------------------------------------------------------


def pairs(folder: Path) -> list[Pair]:
    """Return all pairs, on files in `folder`."""
    return [*_ring_pairs(folder), *_page_pairs(folder), *_planner_pairs(), *_engine_pairs()]


def _ring_pairs(folder: Path) -> list[Pair]:
    info = engine_info()
    rng = np.random.default_rng(1)
    rows = rng.uniform(0.2, 1.0, (BATCH, MAX_K)).astype(np.float32)
    lengths, ids = np.full(BATCH, MAX_K, np.uint8), np.arange(BATCH, dtype=np.uint32)
    writer = RingWriter.create(folder / "pwrite.ring", info)
    RingWriter.create(folder / "mapped.ring", info).close()
    with (folder / "mapped.ring").open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0)
    index = [0]

    def written() -> None:
        writer.write_fields(
            1, 2, 90_000, 1, 512, 512, BATCH, MAX_K, 0, 1e-3, 5e-3, 1e-3, 8e-3, rows, lengths, lengths, ids
        )  # fmt: skip

    def into_a_mapping() -> None:
        head = HEAD.pack(index[0] + 1, 1, 2, 90_000, 1, 512, 512, BATCH, BATCH, MAX_K, 0, 1e-3, 5e-3, 1e-3, 8e-3)
        record = b"".join((head, rows, ids, lengths, lengths))  # type: ignore[arg-type]  # arrays have the buffer protocol
        at = HEADER_BYTES + index[0] % (writer.slots + 1) * writer.layout.slot_bytes
        mapped[at : at + len(record)] = record
        index[0] += 1
        mapped[64:72] = index[0].to_bytes(8, "little")

    descriptor = os.open(folder / "cursor", os.O_RDWR | os.O_CREAT, 0o600)
    one, two = bytes(8), bytes(16)
    written()
    reader = RingReader.open(folder / "pwrite.ring")
    slot = bytes((folder / "pwrite.ring").read_bytes()[HEADER_BYTES : HEADER_BYTES + reader.layout.slot_bytes])

    def checked() -> None:
        record = decode_slot(slot, reader.layout)
        assert record is not None
        record.invalid_reason()

    return [
        Pair(RECORD, into_a_mapping, written),
        Pair(
            "cursor with its inversion", lambda: os.pwrite(descriptor, one, 64), lambda: os.pwrite(descriptor, two, 64)
        ),
        Pair("plausibility of a record (in the sidecar)", lambda: decode_slot(slot, reader.layout), checked),
    ]  # fmt: skip


def _page_pairs(folder: Path) -> list[Pair]:
    now_ns = time.monotonic_ns()
    info, policy = engine_info(), policy_for(LARGE_BATCH)
    page = PolicyPage.create_or_open(folder / PAGE_NAME, payload_bytes(LARGE_BATCH, MAX_K))
    page.heartbeat(now_ns)
    page.publish(policy)
    reader = PolicyPageReader.open(folder / PAGE_NAME)
    reader.poll(now_ns)
    with (folder / PAGE_NAME).open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0)
    live = struct.Struct("<QQQ")
    seen, longest_ns = live.unpack_from(mapped, 64)[0], int(30e9)

    def from_a_mapping() -> object:
        sequence, _, heartbeat_ns = live.unpack_from(mapped, 64)
        return policy if sequence == seen and -longest_ns <= now_ns - heartbeat_ns <= longest_ns else None

    payload = encode_policy(policy)

    def checksummed() -> None:
        zlib.crc32(payload)
        decode_policy(payload)

    tap = EngineTap.open(folder, info)
    planner = Planner(4, MAX_K)
    planner.adopt(policy)

    def bare_step() -> None:
        reader.poll(now_ns)
        planner.draft_length(BATCH, 90_000)

    looking, blind = tap, EngineTap(folder, info, None)
    blind._page = PolicyPageReader.open(folder / PAGE_NAME)
    blind._look_at = NEVER
    looking.begin_step(BATCH, 90_000, now_ns)
    blind.begin_step(BATCH, 90_000, now_ns)
    return [
        Pair(POLICY, from_a_mapping, lambda: reader.poll(now_ns)),
        Pair(f"checksum of a new policy, batch {LARGE_BATCH}", lambda: decode_policy(payload), checksummed),
        Pair("failures kept from the engine: begin_step", bare_step, lambda: blind.begin_step(BATCH, 90_000, now_ns)),
        Pair(
            "a look for a new page every 64 steps: begin_step", lambda: blind.begin_step(BATCH, 90_000, now_ns),
            lambda: looking.begin_step(BATCH, 90_000, now_ns),
        ),
        _ring_look(folder / "looked", now_ns),
    ]  # fmt: skip


def _ring_look(folder: Path, now_ns: int) -> Pair:
    """Steps of a tap that looks at its ring every 64 steps, and of one that never does."""
    rows = np.full((BATCH, MAX_K), 0.5, np.float32)
    lengths, ids = np.full(BATCH, MAX_K, np.uint8), np.arange(BATCH, dtype=np.uint32)
    looking, blind = (EngineTap.open(folder / name, engine_info()) for name in ("looking", "blind"))
    blind._ring_look_at = NEVER

    def step(tap: EngineTap) -> None:
        tap._step += 1
        tap.end_step(now_ns, 512, 512, 1e-3, 5e-3, 1e-3, 8e-3, rows, lengths, lengths, ids)

    return Pair("a look at the ring every 64 steps: end_step", lambda: step(blind), lambda: step(looking))


class _Unmasked(Planner):
    def _runnable_k(self, k: int, batch_size: int) -> int:
        return k


def _planner_pairs() -> list[Pair]:
    policy = policy_for(LARGE_BATCH)
    allowed = np.ones((LARGE_BATCH + 1, MAX_K + 1), np.bool_)
    masked, unmasked = Planner(4, MAX_K, allowed), _Unmasked(4, MAX_K)
    masked.adopt(policy)
    unmasked.adopt(policy)
    return [
        Pair(
            "mask of allowed K: draft_length", lambda: unmasked.draft_length(BATCH, 90_000),
            lambda: masked.draft_length(BATCH, 90_000),
        ),
    ]  # fmt: skip


class _Now(NamedTuple):
    """A moment that is known."""

    time_s: float

    def seconds_to(self, later: Any) -> float:
        return float(later.time_s - self.time_s)


def _engine_pairs() -> list[Pair]:
    def before(*_: object) -> int:
        return 1

    def after(*_: object) -> None: ...

    def original(*_: object) -> int:
        return 2

    hooked = Guard("bench", "").around("step", before, after)

    def unguarded() -> None:
        before(None)
        after(1, original(None), None)

    rows, begun = np.full((BATCH, MAX_K), 0.5, np.float32), BegunStep(1, MAX_K, BATCH, 90_000, 1, 0)
    ids, accepted, counted = np.arange(BATCH, dtype=np.uint32), [3] * BATCH, [True] * BATCH
    finished: list[FinishedStep] = []
    book = StepsInFlight(finished.append)
    moments = [_Now(1e-3 * number) for number in range(4)]

    def by_the_book() -> None:
        finished.clear()
        step = OpenStep(begun, MAX_K, ids, BATCH, moments[0], flags=int(StepFlag.STEP_CHOICE))
        step.stages = {"draft": (moments[0], moments[1]), "verify": (moments[1], moments[2])}
        step.ended, step.confidences = moments[3], KnownConfidences(rows)
        book.begin(step)
        book.result(step, accepted, counted)
        book.interrupt()

    def by_hand() -> None:
        finished.clear()
        accept_len = np.array(accepted, np.uint8)
        verify_len = np.full(BATCH, MAX_K, np.uint8)
        tokens = BATCH * (MAX_K + 1)
        finished.append(FinishedStep(begun, tokens, tokens, 1e-3, 1e-3, 0.0, 3e-3, rows, verify_len, accept_len, ids, 0))

    by_the_book()
    if len(finished) != 1:
        raise RuntimeError("the step was not written")
    return [
        Pair("guard of a hook", unguarded, lambda: hooked(original, None)),
        Pair(f"step book: each result to its own step, batch {BATCH}", by_hand, by_the_book),
    ]


@click.command()
@click.option("--rounds", type=click.IntRange(10, 100_000), default=300, show_default=True, help="Of each pair.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def main(rounds: int, as_json: bool) -> None:
    """Measure what each protection costs."""
    with folder_in_memory() as folder:
        costs = [paired(pair, rounds) for pair in pairs(folder)]
    if as_json:
        click.echo(json.dumps([cost._asdict() for cost in costs], indent=1))
        return
    click.echo(f"{'':62s} {'without':>9s} {'with':>9s} {'more':>9s} {'ratio':>6s}")
    for cost in costs:
        click.echo(f"{cost.what:62s} {cost.without_us:6.2f} us {cost.with_us:6.2f} us {cost.more_us:+6.2f} us {cost.ratio:6.2f}")
    by_name = {cost.what: cost for cost in costs}
    limits = ("a record is written", by_name[RECORD], RECORD_US), ("the policy is read", by_name[POLICY], POLICY_US)
    for what, cost, limit_us in limits:
        verdict = "holds" if cost.with_us <= limit_us else "DOES NOT HOLD"
        click.echo(f"{what} in {cost.with_us:.2f} us, wanted <= {limit_us:g} us: {verdict}")


if __name__ == "__main__":
    main()
