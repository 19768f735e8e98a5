from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from adaptive_spec.storage.archive import ArchiveError, load_archive, save_archive, write_atomically

ARRAYS: dict[str, NDArray[Any]] = {
    "file": np.arange(6.0).reshape(2, 3),  # also a parameter's name of np.savez
    "cells.rows": np.zeros((0, 8)),
    "words": np.array(["a", "bc"]),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "x.npz"
    save_archive(path, "test", ARRAYS, {"engine": "e"})
    return path


def test_round_trip(path: Path) -> None:
    arrays, meta = load_archive(path, "test")
    assert meta == {"engine": "e"}
    assert arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(arrays[name], array)


def test_private_and_nothing_left_beside_it(path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["x.npz"]


def test_a_write_that_fails_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("adaptive_spec.storage.archive.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == before
    assert len(list(path.parent.iterdir())) == 1


@pytest.mark.parametrize("keep", [0, 1, 40, 200, -1])
def test_truncated(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArchiveError, match=r"x\.npz"):
        load_archive(path, "test")


def test_every_flipped_byte_is_noticed_or_harmless(path: Path) -> None:
    """Some bytes of a zip file are never read (times, attributes); what is read must be what was written."""
    data = path.read_bytes()
    refused = 0
    for at in range(0, len(data), 7):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x20]) + data[at + 1 :])
        try:
            arrays, meta = load_archive(path, "test")
        except ArchiveError:
            refused += 1
        else:
            assert meta == {"engine": "e"}
            assert all(np.array_equal(arrays[name], array) for name, array in ARRAYS.items())
    assert refused > len(data) / 7 / 3


def test_array_changed_by_another_program(path: Path) -> None:
    with np.load(path) as file:
        stored = dict(file)
    stored["array/file"] = stored["array/file"] + 1
    np.savez(path, **stored)
    with pytest.raises(ArchiveError, match="checksum"):
        load_archive(path, "test")


def test_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "y.npz"
    np.savez(path, a=np.zeros(2))
    with pytest.raises(ArchiveError, match="not written by adaptive-spec"):
        load_archive(path, "test")
    np.save(tmp_path / "z.npy", np.zeros(2))
    with pytest.raises(ArchiveError, match="not a zip file"):
        load_archive(tmp_path / "z.npy", "test")
    with pytest.raises(ArchiveError, match="Is a directory"):
        load_archive(tmp_path, "test")
    with pytest.raises(FileNotFoundError):
        load_archive(tmp_path / "none.npz", "test")


def test_never_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (pytest.fail, ("unpickled",))

    path = tmp_path / "bomb.npz"
    header = np.frombuffer(json.dumps({"format": "adaptive-spec"}).encode(), np.uint8)
    np.savez(path, header=header, bomb=np.array([Bomb()], dtype=object))
    with pytest.raises(ArchiveError, match="damaged"):
        load_archive(path, "test")
    with pytest.raises(TypeError, match="objects"):
        save_archive(path, "test", {"bomb": np.array([Bomb()], dtype=object)})


def test_another_kind_or_version(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArchiveError, match="kind must be 'other', got 'test'"):
        load_archive(path, "other")
    monkeypatch.setattr("adaptive_spec.storage.archive.FORMAT_VERSION", 2)
    with pytest.raises(ArchiveError, match="format version must be 2, got 1"):
        load_archive(path, "test")
