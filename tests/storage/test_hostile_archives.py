"""Archives that were made to do harm: each costs itself alone, little memory and little time."""

from __future__ import annotations

import io
import json
import os
import resource
import struct
import subprocess
import sys
import uuid
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptive_spec.errors import BadInput
from adaptive_spec.regular_file import read_regular_file
from adaptive_spec.storage import npz, profile_store
from adaptive_spec.storage.archive import LARGEST_INFLATED, ArchiveError, archive_bytes, load_archive, parse_archive
from adaptive_spec.storage.npz import MOST_ENTRIES, read_npz
from adaptive_spec.storage.profile import ProfileError, load_profile, save_profile
from adaptive_spec.storage.profile_store import KIND, ProfileStore
from adaptive_spec.storage.signature import check_signature, read_key, signed
from tests.support.store_writer import accept_any, number_of, numbered
from tests.support.wire import engine

INFO = engine()
NOW_S = 1_700_000_000.0
GOOD = archive_bytes(KIND, {"latency_model.a": np.arange(100.0)}, {"engine": "embedded m cpu tp1"})
KEY = b"k" * 32


def _npy(header: dict[str, Any], data: bytes = b"") -> bytes:
    text = repr(header).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def _zip(entries: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, data in entries.items():
            file.writestr(name, data)
    return buffer.getvalue()


def _bomb() -> bytes:
    """About 300 KB that inflate to 300 MB."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file, file.open("array/a.npy", "w", force_zip64=True) as entry:
        entry.write(_npy({"descr": "|u1", "fortran_order": False, "shape": (300 << 20,)}))
        piece = bytes(1 << 20)
        for _ in range(300):
            entry.write(piece)
    return buffer.getvalue()


def _lying_bomb(stated: int) -> bytes:
    """Inflates to 100 MB; the directory states fewer bytes."""
    data = bytearray(
        _zip({"header.npy": _npy({"descr": "|u1", "fortran_order": False, "shape": (100 << 20,)}, bytes(100 << 20))})
    )
    place = data.rfind(b"PK\x01\x02")
    data[place + 24 : place + 28] = struct.pack("<I", stated)
    return bytes(data)


def _header(header: dict[str, Any]) -> bytes:
    return _zip({"header.npy": _npy({"descr": "|u1", "fortran_order": False, "shape": (3,), **header}, b"{}\n")})


HOSTILE: dict[str, Callable[[], bytes]] = {
    "a lying directory": lambda: _lying_bomb(1000),
    "too large": lambda: _zip({"a.npy": bytes(LARGEST_INFLATED + 1)}),
    "a huge shape": lambda: _header({"shape": (10**12,)}),
    "a shape beyond 64 bits": lambda: _header({"shape": (10**30, 10**30)}),
    "a negative shape": lambda: _header({"shape": (-3,)}),
    "an empty array with a huge row": lambda: _zip(
        {"header.npy": _npy({"descr": "<f8", "fortran_order": False, "shape": (0, 10**15)})}
    ),
    "a dtype without bytes": lambda: _zip({"header.npy": _npy({"descr": "|S0", "fortran_order": False, "shape": (10**15,)})}),
    "a dtype that is an array": lambda: _header({"descr": ("<f8", (10**9,))}),
    "Python objects": lambda: _header({"descr": "|O"}),
    "lzma": lambda: _zip({"header.npy": bytes(1 << 20)}, zipfile.ZIP_LZMA),
    "bzip2": lambda: _zip({"header.npy": bytes(1 << 20)}, zipfile.ZIP_BZIP2),
    "many entries": lambda: _zip({f"a{i}.npy": b"" for i in range(MOST_ENTRIES + 1)}),
    "a huge directory": lambda: _zip({f"{i:0200d}.npy": b"" for i in range(5000)}),
    "the same entry twice": lambda: _zip({"a": b"1", "a.npy": b"2"}),
    "a deep header": lambda: _zip(
        {"header.npy": _npy({"descr": "|u1", "fortran_order": False, "shape": (200000,)}, b"[" * 200000)}
    ),
    "no meta": lambda: _zip({"header.npy": _npy({"descr": "|u1", "fortran_order": False, "shape": (2,)}, b"{}")}),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_hostile_archive_is_an_archive_error(name: str) -> None:
    with pytest.raises(ArchiveError) as error:
        parse_archive(HOSTILE[name](), KIND, "p.npz")
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 300


def test_a_zip_bomb_takes_no_memory(tmp_path: Path) -> None:
    """In a process that may not take more than 4 GB."""
    (tmp_path / "bomb.npz").write_bytes(_bomb())
    assert (tmp_path / "bomb.npz").stat().st_size < 400_000
    code = "import sys, resource; from pathlib import Path; from adaptive_spec.storage.archive import load_archive\n"
    code += "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
    code += "try: load_archive(Path(sys.argv[1]), 'profile')\n"
    code += "except ValueError as error: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error)"
    limit = (4 << 30, 4 << 30)
    result = subprocess.run([sys.executable, "-c", code, tmp_path / "bomb.npz"], capture_output=True, text=True, timeout=60,
                            check=False, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, limit))  # fmt: skip
    grown_kb, reason = result.stdout.split(" ", 1)
    assert int(grown_kb) < 50_000
    assert "must be at most 67108864 bytes when inflated, got 3145" in reason


@given(st.binary(max_size=300))
def test_arbitrary_bytes(data: bytes) -> None:
    with pytest.raises(ArchiveError):
        parse_archive(data, KIND, "p.npz")


@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=6), st.integers(0, len(GOOD)))
def test_changed_bytes(changes: list[tuple[int, int]], length: int) -> None:
    data = bytearray(GOOD)
    for place, value in changes:
        data[place] = value
    for changed in (bytes(data), bytes(data[:length])):
        try:
            archive = parse_archive(changed, KIND, "p.npz")
        except ArchiveError:
            continue
        # Some bytes of a zip file have no meaning, such as the date of an entry.
        assert np.array_equal(archive.arrays["latency_model.a"], np.arange(100.0))


def _special(path: Path, kind: str) -> None:
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to a device":
        path.symlink_to("/dev/zero")
    elif kind == "link to itself":
        path.symlink_to(path)
    else:
        good = path.with_name("elsewhere")
        good.write_bytes(GOOD)
        path.symlink_to(good)


SPECIAL = ("fifo", "folder", "link to a device", "link to itself", "link")


@pytest.mark.parametrize("kind", SPECIAL)
def test_only_regular_files_are_read(tmp_path: Path, kind: str) -> None:
    _special(tmp_path / "p.npz", kind)
    with pytest.raises(ArchiveError, match=r"^p.npz cannot be read: "):
        load_archive(tmp_path / "p.npz", KIND)


def test_a_file_that_grows_is_not_read_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * 11)
    assert read_regular_file(tmp_path / "f", 11).data == b"x" * 11
    with pytest.raises(OSError, match="longer than 10 bytes"):
        read_regular_file(tmp_path / "f", 10)
    with pytest.raises(OSError, match="not a regular file"):
        read_regular_file(Path("/dev/zero"), 10)


def test_whatever_lies_in_the_store_the_next_good_one_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = ProfileStore(f"{tmp_path}/store")
    good = Path(store.save(INFO, numbered(1), NOW_S))
    assert good.name.startswith("17")
    folder = good.parent
    for number, kind in enumerate(SPECIAL[:4]):
        _special(folder / f"{int(1e3 * NOW_S) + number + 1}-x-0.npz", kind)
    for number, name in enumerate(HOSTILE):
        (folder / f"{int(1e3 * NOW_S) + number + 10}-x-0.npz").write_bytes(HOSTILE[name]())
    assert number_of(store.load(INFO, NOW_S + 60, accept_any)) == 1
    assert caplog.text.count("cannot be used") == 4 + len(HOSTILE)


def test_an_error_of_any_kind_costs_that_profile_alone(tmp_path: Path) -> None:
    store = ProfileStore(f"{tmp_path}/store")
    store.save(INFO, numbered(1), NOW_S)
    store.save(INFO, numbered(2), NOW_S + 1)

    def usable(profile: Any) -> None:
        if profile.latency["a"][0] == 2:
            raise IndexError("what restore_profile may raise")

    assert number_of(store.load(INFO, NOW_S + 2, usable)) == 1


def test_no_more_than_allowed_is_asked_of_a_remote_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """The size is not known, or was another one when it was asked for."""
    store = ProfileStore(f"memory://{uuid.uuid4()}/store")
    store.save(INFO, numbered(1), NOW_S)
    asked: list[tuple[int, int]] = []
    files: Any = store._files
    cat = files.cat_file

    def cat_file(path: str, start: int = 0, end: int = -1) -> bytes:
        asked.append((start, end))
        return bytes(cat(path, start=start, end=end))

    monkeypatch.setattr(files, "size", lambda path: None)
    monkeypatch.setattr(files, "cat_file", cat_file)
    monkeypatch.setattr(profile_store, "LARGEST_BYTES", 100)
    assert store.load(INFO, NOW_S, accept_any) is None
    assert asked == [(0, 101)]


def test_a_policy_file_of_a_stranger(tmp_path: Path) -> None:
    save_profile(tmp_path, INFO, numbered(1), {"candidates": [0], "table": [0, 0]})
    assert load_profile(tmp_path, INFO) is not None
    for text in ("[" * 100_000, "1" * 5000, "[]", "{}", '{"sha256": 1e999}'):
        (tmp_path / "policy.json").write_text(text)
        with pytest.raises(ProfileError, match=r"policy\.json"):
            load_profile(tmp_path, INFO)
    (tmp_path / "policy.json").unlink()
    os.mkfifo(tmp_path / "policy.json")
    with pytest.raises(ProfileError, match="not a regular file"):
        load_profile(tmp_path, INFO)


# -- signatures ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"file://{tmp_path}/store" if request.param == "file" else f"memory://{uuid.uuid4()}/store"


def test_with_a_key_only_signed_profiles_are_taken(url: str, caplog: pytest.LogCaptureFixture) -> None:
    store = ProfileStore(url, KEY)
    store.save(INFO, numbered(1), NOW_S)
    ProfileStore(url, b"another key, 32 characters long!").save(INFO, numbered(2), NOW_S + 1)
    ProfileStore(url).save(INFO, numbered(3), NOW_S + 2)
    assert number_of(store.load(INFO, NOW_S + 3, accept_any)) == 1
    assert "it is not signed; profile_store_key_file is set" in caplog.text
    assert "its signature is wrong" in caplog.text
    assert KEY.decode() not in caplog.text


def test_without_a_key_signed_profiles_are_read_as_any(url: str) -> None:
    ProfileStore(url, KEY).save(INFO, numbered(1), NOW_S)
    assert number_of(ProfileStore(url).load(INFO, NOW_S, accept_any)) == 1


def test_a_signed_profile_cannot_be_dated_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = ProfileStore(f"{tmp_path}/store", KEY)
    old = Path(store.save(INFO, numbered(1), NOW_S))
    store.save(INFO, numbered(2), NOW_S + 1)
    old.rename(old.with_name(old.name.replace(f"{int(1e3 * NOW_S)}", f"{int(1e3 * NOW_S) + 2000}")))
    assert number_of(store.load(INFO, NOW_S + 3, accept_any)) == 2
    assert "its signature is wrong: it is of another key, or was changed or renamed" in caplog.text


@given(st.integers(0, len(GOOD) + 77), st.integers(1, 255))
def test_every_changed_byte_is_noticed(place: int, change: int) -> None:
    data = bytearray(signed(GOOD, "n.npz", KEY))
    assert len(data) == len(GOOD) + 76
    check_signature(bytes(data), "n.npz", KEY)
    assert parse_archive(bytes(data), KIND, "n").arrays.keys() == {"latency_model.a"}
    data[place % len(data)] ^= change
    # The length of the comment is not signed, and a zip file with another one is not read.
    if len(data) - 78 <= place % len(data) < len(data) - 76:
        with pytest.raises(ArchiveError):
            parse_archive(bytes(data), KIND, "n")
    else:
        with pytest.raises(ValueError, match="sign"):
            check_signature(bytes(data), "n.npz", KEY)


def test_key_files(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("s3cret" * 8 + "\n")
    for mode, allowed in ((0o600, True), (0o400, True), (0o440, True), (0o644, False), (0o604, False), (0o620, False)):
        path.chmod(mode)
        if allowed:
            assert read_key(path) == b"s3cret" * 8
        else:
            with pytest.raises(
                BadInput, match=r"must not be readable by others nor writable by its group, got mode 06\d\d"
            ) as error:
                read_key(path)
            assert "s3cret" not in str(error.value)
    path.chmod(0o600)
    path.write_text("s3cret")
    with pytest.raises(BadInput, match="at least 32 characters") as error:
        read_key(path)
    assert "s3cret" not in str(error.value)
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(BadInput, match="profile_store_key_file: "):
            read_key(missing)


def test_bounds_hold_for_what_is_written() -> None:
    """A profile of the largest table stays far below what is read."""
    arrays = {f"a{i}": np.arange(20_000.0) for i in range(60)}
    data = archive_bytes(KIND, arrays, {"engine": "e"})
    assert len(parse_archive(data, KIND, "p").arrays) == 60
    assert len(arrays) + 1 < npz.MOST_ENTRIES
    assert read_npz(data, LARGEST_INFLATED)["header"].dtype == np.uint8
    assert json.loads(read_npz(data, LARGEST_INFLATED)["header"].tobytes())["kind"] == KIND
