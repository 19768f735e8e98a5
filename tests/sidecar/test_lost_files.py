"""What lies in the runtime folder is deleted or damaged under a running pair, and made again."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from adaptive_spec.client.sidecar import ADDRESS_NAME, TOKEN_NAME, ControlClient, own_token
from adaptive_spec.config.settings import SidecarSettings
from adaptive_spec.engine_side.tap import LOOK_STEPS, PAGE_NAME, RING_NAME
from adaptive_spec.errors import BadInput
from adaptive_spec.runtime_folder import RoleLock, role_is_held
from adaptive_spec.sidecar.counters_page import COUNTERS_NAME
from adaptive_spec.sidecar.own_files import CHECKPOINT_NAME, OwnFiles
from adaptive_spec.sidecar.session import IGNORED_STEPS, Session
from adaptive_spec.sidecar.status_document import status_document
from adaptive_spec.sidecar.view import View
from adaptive_spec.storage.profile import load_profile
from tests.sidecar.test_process import RunningEngine
from tests.support.numbers_engine import NumbersEngine
from tests.support.processes import SidecarProcess, run_cli, wait_for


@pytest.fixture
def settings(tmp_path: Path) -> SidecarSettings:
    return SidecarSettings(runtime_dir=tmp_path / "run", profile_dir=tmp_path / "profiles")


@pytest.fixture
def engine(settings: SidecarSettings) -> Iterator[NumbersEngine]:
    engine = NumbersEngine(settings.runtime_dir)
    yield engine
    engine.close()


def swept(settings: SidecarSettings, engine: NumbersEngine) -> Session:
    session = Session.open(settings)
    assert session is not None
    for _ in range(200):
        go(session, engine, 20)
        session.view(None)
        if session.swept:
            return session
    raise AssertionError("the sweep does not end")


def go(session: Session, engine: NumbersEngine, steps: int) -> None:
    for _ in range(steps):
        engine.step()
    session.run_once()


def test_a_folder_deleted_under_a_running_pair_is_made_again(tmp_path: Path) -> None:
    run, engine = tmp_path / "run", RunningEngine(tmp_path / "run")
    try:
        with SidecarProcess(run, tmp_path / "profiles") as sidecar:
            wait_for(lambda: sidecar.status()["mode"] == "active", "the sweep to end")
            token = (run / TOKEN_NAME).read_text()
            gone = run.rename(tmp_path / "gone")  # the pair makes files again while the old ones are being deleted
            shutil.rmtree(gone)
            names = (PAGE_NAME, RING_NAME, ADDRESS_NAME, TOKEN_NAME)
            wait_for(lambda: all((run / name).exists() for name in names), "the files")
            assert (run / TOKEN_NAME).read_text() == token
            assert (role_is_held(run, "engine"), role_is_held(run, "sidecar")) == (True, True)
            assert run.stat().st_mode & 0o777 == 0o700
            # Both ends use the new files: a command arrives, is carried out by the engine, and comes back in the records.
            wait_for(lambda: run_cli("ctl", "pin", "3", "--runtime-dir", run).returncode == 0, "ctl to be obeyed")
            wait_for(lambda: sidecar.status()["last_k"] == 3, "the engine to follow the new page")
            assert not sidecar.status()["policy_ignored"]
    finally:
        engine.stop()


@pytest.mark.parametrize("how", ["deleted", "emptied", "overwritten", "replaced"])
def test_a_lost_page_is_made_again_with_its_policy(settings: SidecarSettings, engine: NumbersEngine, how: str) -> None:
    session = swept(settings, engine)
    assert session.command("pin", 3) == ""
    path, version = settings.runtime_dir / PAGE_NAME, session.page.last_version
    if how == "deleted":
        path.unlink()
    elif how == "emptied":
        os.truncate(path, 0)
    elif how == "overwritten":
        shutil.copyfile(__file__, path)
    else:
        path.unlink()
        path.mkdir()
        path.rmdir()
        shutil.copyfile(__file__, path)
    session.keep_page()
    session.run_once()
    go(session, engine, LOOK_STEPS + 1)
    assert {engine.step() for _ in range(5)} == {3}
    assert session.page.last_version >= version
    assert session.failures == {}
    session.close()


def test_a_policy_that_is_offered_and_not_followed_is_a_fault(settings: SidecarSettings, engine: NumbersEngine) -> None:
    session = swept(settings, engine)
    assert session.command("pin", 3) == ""
    go(session, engine, 20)
    engine.tap.refuse("a test says so")
    engine.tap._drop_page()
    for _ in range(IGNORED_STEPS // 20):
        assert not session.view(None).policy_ignored
        go(session, engine, 20)
    go(session, engine, 20)
    view = session.view(None)
    assert view.policy_ignored
    document = status_document(view, time.monotonic(), time.monotonic())
    assert document["policy_ignored"]
    assert "does not follow the policy page" in document["reason"]
    assert session.command("shadow", None) == ""
    go(session, engine, 20)
    assert not session.view(None).policy_ignored, "nothing that acts is offered"
    session.close()


def test_steps_of_a_time_without_a_heartbeat_are_no_fault(settings: SidecarSettings, engine: NumbersEngine) -> None:
    session = swept(settings, engine)
    assert session.command("pin", 3) == ""
    go(session, engine, 20)
    engine.tap.refuse("as if the heartbeat were old")
    engine.tap._drop_page()
    for _ in range(IGNORED_STEPS + 20):
        engine.step()
    session._beaten_ns -= 60_000_000_000  # the sidecar was stopped for a minute
    session._beat()
    session.run_once()
    assert not session.view(None).policy_ignored
    session.close()


def test_own_files_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "run"
    own = OwnFiles(folder, None)
    assert not (folder / ADDRESS_NAME).exists(), "nobody answers yet"
    own.announce("http://127.0.0.1:1")
    client = ControlClient.find(folder, None, None)
    assert (client.url, client._token) == ("http://127.0.0.1:1", own.token)
    own.keep()
    assert "made again" not in caplog.text
    for damage in ("address", "token", "all"):
        if damage == "all":
            shutil.rmtree(folder)
        else:
            (folder / (ADDRESS_NAME if damage == "address" else TOKEN_NAME)).write_text("nonsense")
        own.keep()
        client = ControlClient.find(folder, None, None)
        assert (client.url, client._token) == ("http://127.0.0.1:1", own.token), damage
    assert caplog.text.count(f"{ADDRESS_NAME}: was deleted or damaged") == 2, "alone, and with the folder"
    assert caplog.text.count(f"{TOKEN_NAME}: was deleted or damaged") == 2
    own.close()
    assert not (folder / ADDRESS_NAME).exists()
    again = OwnFiles(folder, None)
    assert again.token == own.token
    again.close()


def test_a_folder_that_another_sidecar_took_meanwhile_ends_this_one(tmp_path: Path) -> None:
    own = OwnFiles(tmp_path / "run", None)
    own.announce("http://127.0.0.1:1")
    (tmp_path / "run" / "sidecar.lock").unlink()
    other = RoleLock.acquire(tmp_path / "run", "sidecar")
    address = (tmp_path / "run" / ADDRESS_NAME).read_bytes()
    with pytest.raises(BadInput, match="another sidecar uses this folder"):
        own.keep()
    own.close()
    assert (tmp_path / "run" / ADDRESS_NAME).read_bytes() == address, "the other one's now"
    other.release()


def test_a_second_sidecar_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    own = OwnFiles(tmp_path / "run", None)
    own.announce("http://127.0.0.1:1")
    with pytest.raises(BadInput, match="another sidecar uses this folder"):
        OwnFiles(tmp_path / "run", None)
    assert json.loads((tmp_path / "run" / ADDRESS_NAME).read_bytes())["url"] == "http://127.0.0.1:1"
    own.close()


def test_what_a_killed_sidecar_left_is_removed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir(mode=0o700)
    for name in (f".{PAGE_NAME}.1.ab.tmp", ".checkpoint.npz.xyz.tmp", f".{TOKEN_NAME}.q.tmp", ADDRESS_NAME, ".other.tmp"):
        (run / name).write_text("half")
    OwnFiles(run, None).close()
    assert sorted(p.name for p in run.iterdir()) == [".other.tmp", TOKEN_NAME, "sidecar.lock"]


def test_nothing_attached_is_no_ignored_policy() -> None:
    assert not status_document(View(0.0), 0.0, 0.0)["policy_ignored"]


def test_a_file_that_cannot_be_written_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("adaptive_spec.sidecar.own_files.write_atomically", full)
    own = OwnFiles(tmp_path / "run", None)
    for _ in range(5):
        own.keep()
    assert caplog.text.count("cannot be written") == 1
    own.close()


@pytest.mark.parametrize("name", [TOKEN_NAME, ADDRESS_NAME])
@pytest.mark.parametrize("when", ["before", "while it runs"])
def test_a_folder_in_place_of_a_file_of_the_sidecar_is_set_aside(tmp_path: Path, name: str, when: str) -> None:
    place = tmp_path / name
    if when == "before":
        (place / "inside").mkdir(parents=True)
    tmp_path.chmod(0o700)
    own = OwnFiles(tmp_path, None)
    try:
        own.announce("http://127.0.0.1:1")
        if when != "before":
            place.unlink()
            (place / "inside").mkdir(parents=True)
            own.keep()
        assert own_token(tmp_path / TOKEN_NAME) == own.token
        assert json.loads((tmp_path / ADDRESS_NAME).read_bytes())["url"] == "http://127.0.0.1:1"
        assert (tmp_path / f"{name}.damaged-1" / "inside").is_dir()
    finally:
        own.close()


KINDS = ("folder", "full folder", "link", "FIFO", "socket", "open to others", "closed to us", "empty")


def put_something_else(path: Path, kind: str) -> None:
    """Replace a file by what cannot be one of ours."""
    if kind in ("open to others", "closed to us"):
        path.chmod(0o644 if kind == "open to others" else 0)
        return
    path.unlink()
    if kind in ("folder", "full folder"):
        path.mkdir(0o700)
        if kind == "full folder":
            (path / "inside").touch()
    elif kind == "link":
        path.symlink_to("/dev/zero")
    elif kind == "FIFO":
        os.mkfifo(path, 0o600)
    elif kind == "socket":
        os.mknod(path, 0o600 | stat.S_IFSOCK)
    else:
        path.touch(0o600)


def is_ours(path: Path) -> bool:
    status = path.lstat()
    return stat.S_ISREG(status.st_mode) and stat.S_IMODE(status.st_mode) == 0o600 and status.st_size > 0


@pytest.mark.parametrize("kind", KINDS)
def test_something_else_in_place_of_a_file_is_replaced_under_a_pair(
    settings: SidecarSettings, engine: NumbersEngine, kind: str
) -> None:
    session = swept(settings, engine)
    run = settings.runtime_dir
    assert session.checkpoint()
    for name in (PAGE_NAME, RING_NAME, CHECKPOINT_NAME, COUNTERS_NAME):
        put_something_else(run / name, kind)
    go(session, engine, LOOK_STEPS + 1)
    session.keep_page()
    assert session.follow_engine()
    session.view(None)
    assert session.checkpoint()
    for name in (PAGE_NAME, RING_NAME, CHECKPOINT_NAME, COUNTERS_NAME):
        assert is_ours(run / name), name
    learnt = session.controller.counters.records
    go(session, engine, LOOK_STEPS + 1)
    assert session.controller.counters.records > learnt
    assert session.failures == {}
    session.close()


@pytest.mark.parametrize("kind", KINDS)
def test_something_else_in_place_of_a_file_does_not_keep_a_sidecar_from_starting(
    settings: SidecarSettings, engine: NumbersEngine, kind: str
) -> None:
    session = swept(settings, engine)
    assert session.checkpoint()
    session.close()
    for name in (PAGE_NAME, RING_NAME, CHECKPOINT_NAME, COUNTERS_NAME):
        put_something_else(settings.runtime_dir / name, kind)
    waiting = Session.open(settings)
    if waiting is not None:
        assert kind == "closed to us", "else it waits for the engine's ring"
        assert os.geteuid() == 0
        waiting.close()
    for _ in range(LOOK_STEPS + 1):
        engine.step()
    again = Session.open(settings)
    assert again is not None
    again.keep_page()
    assert is_ours(settings.runtime_dir / PAGE_NAME)
    again.close()


@pytest.mark.parametrize("place", ["profile", "plots", "latency_model.npz", "calibration.npz", "policy.json"])
@pytest.mark.parametrize("kind", KINDS)
def test_something_else_in_place_of_a_profile_is_replaced(
    settings: SidecarSettings, engine: NumbersEngine, place: str, kind: str
) -> None:
    session = swept(settings, engine)
    assert session.save_profile()
    folder = session.profile_folder
    path = folder if place == "profile" else folder / place
    if path.is_dir():
        shutil.rmtree(path)
        path.touch()
    put_something_else(path, kind)
    assert session.save_profile()
    assert load_profile(folder, engine.info) is not None
    assert (folder / "plots").is_dir()
    assert session.failures == {}
    session.close()


def test_a_damaged_profile_that_cannot_be_set_aside_does_not_end_the_sidecar(
    settings: SidecarSettings, engine: NumbersEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a file system that cannot be written to."""
    session = swept(settings, engine)
    assert session.save_profile()
    session.close()
    (session.profile_folder / "policy.json").write_text("nonsense")

    def read_only(path: Path, why: str = "") -> Path:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr("adaptive_spec.wire.shared_file.set_aside", read_only)
    again = Session.open(settings)
    assert again is not None
    assert again.origin == "sweep"
    assert "policy.json is damaged" in caplog.text
    assert "cannot be set aside: Read-only file system" in caplog.text
    again.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("how", ["folder open to all", "folder of another user", "folder of the profile open to all"])
def test_a_profile_that_another_user_could_plant_is_not_taken(
    settings: SidecarSettings, engine: NumbersEngine, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    session = swept(settings, engine)
    assert session.save_profile()
    folder = session.profile_folder
    session.close()
    for path in (folder, *folder.glob("*.*")):
        os.chown(path, 12345, 12345)
    if how == "folder of another user":
        os.chown(settings.profile_dir, 12345, 12345)
    else:
        (settings.profile_dir if how == "folder open to all" else folder).chmod(0o777)
    again = Session.open(settings)
    assert again is not None
    assert again.origin == "sweep"
    assert "it is of user 12345, and other users can write to its folder" in caplog.text
    again.close()
