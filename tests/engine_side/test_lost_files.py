"""Ring, page, lock or folder deleted or damaged under a running engine: it goes on, and what is its own is made again."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from adaptive_spec.engine_side.tap import LOOK_STEPS, PAGE_NAME, RETRY_STEPS, RING_NAME, EngineTap
from adaptive_spec.runtime_folder import RoleLock, role_is_held
from adaptive_spec.wire.policy_page import PolicyPage
from adaptive_spec.wire.policy_payload import payload_bytes
from adaptive_spec.wire.ring import RingReader
from tests.support.wire import engine, policy_of

CAPACITY = payload_bytes(64, 7)
LAUNCH_K = 4
S = 1_000_000_000


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def tap(run: Path) -> Iterator[EngineTap]:
    made = EngineTap.open(run, engine())
    yield made
    made.close()


def steps(tap: EngineTap, count: int, now_s: float = 100.0) -> list[int]:
    """Whole decode steps; returns the K of each."""
    ks = []
    for _ in range(count):
        ks.append(tap.begin_step(2, 50, int(now_s * S)))
        confidences = np.full((2, ks[-1]), 0.5, np.float32)
        lengths = tap.verify_lengths(confidences)
        tokens = int(lengths.sum()) + 2
        tap.end_step(100, tokens, tokens, 0.1, 0.2, 0.0, 0.4, confidences, lengths, lengths, np.arange(2, dtype=np.uint32))
    return ks


def readable(run: Path) -> int:
    """Records that a reader who attaches now finds."""
    with RingReader.open(run / RING_NAME) as reader:
        return len(reader.poll())


def damage(run: Path, how: str) -> None:
    path = run / RING_NAME
    if how == "deleted":
        path.unlink()
    elif how == "emptied":
        os.truncate(path, 0)
    elif how == "overwritten":
        shutil.copyfile(__file__, path)
    elif how == "mode 0000":
        path.chmod(0)
    elif how == "folder":
        path.unlink()
        path.mkdir()
    elif how == "link":
        path.rename(run / "moved")
        path.symlink_to("moved")
    elif how == "everything":
        shutil.rmtree(run)


@pytest.mark.parametrize("how", ["deleted", "emptied", "overwritten", "link", "folder", "mode 0000", "everything"])
def test_a_lost_ring_is_made_again(run: Path, tap: EngineTap, how: str) -> None:
    steps(tap, LOOK_STEPS + 1)
    damage(run, how)
    steps(tap, LOOK_STEPS)
    before = tap.counters.records_written
    assert before == 2 * LOOK_STEPS + 1  # those into the lost file count: nothing failed
    found = readable(run)
    steps(tap, 10)
    assert readable(run) == found + 10
    assert (run / RING_NAME).stat().st_mode & 0o777 == 0o600
    assert role_is_held(run, "engine")
    counters = tap.counters
    assert (counters.records_written - before, counters.write_failures, counters.hook_failures) == (10, 0, 0)


def test_the_role_is_taken_again_and_no_other_engine_is_disturbed(run: Path, tap: EngineTap) -> None:
    with PolicyPage.create_or_open(run / PAGE_NAME, CAPACITY) as page:
        page.heartbeat(100 * S)
        page.publish(policy_of(1, k=2))
        assert steps(tap, LOOK_STEPS + 1)[-1] == 2
        (run / "engine.lock").unlink()
        other = RoleLock.acquire(run, "engine")
        steps(tap, LOOK_STEPS + 1)
        assert set(steps(tap, 2 * LOOK_STEPS)) == {LAUNCH_K}, "the page is the other's now"
        assert "another engine" in tap.refused
        assert not tap.counters.hook_failures
        other.release()
        steps(tap, RETRY_STEPS + LOOK_STEPS)
        assert tap.refused == ""
        assert steps(tap, 1) == [2]
        assert readable(run) > 0


@contextlib.contextmanager
def longest_file(size: int) -> Iterator[None]:
    """No file of this process can grow beyond `size`: the error that a full disk gives."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_engine_started_without_space_writes_when_there_is_some(run: Path) -> None:
    with longest_file(1000):
        tap = EngineTap.open(run, engine())
        steps(tap, 3)
        assert tap.counters.write_failures == 3
        assert [path.name for path in run.iterdir()] == ["engine.lock"], "no temporary file is left"
    steps(tap, RETRY_STEPS + 1)
    assert readable(run) > 0
    tap.close()


def test_a_folder_that_was_read_only_at_the_start_is_used_once_it_is_not(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def read_only(folder: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(folder))

    with monkeypatch.context() as context:
        context.setattr("adaptive_spec.engine_side.tap.make_runtime_dir", read_only)
        tap = EngineTap.open(run, engine())
        steps(tap, 3 * RETRY_STEPS)
    assert caplog.text.count("Read-only file system: this engine cannot be observed or steered") == 1
    with PolicyPage.create_or_open(run / PAGE_NAME, CAPACITY) as page:
        page.heartbeat(100 * S)
        page.publish(policy_of(1, k=2))
        steps(tap, RETRY_STEPS + LOOK_STEPS)
        assert (tap.refused, steps(tap, 1)) == ("", [2])
    assert readable(run) > 0
    tap.close()


def test_an_engine_that_was_refused_at_the_start_because_of_another_stays_refused(run: Path) -> None:
    first, second = EngineTap.open(run, engine()), EngineTap.open(run, engine())
    first.close()
    steps(second, 2 * RETRY_STEPS)
    assert "another engine" in second.refused
    second.close()


def test_a_ring_made_again_without_space_goes_on_when_there_is_some(run: Path, tap: EngineTap) -> None:
    steps(tap, 1)
    damage(run, "deleted")
    with longest_file(50_000_000):  # the file can be made
        steps(tap, LOOK_STEPS)
    assert (run / RING_NAME).stat().st_blocks * 512 < (run / RING_NAME).stat().st_size, "allocating it would stop the step"
    with longest_file(1000):
        steps(tap, 5)
        assert tap.counters.write_failures == 5
    steps(tap, 5)
    assert tap.counters.write_failures == 5


def test_a_truncated_page_costs_nothing_while_its_heartbeat_is_fresh(run: Path, tap: EngineTap) -> None:
    with PolicyPage.create_or_open(run / PAGE_NAME, CAPACITY) as page:
        page.heartbeat(100 * S)
        page.publish(policy_of(1, k=2))
        assert steps(tap, LOOK_STEPS + 1)[-1] == 2
        os.truncate(run / PAGE_NAME, 0)
        assert set(steps(tap, 3 * LOOK_STEPS)) == {2}
        page.renew()
        page.publish(policy_of(2, k=5))
        assert steps(tap, LOOK_STEPS + 1)[-1] == 5


def test_why_there_is_no_ring_is_logged_once(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    with longest_file(1000):
        tap = EngineTap.open(run, engine())
        steps(tap, 3 * RETRY_STEPS)
    assert caplog.text.count("record ring") == 1
    assert "File too large" in caplog.text
    tap.close()
