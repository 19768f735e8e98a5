"""The ring: in one process where the moment matters, in two at full speed."""

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
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.domain.policy import Granularity
from adaptive_spec.domain.step_record import StepRecord
from adaptive_spec.wire.ring import HEADER_BYTES, RingLayoutError, RingReader, RingWriter
from adaptive_spec.wire.slot import LAYOUT_VERSION
from tests.support.wire import engine, record_of, same

ROOT = str(Path(__file__).parents[2])
DEADLINE_S = 60.0


def accounted(reader: RingReader) -> int:
    return reader.delivered + reader.lost + reader.torn + reader.invalid


# The child processes: `write` fills a ring at full speed, `read` reports once it has read something.
CHILD = f"""
import sys
sys.path.insert(0, {ROOT!r})
from tests.support.wire import engine, record_of
from adaptive_spec.wire import ring
path, what, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
if what == "read":
    reader = ring.RingReader.open(path)
    read = 0
    while True:
        read += len(reader.poll(8))
        if read >= count:
            print("ready", flush=True)
            count = 1 << 62
writer = ring.RingWriter.create(path, engine(), int(sys.argv[4]))
records = [record_of(i) for i in range(min(count, 4096))]
if what == "die":
    import os, signal
    for record in records[:-1]:
        writer.write(record)
    def fence():  # between the record and the cursor
        os.kill(os.getpid(), signal.SIGKILL)
    ring.WEAKLY_ORDERED, ring.fence = True, fence
    writer.write(records[-1])
print("ready", flush=True)
for i in range(count):
    writer.write(records[i] if i < 4096 else record_of(i))
print(writer.written, writer.failed, flush=True)
"""


