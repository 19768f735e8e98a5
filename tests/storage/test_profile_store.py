"""The profile store: what is written, which profile a reader gets, and what is refused."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.errors import BadInput
from adaptive_spec.storage import profile_store
from adaptive_spec.storage.archive import archive_bytes
from adaptive_spec.storage.profile import Profile
from adaptive_spec.storage.profile_store import KEPT, KIND, ProfileStore
from adaptive_spec.storage.profile_store_worker import StoreWorker
from tests.sidecar.test_process import RunningEngine
from tests.support.processes import SidecarProcess, assert_one_line, run_cli
from tests.support.store_writer import accept_any, number_of, numbered
from tests.support.wire import engine

INFO = engine()
NOW_S = 1_700_000_000.0


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ProfileStore:
    return ProfileStore(f"file://{tmp_path}/store" if request.param == "file" else f"memory://{uuid.uuid4()}/store/")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of this engine in a store of files."""
    return tmp_path / "store" / INFO.profile_name


@pytest.fixture
def files(tmp_path: Path) -> ProfileStore:
    return ProfileStore(f"{tmp_path}/store")


def test_the_newest_wins(store: ProfileStore) -> None:
    assert store.load(INFO, NOW_S, accept_any) is None
    for number in (1, 3, 2):
        store.save(INFO, numbered(number), NOW_S + number)
    found = store.load(INFO, NOW_S + 4, accept_any)
    assert number_of(found) == 3
    assert found is not None
    assert found.written_s == NOW_S + 3
    assert {name: array.shape for name, array in found.profile.latency.items()} == {"a": (500,), "head.b": (3, 3)}


def test_profiles_dated_ahead_do_not_remove_the_others(files: ProfileStore, folder: Path) -> None:
    """Whoever may add to the store, and not delete, could have every new profile removed by the sidecar that saved it."""
    folder.mkdir(parents=True)
    for number in range(2 * KEPT):
        (folder / f"{int(1000 * NOW_S) + 10_000 + number:013d}-stranger.npz").write_bytes(b"nonsense")
    files.save(INFO, numbered(1), NOW_S)
    assert number_of(files.load(INFO, NOW_S, accept_any)) == 1


