"""The policy page: exact round trips, damaged files, and two processes."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from adaptive_spec.domain.allowed import allowed_at, runnable_table
from adaptive_spec.domain.policy import Granularity, Mode, Policy, Trial
from adaptive_spec.domain.survival import GRID_POINTS, SurvivalMap
from adaptive_spec.wire import policy_page, policy_payload
from adaptive_spec.wire.policy_page import (
    PolicyPage,
    PolicyPageError,
    PolicyPageReader,
    decode_policy,
    encode_policy,
    payload_bytes,
)
from tests.support.wire import policy_of, whole
from tests.wire.test_ring import DAMAGE

ROOT = str(Path(__file__).parents[2])
CAPACITY = payload_bytes(64, 7)
DEADLINE_S = 60.0
S = 1_000_000_000


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    """Policies of all shapes, with the values at the ends of their ranges among them."""
    max_k, rows = draw(st.integers(0, 32)), draw(st.integers(1, 70))
    contexts, tokens = draw(st.integers(1, 4)), draw(st.integers(1, 300))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    seconds = st.sampled_from([0.0, 1e-38, 1e-6, 3600.0])
    fixed_s, verify_s = rng.random((max_k + 1, rows)).astype(np.float32), rng.random(tokens).astype(np.float32)
    fixed_s[-1, -1], verify_s[0] = draw(seconds), draw(seconds)
    table = rng.random((draw(st.integers(max_k, 32)), GRID_POINTS)).astype(np.float32)
    table[:1] = draw(st.sampled_from([0.0, 1.0]))
    k_table = rng.integers(0, max_k + 1, (rows, contexts)).astype(np.uint8)
    sizes = sorted(draw(st.sets(st.integers(2, 90), max_size=4)))
    allowed_from = tuple(
        (b, tuple(sorted(draw(st.sets(st.integers(0, max_k), min_size=1))))) for b in ([1, *sizes] if draw(st.booleans()) else [])
    )
    trial_sizes = st.integers(0, 4096)
    if allowed_from:
        mask = np.array([np.isin(np.arange(max_k + 1), allowed_at(allowed_from, b)) for b in range(rows)])
        k_table = np.take_along_axis(runnable_table(mask), k_table.astype(np.int64), axis=1)
        trial_sizes = st.just(0)
    k_max = draw(st.integers(0, 32))
    trial = st.builds(Trial, trial_sizes, st.integers(0, max_k), st.integers(0, 135_000), st.integers(1, 1_000_000))
    return Policy(
        draw(st.integers(1, 2**63)), draw(st.sampled_from(Mode)), draw(st.booleans()), draw(st.sampled_from(Granularity)), max_k,
        k_table, np.arange(contexts - 1, dtype=np.float32) * 1000.5,
        fixed_s, verify_s, draw(st.floats(0.0, 3599.0)), SurvivalMap(table, draw(st.booleans())), draw(st.booleans()),
        tuple(draw(st.lists(trial, max_size=5))), allowed_from, draw(st.floats(0.0, 1.0)), draw(st.floats(0.0, 3599.0)),
        draw(st.integers(0, k_max)), k_max,
    )  # fmt: skip


def assert_same(a: Policy, b: Policy) -> None:
    for field in fields(Policy):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if isinstance(left, SurvivalMap):
            assert left.conditional == right.conditional
            left, right = left.table, right.table
        if isinstance(left, np.ndarray):
            assert (left.dtype, left.shape, left.tobytes()) == (right.dtype, right.shape, right.tobytes()), field.name
        else:
            assert left == right, field.name
            assert type(left) is type(right), field.name


@given(policies())
def test_policy_round_trip_is_exact(policy: Policy) -> None:
    data = encode_policy(policy)
    assert_same(decode_policy(data), policy)
    assert encode_policy(decode_policy(data)) == data


RAIL_BYTES = slice(14, 16)
"""Of a payload: after version and six bytes."""


def test_a_payload_of_a_writer_without_rails_has_none() -> None:
    """Both ways: its two bytes are 0, as the struct's padding was, and no rails are written as 0."""
    assert (GOOD.k_min, GOOD.k_max) == (0, 32)
    assert encode_policy(GOOD)[RAIL_BYTES] == b"\0\0"
    railed = bytearray(encode_policy(replace(GOOD, k_min=2, k_max=5)))
    assert railed[RAIL_BYTES] == bytes((2, 27))
    read = decode_policy(bytes(railed))
    assert (read.k_min, read.k_max, read.verified_rails(7), read.verified_rails(3)) == (2, 5, (2, 5), (2, 3))
    railed[RAIL_BYTES] = b"\0\0"
    assert_same(decode_policy(bytes(railed)), GOOD)


