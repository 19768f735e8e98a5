"""Ring and page as state machines: writers that fail in the middle, files that are truncated, processes that start anew.

In any order of these, what a reader takes is exactly what was written, in order, and each record is counted once.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from adaptive_spec.domain.step_record import StepRecord
from adaptive_spec.wire import ring as ring_module
from adaptive_spec.wire.policy_page import PolicyPage, PolicyPageError, PolicyPageReader
from adaptive_spec.wire.policy_payload import payload_bytes
from adaptive_spec.wire.ring import HEADER_BYTES, RingLayoutError, RingReader, RingWriter
from tests.support.wire import engine, policy_of, record_of, same, whole

S = 1_000_000_000
MAX_AGE_S = 10
ROWS, K = 3, 2
CAPACITY = payload_bytes(64, 7)
steps = settings(max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Ended(BaseException):
    """The process ends here. No handler of the code under test catches it."""


def short(write: Callable[[int, bytes, int], int], calls: int, kept: int, error: type[BaseException]) -> Callable[..., int]:
    """A pwrite whose call number `calls` writes `kept` bytes and raises."""
    left = [calls]

    def pwrite(descriptor: int, data: bytes, offset: int) -> int:
        left[0] -= 1
        if left[0] != 0:
            return write(descriptor, data, offset)
        write(descriptor, data[:kept], offset)
        raise error

    return pwrite


class RingMachine(RuleBasedStateMachine):
    """One engine, a reader that stays and readers that come late."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "r"
        self.written = 0
        self.truncated = False

    @initialize(slots=st.integers(2, 5))
    def start(self, slots: int) -> None:
        self.slots = slots
        self.begin()

    def begin(self) -> None:
        self.writer = RingWriter.create(self.path, engine(ROWS, tuple(range(K + 1))), self.slots)
        self.reader = RingReader.open(self.path)
        self.written, self.last, self.truncated = 0, -1, False

    @rule(count=st.integers(1, 7))
    def write(self, count: int) -> None:
        for _ in range(count):
            self.writer.write(record_of(self.written, 1 + self.written % ROWS, self.written % (K + 1)))
            self.written += 1
        assert self.writer.written == self.written

    @rule(call=st.integers(1, 2), kept=st.integers(0, 100), ends=st.booleans())
    def fail_in_a_write(self, call: int, kept: int, ends: bool) -> None:
        """The disk is full, or the engine is killed, after a part of the record or of the cursor. The next write heals it.

        A full disk does not split the cursor: it lies within a page that is there.
        """
        failed = self.writer.failed
        part = min(kept, 15 if ends else 0) if call == 2 else kept
        with mock.patch.object(ring_module, "pwrite", short(os.pwrite, call, part, Ended if ends else OSError)):
            try:
                self.writer.write(record_of(self.written, 1 + self.written % ROWS, self.written % (K + 1)))
            except Ended:
                self.written += 1  # the cursor may have been moved
                self.poll(100)
                self.writer.close()
                self.reader.close()
                self.begin()
                return
        assert self.writer.failed == failed + 1
        self.poll(100)

    @rule(limit=st.integers(1, 9))
    def poll(self, limit: int) -> None:
        self.take(self.reader.poll(limit))

    def take(self, records: list[StepRecord]) -> None:
        for record in records:
            step = record.step
            assert step > self.last
            assert same(record, record_of(step, 1 + step % ROWS, step % (K + 1)))
            self.last = step

    @rule()
    def come_late(self) -> None:
        try:
            with RingReader.open(self.path) as late:
                seen = late.poll(1000)
        except RingLayoutError:
            assert self.truncated
            return
        if not self.truncated:
            assert [record.step for record in seen] == list(range(max(self.written - self.slots, 0), self.written))

    @rule(length=st.integers(0, HEADER_BYTES + 500))
    def truncate(self, length: int) -> None:
        os.truncate(self.path, length)
        self.truncated = True
        self.reader.poll(1000)
        assert not self.writer.in_place()

    @precondition(lambda self: self.truncated)
    @rule()
    def make_again(self) -> None:
        self.writer.close()
        old = self.reader
        self.writer = RingWriter.create(self.path, engine(ROWS, tuple(range(K + 1))), self.slots)
        assert old.replaced()
        old.close()
        self.reader = RingReader.open(self.path)
        self.written, self.last, self.truncated = 0, -1, False

    @invariant()
    def each_record_is_counted_once(self) -> None:
        if not hasattr(self, "reader"):
            return
        reader = self.reader
        assert reader.position - reader.start == reader.delivered + reader.lost + reader.torn + reader.invalid
        assert reader.position <= self.written
        if not self.truncated:
            assert reader.invalid == reader.torn == 0
            assert self.writer.in_place()

    def teardown(self) -> None:
        if hasattr(self, "reader"):
            self.reader.close()
            self.writer.close()
        shutil.rmtree(self.folder)