def test_the_newest_valid_wins(files: ProfileStore, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    files.save(INFO, numbered(1), NOW_S)
    for second, data in enumerate(
        (
            b"",
            b"nonsense",
            Path(files.save(INFO, numbered(9), NOW_S - 9)).read_bytes()[:700],
            archive_bytes(KIND, {"latency_model.a": np.zeros(1)}, {"engine": "test other cpu tp1"}),
            archive_bytes(KIND, {"weights.a": np.zeros(1)}, {"engine": "embedded m cpu tp1"}),
            archive_bytes("checkpoint", {}, {"engine": "embedded m cpu tp1"}),
        ),
        start=1,
    ):
        (folder / f"{int(1e3 * NOW_S) + second}-replica-0.npz").write_bytes(data)
    assert number_of(files.load(INFO, NOW_S + 60, accept_any)) == 1
    assert caplog.text.count("cannot be used") == 6
    assert "it is of another engine: test other cpu tp1" in caplog.text


def test_a_profile_the_engine_cannot_use_is_skipped(store: ProfileStore) -> None:
    store.save(INFO, numbered(1), NOW_S)
    store.save(INFO, numbered(2), NOW_S + 1)

    def usable(profile: Profile) -> None:
        if profile.latency["a"][0] == 2:
            raise ValueError("fits no table")

    assert number_of(store.load(INFO, NOW_S + 1, usable)) == 1


def test_profiles_dated_in_the_future_are_ignored(store: ProfileStore) -> None:
    store.save(INFO, numbered(1), NOW_S)
    store.save(INFO, numbered(2), NOW_S + 3600)
    assert number_of(store.load(INFO, NOW_S, accept_any)) == 1
    assert number_of(store.load(INFO, NOW_S + 3600, accept_any)) == 2


def test_a_profile_that_is_too_large_is_not_read(files: ProfileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    files.save(INFO, numbered(1), NOW_S)
    monkeypatch.setattr(profile_store, "LARGEST_BYTES", 100)
    assert files.load(INFO, NOW_S, accept_any) is None


def test_engines_do_not_share_profiles(store: ProfileStore) -> None:
    store.save(INFO, numbered(1), NOW_S)
    for other in (replace(INFO, tp=2), replace(INFO, model="n"), replace(INFO, gpu="H100")):
        assert store.load(other, NOW_S, accept_any) is None
    assert number_of(store.load(replace(INFO, pid=1), NOW_S, accept_any)) == 1, "another process of the same is the same"


def test_old_profiles_are_removed_and_other_files_kept(files: ProfileStore, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "README.txt").write_text("ours")
    for number in range(KEPT + 5):
        path = files.save(INFO, numbered(number), NOW_S + number)
    assert len(list(folder.glob("*.npz"))) == KEPT
    assert (folder / "README.txt").exists()
    assert number_of(files.load(INFO, NOW_S + 99, accept_any)) == KEPT + 4
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o644, "replicas may run as other users"


def test_a_profile_removed_while_it_is_read(files: ProfileStore, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between listing and reading every profile listed is replaced by newer ones: the reader looks again."""
    files.save(INFO, numbered(1), NOW_S)
    read = files._read

    def replaced(path: str, info: EngineInfo) -> Profile:
        monkeypatch.setattr(files, "_read", read)
        Path(path).unlink()
        files.save(INFO, numbered(2), NOW_S + 1)
        return read(path, info)

    monkeypatch.setattr(files, "_read", replaced)
    assert number_of(files.load(INFO, NOW_S + 1, accept_any)) == 2


def test_concurrent_writers(tmp_path: Path) -> None:
    """Four replicas write, two readers read all the while: what they get is always whole, and never older than it was."""
    url = f"file://{tmp_path}/store"
    ProfileStore(url).save(INFO, numbered(0), time.time())
    command = [sys.executable, "-m", "tests.support.store_writer", url, "25"]
    writers = [subprocess.Popen([*command, str(seed)]) for seed in range(1, 5)]
    reads: list[list[float]] = [[], []]
    faults: list[BaseException] = []

    def read(mine: list[float]) -> None:
        try:
            store = ProfileStore(url)
            while any(writer.poll() is None for writer in writers):
                found = store.load(INFO, time.time(), accept_any)
                assert number_of(found) is not None
                assert found is not None
                mine.append(found.written_s)
        except BaseException as fault:
            faults.append(fault)

    readers = [threading.Thread(target=read, args=(mine,)) for mine in reads]
    for reader in readers:
        reader.start()
    for thread in readers:
        thread.join()
    assert [writer.wait() for writer in writers] == [0] * 4
    assert faults == []
    assert all(len(mine) > 10 and len(set(mine)) > 3 for mine in reads), "the readers saw it change"
    number = number_of(ProfileStore(url).load(INFO, time.time(), accept_any))
    assert number in {1000 * seed + 24 for seed in range(1, 5)}, "the last of one of them"
    left = list((tmp_path / "store" / INFO.profile_name).iterdir())
    assert len(left) == KEPT, "and nothing half-written"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nosuch://bucket/x", "'nosuch://bucket/x': Protocol not known: nosuch"),
        ("s3://user:hunter2@bucket/x", "'s3://bucket/x': Install s3fs"),
    ],
)
def test_a_store_that_is_not_supported(url: str, words: str) -> None:
    with pytest.raises(BadInput) as error:
        ProfileStore(url)
    assert words in str(error.value)
    assert "hunter2" not in str(error.value)
    assert str(error.value).startswith("profile_store: ")


ODD = [
    "http://[::1", "s3://", "::", "::::", "simplecache::", "simplecache::nosuch://user:hunter2@b", "http://user:hunter2@[::1/x",
    "https://host/p?sig=hunter2&x=[", "memory", "zip://x::file:///no/such", "reference://user:hunter2@", "file://\u00e9/hunter2@",
    "blockcache::simplecache::s3://k:hunter2@b", "github://user:hunter2@host", "ftp://user:hunter2@127.0.0.1:1/x",
]  # fmt: skip


@pytest.mark.parametrize("url", ODD)
def test_an_odd_url_is_one_line_without_its_secret(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # some of these are relative paths
    with contextlib.suppress(BadInput):
        assert "hunter2" not in ProfileStore(url).shown
        return
    with pytest.raises(BadInput) as error:
        ProfileStore(url)
    assert "hunter2" not in str(error.value)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("profile_store: ")


def test_no_secret_in_the_log_of_a_failing_store(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The errors of a storage may repeat the URL, a part of it, or its signature percent-decoded."""
    url = "memory://user:hunter2@bucket/x?sig=a%2Fbcd&se=2030"
    store = ProfileStore(url)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(f"403 at {url}\nsig=a/bcd user:hunter2")

    monkeypatch.setattr(store._files, "ls", fail)
    worker = StoreWorker(store)
    worker.ask(INFO, accept_any, time.monotonic())
    worker.save(INFO, numbered(1))
    worker.close()
    deadline_s = time.monotonic() + 30.0
    while "cannot be read" not in caplog.text and time.monotonic() < deadline_s:
        threading.Event().wait(0.01)
    assert "cannot be read: 403 at" in caplog.text
    assert not any(secret in caplog.text for secret in ("hunter2", "a/bcd", "a%2Fbcd"))


@pytest.fixture
def refused_url() -> str:
    """FTP at a port where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"ftp://user:hunter2@127.0.0.1:{taken.getsockname()[1]}/x"


def test_a_store_that_refuses_the_connection_is_said_and_does_not_end_the_start(
    refused_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = ProfileStore(refused_url)
    assert "cannot be reached" in caplog.text
    assert "hunter2" not in caplog.text
    with pytest.raises(OSError, match="refused"):
        store.load(INFO, NOW_S, accept_any)


def test_a_store_that_never_answers_does_not_hold_the_start(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile_store, "OPEN_PATIENCE_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        ProfileStore(f"ftp://127.0.0.1:{silent.getsockname()[1]}/x")
    assert "cannot be reached: no answer within 0.2 s" in caplog.text


class _ComesAndGoes(MemoryFileSystem):  # type: ignore[misc]
    """A storage that connects when it is opened, and whose connection can break."""

    protocol = "comesandgoes"
    reachable = False
    connections = 0

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        if not type(self).reachable:
            raise ConnectionRefusedError(111, "Connection refused")
        type(self).connections += 1
        self.number = type(self).connections
        self.broken = False

    def ls(self, path: str, detail: bool = True, **options: object) -> list[object]:
        if self.broken:
            raise BrokenPipeError(32, "Broken pipe")
        found: list[object] = super().ls(path, detail=detail, **options)
        return found


def test_a_store_that_comes_back_is_opened_again(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("comesandgoes", _ComesAndGoes, clobber=True)
    store = ProfileStore("comesandgoes://store/x")
    worker = StoreWorker(store)
    worker.save(INFO, numbered(1))
    _wait(lambda: worker.summary()["save", "failed"] == 1)
    monkeypatch.setattr(_ComesAndGoes, "reachable", True)
    worker.save(INFO, numbered(2))
    _wait(lambda: worker.summary()["save", "done"] == 1)
    store._files.broken = True
    worker.save(INFO, numbered(3))
    _wait(lambda: worker.summary()["save", "failed"] == 2)
    worker.save(INFO, numbered(4))
    _wait(lambda: worker.summary()["save", "done"] == 2)
    assert number_of(store.load(INFO, time.time() + 1, accept_any)) == 4
    worker.close()


def _wait(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 30.0
    while not condition():
        assert time.monotonic() < deadline_s
        threading.Event().wait(0.01)


def test_a_sidecar_starts_without_a_store_that_refuses(refused_url: str, tmp_path: Path) -> None:
    (tmp_path / "sidecar.yaml").write_text(f"profile_store: {refused_url}\n")
    arguments = ("--config", str(tmp_path / "sidecar.yaml"))
    with SidecarProcess(tmp_path / "run", tmp_path / "profiles", *arguments) as sidecar:
        assert sidecar.status()["engine_attached"] is False
        assert "cannot be reached" in sidecar.stop()


def test_without_fsspec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(BadInput, match=r"profile_store: 'file:///x': fsspec is not installed: install the extra 'store'"):
        ProfileStore("file:///x")


def test_a_second_replica_starts_warm(tmp_path: Path) -> None:
    """Two replicas that share nothing but the store, as real processes."""
    url = f"file://{tmp_path}/store"
    config = tmp_path / "config.yaml"
    config.write_text(f"profile_store: {url}\n")
    sweeps = []
    for name, origin in (("first", "sweep"), ("second", "store")):
        runtime_dir = tmp_path / name / "run"
        engine = RunningEngine(runtime_dir)
        try:
            with SidecarProcess(runtime_dir, tmp_path / name / "profiles", "--config", str(config)) as sidecar:
                status = sidecar.wait_status(lambda status: status["mode"] == "active" and status["boundaries"], "a policy")
                assert status["origin"] == origin
                assert status["boundaries"][:3] == [6, 12, 18]
                sweeps.append(status["sweep"]["steps"])
                assert status["profile_store"]["fetch found"] == (origin == "store")
                assert 'adaptive_spec_profile_store_operations_total{gpu="cpu"' in sidecar.get("/metrics")
                log = sidecar.stop()
        finally:
            engine.stop()
    assert "already profiled by another replica, skipping warmup" in log
    assert sweeps[0] > 0
    assert sweeps[1] == 0


def test_a_bad_store_url_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("profile_store: gopher://somewhere/x\n")
    result = run_cli("sidecar", "--config", "config.yaml", "--runtime-dir", "run", "--profile-dir", "p", cwd=tmp_path)
    assert_one_line(result, "profile_store", "gopher://somewhere/x", "fsspec")
    (tmp_path / "config.yaml").write_text("profile_store: ''\n")
    assert_one_line(run_cli("sidecar", "--config", "config.yaml", cwd=tmp_path), "profile_store", "must be")


def test_a_bad_key_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("k" * 64)
    (tmp_path / "key").chmod(0o644)
    store = f"profile_store: file://{tmp_path}/store\n"
    (tmp_path / "config.yaml").write_text(f"{store}profile_store_key_file: key\n")
    command = ("sidecar", "--config", "config.yaml", "--runtime-dir", "run", "--profile-dir", "p")
    assert_one_line(run_cli(*command, cwd=tmp_path), "profile_store_key_file", "must not be readable by others", "0644")
    (tmp_path / "config.yaml").write_text("profile_store_key_file: key\n")
    assert_one_line(run_cli(*command, cwd=tmp_path), "profile_store_key_file", "needs profile_store")