@pytest.mark.parametrize("rails", [b"\1\40", b"\41\0", b"\0\41", b"\377\377"])
def test_rails_that_are_none_are_refused(rails: bytes) -> None:
    payload = bytearray(encode_policy(GOOD))
    payload[RAIL_BYTES] = rails
    with pytest.raises(ValueError, match=r"^k_m(in|ax): must be in 0\.\."):
        decode_policy(bytes(payload))


@pytest.mark.parametrize(("max_batch", "max_k"), [(1, 0), (64, 7), (256, 7), (4096, 32)])
def test_a_page_made_for_the_engine_holds_its_largest_policy(max_batch: int, max_k: int) -> None:
    largest = Policy(
        1, Mode.SWEEP, True, Granularity.REQUEST, max_k, np.zeros((max_batch + 1, 16), np.uint8),
        np.arange(15, dtype=np.float32), np.zeros((max_k + 1, max_batch + 1), np.float32),
        np.zeros(2 * max_batch * (max_k + 1) + 1, np.float32), 0.0,
        SurvivalMap(np.zeros((max_k, GRID_POINTS), np.float32), True), False, (Trial(1, 0, 1, 1),) * policy_payload.MAX_TRIALS,
        tuple((b, tuple(range(b % 2 * max_k + 1))) for b in range(1, max_batch + 1)),
    )  # fmt: skip
    assert len(encode_policy(largest)) == payload_bytes(max_batch, max_k) <= policy_page.MAX_CAPACITY