class PageMachine(RuleBasedStateMachine):
    """Sidecars that follow one another, an engine that reads, and a second engine of another kind."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "run" / "p"
        self.now_s = 1000
        self.beat_s: int | None = None
        self.published = 0
        self.engine = 5
        self.damaged = False
        self.page = PolicyPage.create_or_open(self.path, CAPACITY, self.engine)
        self.reader = PolicyPageReader.open(self.path, MAX_AGE_S, engine=self.engine)
        self.newest = 0

    def version(self) -> int:
        return self.page.last_version + 1

    @rule(k=st.integers(0, 7))
    def publish(self, k: int) -> None:
        self.published = self.version()
        self.page.publish(policy_of(self.published, k))

    @rule()
    def beat(self) -> None:
        self.beat_s = self.now_s
        self.page.heartbeat(self.now_s * S)

    @rule(seconds=st.integers(1, 12))
    def wait(self, seconds: int) -> None:
        self.now_s += seconds

    @rule(call=st.integers(1, 3), kept=st.integers(0, 60), ends=st.booleans())
    def fail_in_a_publication(self, call: int, kept: int, ends: bool) -> None:
        """After a part of payload, buffer or the words that publish. Of the last only eight bytes are one store."""
        kept = 0 if call == 3 else kept
        with mock.patch.object(os, "pwrite", short(os.pwrite, call, kept, Ended if ends else OSError)):
            try:
                self.page.publish(policy_of(self.version(), 1))
            except OSError:
                self.poll()
            except Ended:
                self.poll()
                self.restart(1)

    @rule(larger=st.integers(1, 2))
    def restart(self, larger: int) -> None:
        """Another sidecar takes the page over."""
        self.page.close()
        self.page = PolicyPage.create_or_open(self.path, larger * CAPACITY, self.engine)
        if self.damaged:
            self.follow(made_again=True)
        else:
            assert self.page.last_version >= self.published
            self.follow()

    @rule()
    def serve_another_engine(self) -> None:
        self.page.close()
        last = 0 if self.damaged else self.published
        self.page = PolicyPage.create_or_open(self.path, CAPACITY, self.engine + 1)
        assert self.page.policy is None
        assert self.page.last_version >= last, "versions go on"
        with pytest.raises(PolicyPageError, match="engine: must be"):
            PolicyPageReader.open(self.path, MAX_AGE_S, engine=self.engine)
        self.engine += 1
        self.reader.close()
        self.reader = PolicyPageReader.open(self.path, MAX_AGE_S, engine=self.engine)
        self.newest = self.published = 0
        self.beat_s = None if self.damaged else self.beat_s  # a heartbeat is the sidecar's, whatever engine it serves
        self.damaged = False

    @rule(length=st.integers(0, 6000), how=st.sampled_from(["truncate", "delete", "delete all", "overwrite"]))
    def damage(self, length: int, how: str) -> None:
        if not self.path.exists():
            return
        if how == "truncate":
            os.truncate(self.path, length)
        elif how == "overwrite":
            self.path.write_bytes(b"\xff" * length)
        else:
            self.path.unlink()
            if how == "delete all":
                shutil.rmtree(self.path.parent)
        self.damaged = True
        assert not self.page.in_place()
        self.poll()

    @precondition(lambda self: self.damaged)
    @rule()
    def renew(self) -> None:
        self.page.renew()
        self.damaged = False
        assert self.page.in_place()
        self.follow()

    def follow(self, *, made_again: bool = False) -> None:
        """The engine opens the page that lies at the path now, as its tap does."""
        last_good = self.reader.policy
        self.reader.close()
        self.reader = PolicyPageReader.open(self.path, MAX_AGE_S, last_good, self.engine)
        if made_again:  # nothing of the damaged page was kept
            self.published, self.beat_s, self.newest = self.page.last_version, None, 0
        self.newest, self.damaged = 0, False

    @rule()
    def poll(self) -> None:
        policy = self.reader.poll(self.now_s * S)
        if policy is not None:
            assert whole(policy)
            assert policy.version >= self.newest, "a reader never goes back"
            self.newest = policy.version
        if not self.damaged:
            fresh = self.beat_s is not None and self.now_s - self.beat_s <= MAX_AGE_S
            if self.published:
                assert (policy is not None) == fresh
                assert policy is None or policy.version == self.published
            assert fresh or policy is None

    def teardown(self) -> None:
        self.reader.close()
        self.page.close()
        shutil.rmtree(self.folder)


TestRing = RingMachine.TestCase
TestRing.settings = steps
TestPage = PageMachine.TestCase
TestPage.settings = steps