@contextlib.contextmanager
def child(path: Path, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", CHILD, str(path), *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"


def test_every_record_of_a_writer_at_full_speed_is_accounted_for(tmp_path: Path) -> None:
    path, count = tmp_path / "records.ring", 30_000
    with child(path, "write", count, 16) as process:
        wait_ready(process)
        with RingReader.open(path) as reader:  # attaches late: the writer is running
            seen: list[StepRecord] = []
            deadline = time.monotonic() + DEADLINE_S
            while reader.position < count and time.monotonic() < deadline:
                seen += reader.poll(64)
            assert process.stdout is not None
            assert process.stdout.readline() == f"{count} 0\n"
            seen += reader.poll()
            assert reader.position == reader.cursor == count
            assert count - reader.start == accounted(reader)
            assert (len(seen), reader.invalid) == (reader.delivered, 0)
            assert reader.delivered > 0
    steps = [record.step for record in seen]
    assert steps == sorted(set(steps))
    assert all(same(record, record_of(record.step)) for record in seen)


def test_a_killed_reader_does_not_affect_the_writer(tmp_path: Path) -> None:
    path = tmp_path / "records.ring"
    writer = RingWriter.create(path, engine(), 32)
    for i in range(20):
        writer.write(record_of(i))
    with child(path, "read", 20) as process:
        wait_ready(process)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert path.exists()
    for i in range(20, 60):
        writer.write(record_of(i))
    with RingReader.open(path) as reader:
        assert [record.step for record in reader.poll()] == list(range(28, 60))
    assert writer.failed == 0


def test_a_writer_killed_at_any_moment_leaves_only_complete_records(tmp_path: Path) -> None:
    for delay_s in (0.0, 0.003, 0.011):
        path = tmp_path / f"{delay_s}.ring"
        with child(path, "write", 10**9, 16) as process:
            wait_ready(process)
            time.sleep(delay_s)
            process.kill()
            process.wait()
        with RingReader.open(path) as reader:
            seen = reader.poll()
            assert all(same(record, record_of(record.step)) for record in seen)
            assert accounted(reader) == reader.cursor - reader.start
            assert reader.torn == reader.lost == reader.invalid == 0


def test_a_record_half_written_when_the_writer_was_killed_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "records.ring"
    with child(path, "die", 12, 8) as process:
        assert process.wait(DEADLINE_S) == -signal.SIGKILL
    with RingReader.open(path) as reader:
        # Record 11 was never announced. It lies in the slot that is one more than the records that can be read.
        assert [record.step for record in reader.poll()] == list(range(3, 11))
        assert (reader.cursor, reader.start, reader.torn, reader.lost) == (11, 3, 0, 0)


@pytest.mark.parametrize(("overtaken_by", "torn"), [(0, 0), (1, 1), (3, 3), (4, 4), (5, 4), (9, 4)])
def test_slots_overwritten_while_they_are_copied_are_torn(tmp_path: Path, overtaken_by: int, torn: int) -> None:
    writer = RingWriter.create(tmp_path / "r", engine(), 4)
    for i in range(4):
        writer.write(record_of(i))

    class Overtaken(RingReader):
        """The writer laps the reader between its look at the cursor and its copy."""

        def _copy(self, offset: int, length: int) -> memoryview:
            if self.position == 0 and writer.written == 4:
                for i in range(4, 4 + overtaken_by):
                    writer.write(record_of(i))
            return super()._copy(offset, length)

    with Overtaken.open(tmp_path / "r") as reader:
        seen = reader.poll() + reader.poll()
        assert [record.step for record in seen][-1] == 3 + overtaken_by
        assert all(same(record, record_of(record.step)) for record in seen)
        assert reader.torn == torn
        assert accounted(reader) == reader.cursor == 4 + overtaken_by


def test_older_records_are_lost_and_a_failed_write_costs_none(tmp_path: Path) -> None:
    writer = RingWriter.create(tmp_path / "r", engine(), 4)
    with RingReader.open(tmp_path / "r") as reader:
        for i in range(11):
            writer.write(record_of(i))
        writer.write_fields(11, 0, 0, 0, 64, 64, 64, 7, 0, 0, 1, 0, 1, *[np.zeros(1, np.uint8)] * 4)  # type: ignore[arg-type]  # on purpose
        assert writer.failed == 1
        assert [record.step for record in reader.poll()] == [7, 8, 9, 10]
        assert (reader.lost, reader.torn) == (7, 0)
        writer.write(record_of(11))
        assert [record.step for record in reader.poll()] == [11]
        assert accounted(reader) == 12


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5), st.integers(0, 4)), max_size=40), st.integers(2, 6))
def test_in_any_order_of_writes_and_polls_each_record_is_counted_once(turns: list[tuple[int, int, int]], slots: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        writer = RingWriter.create(Path(folder) / "r", engine(5, (0, 4)), slots)
        written: list[StepRecord] = []
        seen: list[StepRecord] = []
        with RingReader.open(Path(folder) / "r") as reader:
            for writes, rows, k in turns:
                for _ in range(writes):
                    written.append(record_of(len(written), rows, k))
                    writer.write(written[-1])
                seen += reader.poll(k + 1)
            seen += reader.poll(10**6)
            assert writer.failed == reader.torn == reader.invalid == 0
            assert accounted(reader) == reader.position == len(written)
        assert len({record.step for record in seen}) == len(seen)
        assert all(same(record, written[record.step]) for record in seen)


def test_records_outlive_the_ring_and_later_writes(tmp_path: Path) -> None:
    writer = RingWriter.create(tmp_path / "r", engine(), 2)
    writer.write(record_of(5))
    with RingReader.open(tmp_path / "r") as reader:
        (record,) = reader.poll()
    for i in range(6, 10):
        writer.write(record_of(i))
    writer.close()
    assert same(record, record_of(5))


def test_a_batch_beyond_the_layout_is_cut(tmp_path: Path) -> None:
    writer = RingWriter.create(tmp_path / "r", engine(8), 4, max_k=3)
    whole = record_of(6, rows=12, k=7)
    confidences = np.linspace(0.1, 0.9, 84, dtype=np.float32).reshape(12, 7)
    writer.write(replace(whole, confidences=confidences))
    with RingReader.open(tmp_path / "r") as reader:
        (record,) = reader.poll()
    assert (record.batch_size, record.k, record.num_tokens) == (12, 3, whole.num_tokens)
    np.testing.assert_array_equal(record.confidences, confidences[:8, :3])
    assert record.verify_len.tolist() == record.accept_len.tolist() == [3] * 8
    assert record.request_ids.tolist() == [6] * 8


@pytest.mark.parametrize(
    "change",
    [
        {"confidences": np.ones((64, 7))},
        {"confidences": np.ones((7, 64), np.float32).T},
        {"confidences": None},
        {"verify_len": None},
        {"accept_len": np.ones(63, np.uint8)},
        {"request_ids": np.ones(64, np.int64)},
        {"step": -1},
        {"k": 6},
        {"num_tokens": "many"},
        {"step_s": 1e300},
    ],
)
def test_a_failed_write_is_counted_and_the_next_one_is_complete(tmp_path: Path, change: dict[str, object]) -> None:
    writer = RingWriter.create(tmp_path / "r", engine(), 4)
    good = record_of(0)
    writer.write(replace(good, **change))  # type: ignore[arg-type]  # wrong on purpose
    assert (writer.written, writer.failed) == (0, 1)
    writer.write(good)
    with RingReader.open(tmp_path / "r") as reader:
        assert [same(record, good) for record in reader.poll()] == [True]


def test_a_closed_writer_only_counts(tmp_path: Path) -> None:
    writer = RingWriter.create(tmp_path / "r", engine(), 4)
    writer.close()
    writer.write(record_of(0))
    assert writer.failed == 1


def test_records_with_impossible_values_are_dropped_and_counted(tmp_path: Path) -> None:
    writer = RingWriter.create(tmp_path / "r", engine(), 8)
    good = record_of(1)
    for record in (
        replace(good, verify_s=0.0),
        replace(good, padded_tokens=1),
        replace(good, confidences=np.full((64, 7), -0.5, np.float32)),
        good,
    ):
        writer.write(record)
    with RingReader.open(tmp_path / "r") as reader:
        assert len(reader.poll()) == 1
        assert (reader.invalid, reader.reasons) == (3, {"times": 1, "counts": 1, "confidences": 1})
        assert accounted(reader) == 4


def test_a_reader_starts_at_the_given_position(tmp_path: Path) -> None:
    path = tmp_path / "r"
    writer = RingWriter.create(path, engine(), 8)
    for i in range(20):
        writer.write(record_of(i))
    oldest, newest = RingReader.open(path), RingReader.open(path, "newest")
    again, behind, ahead = (RingReader.open(path, position) for position in (15, 3, 10**6))
    writer.write(record_of(20))
    assert [record.step for record in oldest.poll(3)] == [13, 14, 15]
    assert oldest.lost == 1  # record 12 was there when it attached
    assert [record.step for record in newest.poll()] == [20]
    assert [record.step for record in again.poll()] == list(range(15, 21))
    assert [record.step for record in behind.poll()] == list(range(13, 21))
    assert behind.lost == 10
    assert [record.step for record in ahead.poll()] == [20]


def test_a_restarted_engine_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "r"
    RingWriter.create(path, engine(), 4).write(record_of(1))
    with RingReader.open(path) as reader:
        assert not reader.replaced()
        RingWriter.create(path, engine(16), 4)
        assert reader.replaced()
        assert [record.step for record in reader.poll()] == [1]  # what the old engine said last is still there
        with RingReader.open(path) as new:
            assert (new.info.max_batch, new.cursor) == (16, 0)
            assert new.generation != reader.generation
        path.unlink()
        assert not reader.replaced()


def test_the_reader_gets_the_engine_information(tmp_path: Path) -> None:
    info = engine(17, (0, 2, 5))
    RingWriter.create(tmp_path / "r", info, 4)
    with RingReader.open(tmp_path / "r") as reader:
        assert reader.info == info
        assert (reader.layout.max_batch, reader.layout.max_k, reader.slots) == (17, 5, 4)


def test_the_file_is_private_complete_and_the_only_one(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        RingWriter.create(tmp_path / "records.ring", engine(), 4)
    finally:
        os.umask(old)
    assert [path.name for path in tmp_path.iterdir()] == ["records.ring"]
    assert stat.S_IMODE((tmp_path / "records.ring").stat().st_mode) == 0o600


def test_a_failed_creation_leaves_the_old_ring(tmp_path: Path) -> None:
    path = tmp_path / "r"
    RingWriter.create(path, engine(), 4).write(record_of(3))
    huge = EngineInfo("x" * 5000, "m", "cpu", 1, 0, (0,), 1, Granularity.BATCH, False, 1)
    for info, slots in ((engine(), 1), (engine(), 1 << 21), (huge, 4)):
        with pytest.raises(ValueError, match=r"slots|engine information"):
            RingWriter.create(path, info, slots)
    with pytest.raises(FileNotFoundError):
        RingWriter.create(tmp_path / "no" / "r", engine(), 4)
    assert [entry.name for entry in tmp_path.iterdir()] == ["r"]
    with RingReader.open(path) as reader:
        assert len(reader.poll()) == 1


def resealed(data: bytes, at: int, form: str, value: int) -> bytes:
    """The header with one field changed and its checksum made right again."""
    changed = bytearray(data)
    struct.pack_into(form, changed, at, value)
    info_bytes = struct.unpack_from("<I", changed, 40)[0]
    checksum = zlib.crc32(changed[128 : 128 + info_bytes], zlib.crc32(changed[16:64], zlib.crc32(changed[:12])))
    struct.pack_into("<I", changed, 12, checksum)
    return bytes(changed)


@pytest.mark.parametrize(
    ("field", "spoil"),
    [
        ("file", lambda data: b""),
        ("size", lambda data: data[:100]),
        ("size", lambda data: data[:-8]),
        ("size", lambda data: data + bytes(8)),
        ("magic", lambda data: b"\x7fELF" + data[4:]),
        ("layout version", lambda data: resealed(data, 8, "<I", LAYOUT_VERSION + 1)),
        ("header checksum", lambda data: data[:26] + b"\x07" + data[27:]),
        ("header checksum", lambda data: data[:130] + b"!" + data[131:]),
        ("engine information", lambda data: data[:40] + b"\xff\xff\xff\xff" + data[44:]),
        ("header", lambda data: resealed(data, 130, "<B", 0)),
        ("header", lambda data: resealed(data, 36, "<I", 33)),
        ("slot_bytes", lambda data: resealed(data, 28, "<I", 64)),
        ("slots", lambda data: resealed(data, 24, "<I", 0)),
    ],
)
def test_a_file_that_is_not_a_ring_is_refused_in_one_line(tmp_path: Path, field: str, spoil: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "records.ring"
    RingWriter.create(path, engine(), 4)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(RingLayoutError) as caught:
        RingReader.open(path)
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{path}: {field}: must be ")
    assert ", got " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_in_place_of_a_ring_is_set_aside_by_its_engine(tmp_path: Path) -> None:
    (tmp_path / "ring").mkdir()
    RingWriter.create(tmp_path / "ring", engine()).close()
    RingReader.open(tmp_path / "ring").close()
    assert (tmp_path / "ring.damaged-1").is_dir()


def test_a_pipe_or_a_folder_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RingLayoutError, match="not a regular file"):
        RingReader.open(tmp_path / "pipe")
    with pytest.raises(RingLayoutError, match="not a regular file"):
        RingReader.open(tmp_path)
    with pytest.raises(FileNotFoundError):
        RingReader.open(tmp_path / "none")


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, HEADER_BYTES + 4 * 400), st.integers(1, 255)), min_size=1, max_size=6))
def test_flipped_bytes_never_raise_in_a_poll(flips: list[tuple[int, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "r"
        writer = RingWriter.create(path, engine(4, (0, 3)), 4)
        with RingReader.open(path) as reader:
            for i in range(3):
                writer.write(record_of(i, 4, 3))
            with path.open("r+b") as file:
                for at, mask in flips:
                    at %= path.stat().st_size
                    file.seek(at)
                    byte = file.read(1)[0]
                    file.seek(at)
                    file.write(bytes([byte ^ mask]))
            assert all(record.invalid_reason() is None for record in reader.poll())
        with contextlib.suppress(RingLayoutError), RingReader.open(path) as late:
            late.poll()


def _truncate(path: Path) -> None:
    os.truncate(path, 0)


def _copy_over(path: Path) -> None:
    """What `cp FILE records.ring` does: the same inode, another content and size."""
    with path.open("r+b") as file:
        file.truncate(0)
        file.write(b"something else\n" * 100)


def _zero(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))


def _replace(path: Path) -> None:
    path.rename(path.with_name("moved"))
    path.write_bytes(b"x" * 10_000)


def _link(path: Path) -> None:
    path.rename(path.with_name("moved"))
    path.symlink_to(path.with_name("moved"))


def _unreadable(path: Path) -> None:
    path.chmod(0)


DAMAGE: list[Callable[[Path], None]] = [_truncate, _copy_over, _zero, _replace, _link, _unreadable, Path.unlink]


@pytest.mark.parametrize("damage", DAMAGE)
def test_no_damage_to_a_ring_in_use_ends_a_process_or_passes_for_a_record(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:  # fmt: skip
    """A truncated file that is mapped would end this process with SIGBUS."""
    path = tmp_path / "r"
    writer = RingWriter.create(path, engine(), 8)
    with RingReader.open(path) as reader:
        for i in range(5):
            writer.write(record_of(i))
        assert [record.step for record in reader.poll(3)] == [0, 1, 2]
        assert writer.in_place()
        damage(path)
        assert not writer.in_place()
        for i in range(5, 30):
            writer.write(record_of(i))
            assert all(same(record, record_of(record.step)) for record in reader.poll())
        assert not writer.in_place()
        assert writer.written + writer.failed == 30


def test_a_ring_that_is_filled_and_wrapped_is_in_place(tmp_path: Path) -> None:
    writer = RingWriter.create(tmp_path / "r", engine(), 3)
    for i in range(10):
        assert writer.in_place()
        writer.write(record_of(i))
    writer.close()
    assert not writer.in_place()


def test_a_cursor_read_in_pieces_is_not_believed(tmp_path: Path) -> None:
    writer = RingWriter.create(tmp_path / "r", engine(), 4)
    with RingReader.open(tmp_path / "r") as reader:
        writer.write(record_of(0))
        with (tmp_path / "r").open("r+b") as file:
            file.seek(64)
            file.write(struct.pack("<Q", 257))  # and its inversion says 1
        assert reader.poll() == []
        assert (reader.cursor, reader.lost) == (0, 0)
        writer.write(record_of(1))
        assert [record.step for record in reader.poll()] == [0, 1]