@settings(max_examples=300)
@given(policies(), st.data())
def test_any_bytes_decode_to_a_valid_policy_or_raise_value_error(policy: Policy, data: st.DataObject) -> None:
    payload = bytearray(encode_policy(policy))
    for _ in range(data.draw(st.integers(1, 3))):
        payload[data.draw(st.integers(0, len(payload) - 1))] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.sampled_from([0, 0, 0, 1, len(payload) // 2]))
    with contextlib.suppress(ValueError):
        policy_page.check_policy(decode_policy(bytes(payload[: len(payload) - cut])))


def with_value(array: NDArray[np.float32], value: float) -> NDArray[np.float32]:
    changed = array.copy()
    changed.flat[changed.size // 2] = value
    return changed


GOOD = policy_of(5)
INVALID = {
    "version": replace(GOOD, version=2**63 + 1),
    "max_k": replace(GOOD, max_k=33),
    "k_table's largest K": replace(GOOD, k_table=np.full((65, 1), 8, np.uint8)),
    "context_edges: must have shape": replace(GOOD, context_edges=np.zeros(2, np.float32)),
    "context_edges: must be ascending": replace(GOOD, k_table=np.zeros((65, 3), np.uint8), context_edges=np.ones(2, np.float32)),
    "fixed_s: must have shape": replace(GOOD, fixed_s=np.zeros((8, 64), np.float32)),
    "fixed_s: all values": replace(GOOD, fixed_s=with_value(GOOD.fixed_s, -1e-9)),
    "verify_s: all values": replace(GOOD, verify_s=with_value(GOOD.verify_s, np.nan)),
    "verify_s: must have shape": replace(GOOD, verify_s=np.zeros(0, np.float32)),
    "context_s_per_token": replace(GOOD, context_s_per_token=float("nan")),
    "survival.table: must have shape": replace(GOOD, survival=SurvivalMap(np.zeros((6, GRID_POINTS), np.float32), True)),
    "survival.table: all values": replace(GOOD, survival=SurvivalMap(np.full((7, GRID_POINTS), 1.001, np.float32), True)),
    "trial k": replace(GOOD, trials=(Trial(0, 8, 0, 1),)),
    "trial steps": replace(GOOD, trials=(Trial(0, 1, 0, 0),)),
    "trial num_tokens": replace(GOOD, trials=(Trial(0, 1, 10**7, 1),)),
    "min_gain": replace(GOOD, min_gain=-0.1),
    "switch_s": replace(GOOD, switch_s=float("inf")),
    r"k_min: must be in 0\.\.4": replace(GOOD, k_min=5, k_max=4),
    "allowed_from: must have ascending batch sizes": replace(GOOD, allowed_from=((2, (0, 3)),)),
    "allowed_from: batch size 9": replace(GOOD, allowed_from=((1, (0, 3)), (9, ()))),
    "allowed_from: batch size 8": replace(GOOD, allowed_from=((1, (0, 3)), (8, (3, 8)))),
    "k_table from batch size 8 on": replace(GOOD, allowed_from=((1, (0, 3)), (8, (0, 1)))),
    "trial k: must be allowed": replace(GOOD, trials=(Trial(8, 5, 0, 1),), allowed_from=((1, (3, 5)), (8, (0, 3)))),
    "trial batch_size": replace(GOOD, trials=(Trial(5000, 1, 0, 1),)),
}  # fmt: skip


@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_policy_is_neither_published_nor_read(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    invalid = INVALID[name]
    with PolicyPage.create_or_open(tmp_path / "p", CAPACITY) as page, PolicyPageReader.open(tmp_path / "p") as reader:
        page.publish(policy_of(4))
        page.heartbeat(0)
        with pytest.raises(ValueError, match=name):
            page.publish(invalid)
        assert reader.poll(0) is not None
        # The same past the writer's own check, as another program or another version might write it.
        with monkeypatch.context() as unchecked:
            unchecked.setattr(policy_payload, "check_policy", lambda policy: None)
            page.publish(invalid)
        assert reader.failures == 0
        last_good = reader.poll(0)
        assert last_good is not None
        assert (last_good.version, reader.failures) == (4, 1)
        reader.poll(0)
        assert reader.failures == 1  # looked at once
        page.policy = GOOD  # what the writer would have published
        page.publish(policy_of(6))
        recovered = reader.poll(0)
        assert recovered is not None
        assert recovered.version == 6


def test_a_k_table_of_another_type_is_checked_before_conversion() -> None:
    with pytest.raises(ValueError, match=r"k_table's largest K: must be in 0\.\.7, got 256"):
        encode_policy(replace(GOOD, k_table=np.full((65, 1), 256)))
    with pytest.raises(ValueError, match="k_table: must be of type uint8, got float64"):
        encode_policy(replace(GOOD, k_table=np.full((65, 1), 2.5)))


def test_the_same_policy_object_until_there_is_a_newer_one(tmp_path: Path) -> None:
    with PolicyPage.create_or_open(tmp_path / "p", CAPACITY) as page, PolicyPageReader.open(tmp_path / "p") as reader:
        page.heartbeat(100 * S)
        assert reader.poll(100 * S) is None
        for version in (1, 2, 3, 9):
            page.publish(policy_of(version))
            policy = reader.poll(100 * S)
            assert policy is not None
            assert_same(policy, policy_of(version))
            page.heartbeat(101 * S)
            assert reader.poll(100 * S) is policy
        assert reader.failures == 0


@pytest.mark.parametrize(
    ("now_s", "fresh"),
    [(1000, True), (1010, True), (1010.001, False), (5000, False), (990, True), (989.999, False), (3, False)],
)
def test_the_heartbeat_decides_whether_a_policy_is_fresh(tmp_path: Path, now_s: float, fresh: bool) -> None:
    with PolicyPage.create_or_open(tmp_path / "p", CAPACITY) as page:
        page.publish(policy_of(1))
        page.heartbeat(1000 * S)
        with PolicyPageReader.open(tmp_path / "p", max_age_s=10.0) as reader:
            assert (reader.poll(int(now_s * S)) is not None) == fresh
            page.heartbeat(int(now_s * S))
            assert reader.poll(int(now_s * S)) is not None


def test_a_heartbeat_touches_eight_bytes(tmp_path: Path) -> None:
    with PolicyPage.create_or_open(tmp_path / "p", CAPACITY) as page:
        page.publish(policy_of(1))
        before = (tmp_path / "p").read_bytes()
        page.heartbeat(2**63 + 12345)
        after = (tmp_path / "p").read_bytes()
    assert after == before[:80] + struct.pack("<Q", 2**63 + 12345) + before[88:]


def test_publishing_refuses_old_versions_and_long_policies(tmp_path: Path) -> None:
    path = tmp_path / "p"
    with PolicyPage.create_or_open(path, len(encode_policy(GOOD))) as page, PolicyPageReader.open(path) as reader:
        page.publish(GOOD)
        for version in (5, 4):
            with pytest.raises(ValueError, match=f"policy version: must be above the published 5, got {version}"):
                page.publish(policy_of(version))
        with pytest.raises(ValueError, match=r"policy 6: must be at most \d+ bytes, got \d+"):
            page.publish(policy_of(6, trials=(Trial(1, 1, 1, 1),) * 5))
        assert page.last_version == 5
        policy = reader.poll(0)
        assert policy is not None
        assert policy.version == 5
        page.publish(policy_of(6))


def test_the_next_sidecar_continues_the_page(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "p"
    with PolicyPage.create_or_open(path, CAPACITY) as page:
        assert page.last_version == 0
        page.heartbeat(7)
    with PolicyPage.create_or_open(path, CAPACITY) as page:
        assert (page.last_version, page.policy) == (0, None)
        page.publish(policy_of(41))
    reader = PolicyPageReader.open(path)
    with PolicyPage.create_or_open(path, CAPACITY // 2) as page:
        assert page.last_version == 41
        assert page.policy is not None
        assert_same(page.policy, policy_of(41))
        page.publish(policy_of(42))
    policy = reader.poll(7)
    assert policy is not None
    assert policy.version == 42


def test_a_page_that_is_too_small_is_replaced_and_keeps_its_policy(tmp_path: Path) -> None:
    path = tmp_path / "p"
    with PolicyPage.create_or_open(path, CAPACITY) as page:
        page.publish(policy_of(8))
        page.heartbeat(9 * S)
    with PolicyPageReader.open(path) as old, PolicyPage.create_or_open(path, 4 * CAPACITY) as page:
        assert page.last_version == 8
        assert page.capacity >= 4 * CAPACITY
        with PolicyPageReader.open(path) as new:
            assert new.identity != old.identity
            policy = new.poll(9 * S)
            assert policy is not None
            assert_same(policy, policy_of(8))
            page.publish(policy_of(9))
            policy = new.poll(9 * S)
            assert policy is not None
            assert policy.version == 9
    assert [entry.name for entry in tmp_path.iterdir()] == ["p"]


def test_two_sidecars_cannot_write_one_page(tmp_path: Path) -> None:
    with PolicyPage.create_or_open(tmp_path / "p", CAPACITY):
        for capacity in (CAPACITY, 2 * CAPACITY):
            with pytest.raises(BlockingIOError, match="another sidecar"):
                PolicyPage.create_or_open(tmp_path / "p", capacity)
    PolicyPage.create_or_open(tmp_path / "p", CAPACITY).close()


def test_files_are_private(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        PolicyPage.create_or_open(tmp_path / "run" / "p", CAPACITY).close()
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "run" / "p").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o700
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["p"]


def resealed(data: bytes, at: int, form: str, value: int) -> bytes:
    changed = bytearray(data)
    struct.pack_into(form, changed, at, value)
    magic, version, _, capacity = struct.unpack_from("<8sIIQ", changed)
    struct.pack_into("<I", changed, 12, zlib.crc32(struct.pack("<8sIQ", magic, version, capacity)))
    return bytes(changed)


@pytest.mark.parametrize(
    ("field", "spoil"),
    [
        ("magic", lambda data: bytes(len(data))),
        ("file", lambda data: b""),
        ("size", lambda data: data[:4000]),
        ("size", lambda data: data[:-1]),
        ("magic", lambda data: b"ADSPRING" + data[8:]),
        ("layout version", lambda data: resealed(data, 8, "<I", 1)),
        ("header checksum", lambda data: data[:17] + b"\x13" + data[18:]),
        ("capacity", lambda data: resealed(data, 16, "<Q", 2**40)),
        ("size", lambda data: resealed(data, 16, "<Q", 4096)),
    ],
)
def test_a_foreign_page_is_refused_by_the_engine_and_renamed_by_the_sidecar(
    tmp_path: Path, field: str, spoil: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "p"
    PolicyPage.create_or_open(path, CAPACITY).close()
    foreign = spoil(path.read_bytes())
    path.write_bytes(foreign)
    with pytest.raises(PolicyPageError) as caught:
        PolicyPageReader.open(path)
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{path}: {field}: must be ")
    with PolicyPage.create_or_open(path, CAPACITY) as page:
        assert page.last_version == 0
    kind = "foreign" if field in ("magic", "layout version") and any(foreign) else "damaged"
    assert (tmp_path / f"p.{kind}-1").read_bytes() == foreign
    assert f"policy page {path} cannot be used: " in caplog.text
    PolicyPageReader.open(path).close()


def _link(path: Path) -> None:
    path.with_name("elsewhere").write_text("not ours")
    path.symlink_to(path.with_name("elsewhere"))


@pytest.mark.parametrize("make", [_link, os.mkfifo, Path.mkdir])
def test_what_is_no_file_is_set_aside(tmp_path: Path, make: Callable[[Path], object], caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "p"
    make(path)
    with PolicyPage.create_or_open(path, CAPACITY) as page:
        page.publish(policy_of(3))
    assert os.path.lexists(tmp_path / "p.damaged-1")
    assert "cannot be used" in caplog.text
    PolicyPageReader.open(path).close()


def test_a_folder_in_place_of_a_page_in_use_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "p"
    with PolicyPage.create_or_open(path, CAPACITY) as page:
        page.publish(policy_of(3))
        path.unlink()
        path.mkdir()
        assert not page.in_place()
        page.renew()
        assert page.in_place()
    assert (tmp_path / "p.damaged-1").is_dir()


def test_a_page_with_a_damaged_policy_is_renamed(tmp_path: Path) -> None:
    path = tmp_path / "p"
    for number in (1, 2):
        with PolicyPage.create_or_open(path, CAPACITY) as page:
            page.publish(policy_of(3))
        data = bytearray(path.read_bytes())
        data[4096 + page.capacity + 100] ^= 1
        path.write_bytes(data)
        with PolicyPage.create_or_open(path, CAPACITY) as page:
            assert page.last_version == 0
        assert (tmp_path / f"p.damaged-{number}").read_bytes() == bytes(data)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(
        st.tuples(st.one_of(st.integers(0, 255), st.integers(4096, 4096 + 2 * CAPACITY - 1)), st.integers(1, 255)),
        min_size=1,
        max_size=6,
    ),
    st.booleans(),
)
def test_flipped_bytes_never_raise_and_never_make_a_policy(flips: list[tuple[int, int]], read_before: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "p"
        with PolicyPage.create_or_open(path, CAPACITY) as page, PolicyPageReader.open(path) as reader:
            page.publish(policy_of(1))
            page.publish(policy_of(2))
            if read_before:
                assert reader.poll(0) is not None
            with path.open("r+b") as file:
                for at, mask in flips:
                    file.seek(at)
                    byte = file.read(1)[0]
                    file.seek(at)
                    file.write(bytes([byte ^ mask]))
            readers = [reader]
            with contextlib.suppress(PolicyPageError):
                readers.append(PolicyPageReader.open(path))
            for each in readers:
                for now in (0, 2**64):
                    policy = each.poll(now)
                    assert policy is None or (policy.version in (1, 2) and whole(policy))
            if read_before:
                assert reader.policy is not None
                assert reader.policy.version == 2


def test_an_older_sequence_is_not_adopted(tmp_path: Path) -> None:
    path = tmp_path / "p"
    with PolicyPage.create_or_open(path, CAPACITY) as page, PolicyPageReader.open(path) as reader:
        page.publish(policy_of(1))
        page.publish(policy_of(2))
        reader.poll(0)
        with path.open("r+b") as file:  # the sequence goes back to a whole, older policy
            file.seek(64)
            file.write(struct.pack("<Q", 1))
        policy = reader.poll(0)
        assert policy is not None
        assert (policy.version, reader.failures) == (2, 1)


def test_a_reader_overtaken_while_it_copies_takes_the_newest_next_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p"
    read = policy_page._read_policy
    with PolicyPage.create_or_open(path, CAPACITY) as page, PolicyPageReader.open(path) as reader:
        page.publish(policy_of(1))
        assert reader.poll(0) is not None
        page.publish(policy_of(2))

        def overtaken(descriptor: int, capacity: int, sequence: int) -> Policy:
            if sequence == 2:
                page.publish(policy_of(3))
                page.publish(policy_of(4))
            return read(descriptor, capacity, sequence)

        monkeypatch.setattr(policy_page, "_read_policy", overtaken)
        seen = [reader.poll(0), reader.poll(0)]
        assert [policy.version for policy in seen if policy is not None] == [1, 4]
        assert reader.failures == 0


CHILD = f"""
import sys, time
sys.path.insert(0, {ROOT!r})
from adaptive_spec.wire.policy_page import PolicyPage, payload_bytes
from tests.support.wire import policy_of
page = PolicyPage.create_or_open(sys.argv[1], payload_bytes(64, 7))
version = page.last_version
print("ready", version, flush=True)
while True:
    version += 1
    page.publish(policy_of(version, version % 8))
    page.heartbeat(version)
"""


def test_a_sidecar_killed_at_full_speed_leaves_a_valid_page(tmp_path: Path) -> None:
    path, version, seen = tmp_path / "p", 0, 0
    PolicyPage.create_or_open(path, CAPACITY).close()
    reader = PolicyPageReader.open(path, max_age_s=1e9)
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", CHILD, str(path)], stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                word, last = process.stdout.readline().split()
                assert word == "ready"
                assert int(last) >= version
                deadline, wanted = time.monotonic() + DEADLINE_S, seen + 100
                while seen < wanted and time.monotonic() < deadline:
                    policy = reader.poll(0)
                    if policy is not None and policy.version != version:
                        assert policy.version > version
                        assert whole(policy)
                        version, seen = policy.version, seen + 1
                assert seen >= wanted
            finally:
                process.kill()
        assert process.returncode == -signal.SIGKILL
        assert reader.failures == 0
    with PolicyPage.create_or_open(path, CAPACITY) as page:  # the dead sidecar's lock is gone
        assert page.last_version >= version
        page.publish(policy_of(page.last_version + 1))
        last_policy = reader.poll(0)
        assert last_policy is not None
        assert last_policy.version == page.last_version


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_page_in_use_is_noticed_and_made_again(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    """A truncated file that is mapped would end this process with SIGBUS."""
    path = tmp_path / "p"
    with PolicyPage.create_or_open(path, CAPACITY) as page:
        page.publish(policy_of(1))
        page.publish(policy_of(2))
        page.heartbeat(5 * S)
        with PolicyPageReader.open(path) as reader:
            assert reader.poll(5 * S) is not None
            assert page.in_place()
            damage(path)
            assert not page.in_place()
            for version in (3, 4):
                policy = reader.poll(5 * S)
                assert policy is None or policy.version <= version
                with contextlib.suppress(OSError):
                    page.publish(policy_of(version))
                    page.heartbeat(5 * S)
            policy = reader.poll(5 * S)
            assert policy is None or whole(policy)
        assert not page.in_place()
        page.renew()
        assert page.in_place()
        with PolicyPageReader.open(path) as reader:
            policy = reader.poll(5 * S)
            assert policy is not None
            assert policy.version == page.last_version
            page.publish(policy_of(9))
            page.heartbeat(6 * S)
            policy = reader.poll(6 * S)
            assert policy is not None
            assert policy.version == 9
            assert page.in_place()
        with pytest.raises(BlockingIOError, match="another sidecar"):
            PolicyPage.create_or_open(path, CAPACITY)


def test_a_page_whose_folder_was_deleted_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "run" / "p"
    with PolicyPage.create_or_open(path, CAPACITY) as page:
        page.publish(policy_of(1))
        path.unlink()
        path.parent.rmdir()
        assert not page.in_place()
        page.renew()
        assert page.in_place()
        assert path.parent.stat().st_mode & 0o777 == 0o700


def test_a_page_is_for_one_engine(tmp_path: Path) -> None:
    path = tmp_path / "p"
    with PolicyPage.create_or_open(path, CAPACITY, engine=7) as page:
        page.publish(policy_of(5))
        with pytest.raises(
            PolicyPageError, match="engine: must be 0x0000000000000008, which is this engine's, got 0x0000000000000007"
        ):
            PolicyPageReader.open(path, engine=8)
        for engine in (7, None):
            with PolicyPageReader.open(path, engine=engine) as reader:
                assert reader.poll(0) is not None
    with PolicyPage.create_or_open(path, CAPACITY, engine=7) as page:
        assert page.last_version == 5
    with PolicyPage.create_or_open(path, CAPACITY, engine=8) as page:
        assert (page.policy, page.last_version) == (None, 5)
        with PolicyPageReader.open(path, engine=8) as reader:
            assert reader.poll(0) is None
            page.publish(policy_of(6))
            policy = reader.poll(0)
            assert policy is not None
            assert policy.version == 6
    data = bytearray(path.read_bytes())
    data[24] ^= 1
    path.write_bytes(data)
    with pytest.raises(PolicyPageError, match="engine"):
        PolicyPageReader.open(path, engine=9)


RACE = f"""
import sys
sys.path.insert(0, {ROOT!r})
from adaptive_spec.wire.policy_page import PolicyPage
for line in sys.stdin:
    try:
        page = PolicyPage.create_or_open(line.strip(), 4096)
    except BlockingIOError:
        page = None
    print(int(page is not None), flush=True)
    sys.stdin.readline()
    if page is not None:
        page.close()
    print("closed", flush=True)
"""


def test_a_page_that_is_made_by_several_at_once_has_one_owner(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", RACE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    try:
        for number in range(60):
            path = tmp_path / f"{number // 2}"  # the second time it exists
            if number % 2 and number % 3 == 0:
                path.write_bytes(b"damaged")
                path.chmod(0o600)
            for process in processes:
                assert process.stdin is not None
                process.stdin.write(f"{path}\n")
                process.stdin.flush()
            owners = sum(int(process.stdout.readline()) for process in processes if process.stdout is not None)
            assert owners == 1, number
            for process in processes:
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write("go on\n")
                process.stdin.flush()
                process.stdout.readline()
    finally:
        for process in processes:
            process.kill()
            process.communicate()
