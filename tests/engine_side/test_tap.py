"""The engine's tap: what it returns, what it writes, and that it never raises."""

from __future__ import annotations

import logging
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.domain.policy import Granularity, Mode, Trial
from adaptive_spec.domain.step_record import StepFlag, StepRecord
from adaptive_spec.domain.survival import GRID_POINTS, SurvivalMap
from adaptive_spec.engine_side import tap as tap_module
from adaptive_spec.engine_side.tap import LOOK_STEPS, PAGE_NAME, RING_NAME, BegunStep, EngineTap
from adaptive_spec.wire.policy_page import PolicyPage, payload_bytes
from adaptive_spec.wire.ring import RingReader
from tests.support.wire import engine, policy_of

ROOT = str(Path(__file__).parents[2])
CAPACITY = payload_bytes(64, 7)
LAUNCH_K = 4
S = 1_000_000_000


@pytest.fixture
def page(tmp_path: Path) -> Iterator[PolicyPage]:
    """A page with a heartbeat of second 100."""
    with PolicyPage.create_or_open(tmp_path / "run" / PAGE_NAME, CAPACITY) as made:
        made.heartbeat(100 * S)
        yield made


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def step(tap: EngineTap, now_s: float = 100.0, batch_size: int = 2, flags: int = 0) -> int:
    """One whole decode step; returns its K."""
    k = tap.begin_step(batch_size, 50, int(now_s * S))
    confidences = np.full((batch_size, k), 0.5, np.float32)
    lengths = tap.verify_lengths(confidences)
    tokens = int(lengths.sum()) + batch_size
    ids = np.arange(batch_size, dtype=np.uint32)
    tap.end_step(int(now_s * S), tokens, tokens, 0.1, 0.2, 0.0, 0.4, confidences, lengths, lengths // 2, ids, flags)
    return k


def records(run: Path) -> list[StepRecord]:
    with RingReader.open(run / RING_NAME) as reader:
        return reader.poll()


def test_without_a_sidecar_the_launch_k_runs_and_is_recorded(run: Path) -> None:
    tap = EngineTap.open(run, engine())
    assert [step(tap) for _ in range(5)] == [LAUNCH_K] * 5
    assert tap.counters == (5, 0, 0, 0, 0, 5)
    seen = records(run)
    assert [(r.step, r.k, r.flags, r.policy_version) for r in seen] == [(i, 4, StepFlag.FALLBACK, 0) for i in range(1, 6)]
    assert (seen[0].kv_tokens, seen[0].time_ns, seen[0].batch_size, seen[0].verify_len.tolist()) == (50, 100 * S, 2, [4, 4])
    assert tap.held_batch_size == 0


def test_a_policy_is_adopted_once_and_followed(run: Path, page: PolicyPage) -> None:
    tap = EngineTap.open(run, engine())
    page.publish(policy_of(1, k=2))
    assert [step(tap) for _ in range(3)] == [2] * 3
    page.publish(policy_of(2, k=6))
    assert [step(tap) for _ in range(3)] == [6] * 3
    assert tap.counters == (6, 0, 0, 0, 2, 0)
    assert [(r.k, r.flags, r.policy_version) for r in records(run)] == [(2, 0, 1)] * 3 + [(6, 0, 2)] * 3


def test_without_a_heartbeat_the_launch_k_runs_until_it_is_fresh_again(run: Path, page: PolicyPage) -> None:
    tap = EngineTap.open(run, engine(), max_age_s=10.0)
    page.publish(policy_of(1, k=2, trials=(Trial(2, 7, 0, 2),)))
    assert [step(tap, now) for now in (100, 105, 110)] == [7, 7, 2]
    assert [step(tap, now) for now in (110.5, 200, 300)] == [LAUNCH_K] * 3
    page.heartbeat(300 * S)
    assert [step(tap, now) for now in (300, 309)] == [2, 2]  # the same policy: its trials are not run again
    assert tap.counters.adoptions == 1
    assert tap.counters.fallback_steps == 3
    fallback, trial = int(StepFlag.FALLBACK), int(StepFlag.TRIAL)
    assert [r.flags for r in records(run)] == [trial, trial, 0, fallback, fallback, fallback, 0, 0]
    assert [r.policy_version for r in records(run)] == [1, 1, 1, 0, 0, 0, 1, 1]


def test_no_part_of_a_policy_is_used_without_a_fresh_heartbeat(run: Path, page: PolicyPage) -> None:
    tap = EngineTap.open(run, engine(), max_age_s=10.0)
    never = SurvivalMap(np.full((7, GRID_POINTS), 1e-3, np.float32), True)
    steep = np.linspace(1.0, 100.0, 513, dtype=np.float32)
    page.publish(replace(policy_of(1, trials=(Trial(6, 7, 0, 1),)), survival=never, verify_s=steep))
    drafted = np.full((2, 3), 0.5, np.float32)
    for now_s, held, lengths in ((100, 6, [0, 0]), (111, 0, [3, 3]), (101, 6, [0, 0])):
        tap.begin_step(2, 0, now_s * S)
        assert (tap.held_batch_size, tap.verify_lengths(drafted).tolist()) == (held, lengths)


def test_a_page_left_by_another_boot_is_not_followed(run: Path, page: PolicyPage) -> None:
    page.publish(policy_of(1, k=2))
    tap = EngineTap.open(run, engine())
    assert step(tap, now_s=3.0) == LAUNCH_K


def test_a_page_created_later_is_found(run: Path) -> None:
    tap = EngineTap.open(run, engine())
    assert step(tap) == LAUNCH_K
    with PolicyPage.create_or_open(run / PAGE_NAME, CAPACITY) as page:
        page.heartbeat(100 * S)
        page.publish(policy_of(1, k=2))
        k = [step(tap) for _ in range(LOOK_STEPS + 1)]
        assert k[-1] == 2
        assert set(k) == {LAUNCH_K, 2}
        assert sorted(k, reverse=True) == k


def test_a_page_that_replaces_another_is_followed(run: Path, page: PolicyPage) -> None:
    tap = EngineTap.open(run, engine())
    page.publish(policy_of(9, k=2))
    assert step(tap) == 2
    page.close()
    (run / PAGE_NAME).unlink()
    assert [step(tap) for _ in range(LOOK_STEPS)] == [2] * LOOK_STEPS  # gone: the last good one holds
    with PolicyPage.create_or_open(run / PAGE_NAME, CAPACITY) as new:
        new.heartbeat(100 * S)
        assert [step(tap) for _ in range(LOOK_STEPS)] == [2] * LOOK_STEPS  # there, but nothing decided yet
        new.publish(policy_of(1, k=5))
        assert step(tap) == 5
    assert tap.counters.page_failures == tap.counters.hook_failures == tap.counters.fallback_steps == 0


@pytest.mark.parametrize("spoil", [b"", b"not a page" * 1000, None])
def test_a_foreign_page_is_counted_and_not_waited_for(run: Path, spoil: bytes | None) -> None:
    tap = EngineTap.open(run, engine())
    if spoil is None:
        os.mkfifo(run / PAGE_NAME)
    else:
        (run / PAGE_NAME).write_bytes(spoil)
    assert [step(tap) for _ in range(LOOK_STEPS + 1)] == [LAUNCH_K] * (LOOK_STEPS + 1)
    assert tap.counters.page_failures == 2
    assert tap.counters.hook_failures == 0


def test_a_damaged_policy_leaves_the_last_good_one(run: Path, page: PolicyPage) -> None:
    tap = EngineTap.open(run, engine())
    page.publish(policy_of(1, k=2))
    assert step(tap) == 2
    page.publish(policy_of(2, k=6))
    with (run / PAGE_NAME).open("r+b") as file:
        file.seek(4096 + 60)
        file.write(b"\xff")
    assert [step(tap) for _ in range(3)] == [2] * 3
    assert tap.counters.page_failures == 1
    page.publish(policy_of(3, k=7))
    assert step(tap) == 7


@pytest.mark.parametrize(
    ("candidates", "wanted", "k"),
    [((1, 3, 5), 7, 5), ((1, 3, 5), 4, 3), ((1, 3, 5), 3, 3), ((1, 3, 5), 0, 1), ((0, 4), 3, 0)],
)
def test_k_is_always_a_candidate(run: Path, page: PolicyPage, candidates: tuple[int, ...], wanted: int, k: int) -> None:
    tap = EngineTap.open(run, engine(candidates=candidates))
    page.publish(policy_of(1, k=wanted))
    assert step(tap) == k
    page.publish(policy_of(2, k=wanted, trials=(Trial(0, wanted, 0, 1),)))
    assert step(tap) == k


@pytest.mark.parametrize(("launch_k", "k"), [(5, 5), (9, 5), (4, 3), (0, 1), (-1, 1)])
def test_a_launch_k_that_is_no_candidate_is_rounded(run: Path, launch_k: int, k: int) -> None:
    tap = EngineTap.open(run, replace(engine(candidates=(1, 3, 5)), launch_k=launch_k))
    assert step(tap) == k


def test_shadow_changes_nothing_and_is_no_fallback(run: Path, page: PolicyPage) -> None:
    tap = EngineTap.open(run, engine())
    page.publish(policy_of(1, k=1, trials=(Trial(2, 7, 3, 9),), mode=Mode.SHADOW, acting=False))
    assert [step(tap) for _ in range(3)] == [LAUNCH_K] * 3
    assert tap.held_batch_size == 0
    assert [(r.flags, r.policy_version) for r in records(run)] == [(0, 0)] * 3
    assert tap.counters.fallback_steps == 0


def test_trials_hold_a_batch_and_are_marked(run: Path, page: PolicyPage) -> None:
    tap = EngineTap.open(run, engine())
    page.publish(policy_of(1, k=3, trials=(Trial(6, 5, 9, 2),)))
    assert step(tap, batch_size=2) == 3
    assert tap.held_batch_size == 6
    assert [step(tap, batch_size=6, flags=int(StepFlag.DISTURBED)) for _ in range(3)] == [5, 5, 3]
    assert tap.held_batch_size == 0
    seen = records(run)
    both = StepFlag.TRIAL | StepFlag.DISTURBED
    assert [r.flags for r in seen] == [0, both, both, StepFlag.DISTURBED]
    assert [r.num_tokens for r in seen[1:3]] == [9, 9]


def test_an_engine_without_ragged_verification_verifies_everything(run: Path, page: PolicyPage) -> None:
    page.publish(policy_of(1, k=3))
    unlikely = np.full((2, 3), 1e-6, np.float32)
    ragged = EngineTap.open(run, engine())
    ragged.begin_step(2, 0, 100 * S)
    assert ragged.verify_lengths(unlikely).tolist() == [3, 3]  # this policy's costs are flat: all is best
    batch = EngineTap.open(run, replace(engine(), granularity=Granularity.BATCH))
    never = SurvivalMap(np.full((7, GRID_POINTS), 1e-3, np.float32), True)
    page.publish(replace(policy_of(2, k=3), verify_s=np.linspace(1.0, 100.0, 513, dtype=np.float32), survival=never))
    for tap, wanted in ((ragged, [0, 0]), (batch, [3, 3])):
        tap.begin_step(2, 0, 100 * S)
        assert tap.verify_lengths(unlikely).tolist() == wanted


def test_steps_that_overlap_are_recorded_as_they_were_begun(run: Path, page: PolicyPage) -> None:
    tap = EngineTap.open(run, engine())
    page.publish(policy_of(1, k=2))
    tap.begin_step(2, 10, 100 * S)
    first = tap.begun
    page.publish(policy_of(2, k=5))
    tap.begin_step(3, 20, 100 * S)
    assert first == BegunStep(1, 2, 2, 10, 1, 0)
    for begun in (first, tap.begun):
        ones = np.ones(begun.batch_size, np.uint8)
        confidences = np.full((begun.batch_size, begun.k), 0.5, np.float32)
        tap.end_step(0, 9, 9, 0, 0.1, 0, 0.1, confidences, ones, ones, ones.astype(np.uint32), begun=begun)
    assert [(r.step, r.k, r.batch_size, r.kv_tokens, r.policy_version) for r in records(run)] == [
        (1, 2, 2, 10, 1),
        (2, 5, 3, 20, 2),
    ]


def test_folder_and_files_are_private(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        EngineTap.open(tmp_path / "run", engine())
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "run" / RING_NAME).stat().st_mode) == 0o600


def test_without_a_ring_the_tap_logs_it_and_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        tap = EngineTap.open(tmp_path / "file", engine())
    assert "cannot be observed" in caplog.text
    assert [step(tap) for _ in range(3)] == [LAUNCH_K] * 3
    assert tap.counters == (0, 3, 0, 0, 0, 3)


def test_policies_are_followed_without_a_ring(run: Path, page: PolicyPage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaptive_spec.engine_side.tap.RING_NAME", "none/records.ring")
    page.publish(policy_of(1, k=2))
    tap = EngineTap.open(run, engine())
    assert step(tap) == 2
    assert tap.counters.write_failures == 1


def test_a_closed_tap_runs_on_the_launch_k(run: Path, page: PolicyPage) -> None:
    page.publish(policy_of(1, k=2))
    tap = EngineTap.open(run, engine())
    assert step(tap) == 2
    tap.close()
    tap.close()
    assert [step(tap) for _ in range(LOOK_STEPS + 2)] == [LAUNCH_K] * (LOOK_STEPS + 2)


def test_a_large_engine_gets_fewer_slots_not_a_huge_file(run: Path) -> None:
    EngineTap.open(run, engine(max_batch=4096, candidates=tuple(range(33))))
    assert (run / RING_NAME).stat().st_size <= tap_module.RING_BYTES_LIMIT + 4096
    EngineTap.open(run, engine(max_batch=64))
    with RingReader.open(run / RING_NAME) as reader:
        assert reader.slots == 1024


class Broken:
    """An object that fails whatever is done with it."""

    def __getattribute__(self, name: str) -> object:
        raise RuntimeError("broken")


junk = st.one_of(
    st.none(), st.integers(), st.floats(), st.text(max_size=3), st.builds(Broken),
    st.sampled_from([np.zeros((2, 3, 4)), np.zeros((0, 0), np.float32), np.full((2, 9), 0.5), np.full((2, 3), np.nan)]),
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(arguments=st.lists(junk, min_size=18, max_size=18), adopted=st.booleans())
def test_no_argument_makes_the_tap_raise(
    tmp_path_factory: pytest.TempPathFactory, arguments: list[object], adopted: bool
) -> None:
    folder = tmp_path_factory.getbasetemp() / "junk"
    with PolicyPage.create_or_open(folder / PAGE_NAME, CAPACITY) as page:
        page.heartbeat(0)
        if adopted:
            page.publish(replace(policy_of(page.last_version + 1, k=2), verify_s=np.linspace(1, 9, 513, dtype=np.float32)))
        tap = EngineTap.open(folder, engine(), slots=4)
        begin, drafted, end = arguments[:3], arguments[3], arguments[4:17]
        assert tap.begin_step(*begin) in range(8)  # type: ignore[arg-type]  # junk on purpose
        lengths = tap.verify_lengths(drafted)  # type: ignore[arg-type]  # junk on purpose
        assert isinstance(lengths, np.ndarray)
        tap.end_step(*end)  # type: ignore[arg-type]  # junk on purpose
        assert isinstance(tap.held_batch_size, int)
        assert tap.begin_step(2, 0, 0) == (2 if page.last_version else LAUNCH_K)
        tap.close()


def test_an_engine_described_without_candidates_keeps_its_launch_k(run: Path) -> None:
    tap = EngineTap.open(run, EngineInfo("e", "m", "g", 1, 3, (), 8, Granularity.BATCH, False, 1))
    assert tap.begin_step(1, 0, 0) == 3


CHILD = f"""
import sys, time
sys.path.insert(0, {ROOT!r})
from adaptive_spec.wire.policy_page import PolicyPage, payload_bytes
from tests.support.wire import policy_of
page = PolicyPage.create_or_open(sys.argv[1], payload_bytes(64, 7))
page.publish(policy_of(page.last_version + 1, int(sys.argv[2])))
page.heartbeat(int(sys.argv[3]))
print("ready", flush=True)
time.sleep(600)
"""


def test_an_engine_whose_sidecar_was_killed_follows_the_next_one(run: Path) -> None:
    tap = EngineTap.open(run, engine(), max_age_s=10.0)

    def with_sidecar(k: int, now_s: int) -> None:
        command = [sys.executable, "-c", CHILD, str(run / PAGE_NAME), str(k), str(now_s * S)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
                for _ in range(LOOK_STEPS + 1):
                    step(tap, now_s)
                assert step(tap, now_s) == k
            finally:
                process.kill()
        assert process.returncode == -signal.SIGKILL

    with_sidecar(2, 100)
    assert [step(tap, now) for now in (100, 110, 111, 200)] == [2, 2, LAUNCH_K, LAUNCH_K]
    with_sidecar(6, 200)
    assert [step(tap, now) for now in (210, 211)] == [6, LAUNCH_K]
    assert tap.counters.hook_failures == tap.counters.write_failures == tap.counters.page_failures == 0
