"""What lies in the runtime folder is deleted or damaged under a running pair, and made again."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from adaptive_spec.client.sidecar import ADDRESS_NAME, TOKEN_NAME, ControlClient, own_token
from adaptive_spec.config.settings import SidecarSettings
from adaptive_spec.engine_side.tap import LOOK_STEPS, PAGE_NAME, RING_NAME
from adaptive_spec.errors import BadInput
from adaptive_spec.runtime_folder import RoleLock, role_is_held
from adaptive_spec.sidecar.own_files import OwnFiles
from adaptive_spec.sidecar.session import IGNORED_STEPS, Session
from adaptive_spec.sidecar.status_document import status_document
from adaptive_spec.sidecar.view import View
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
            shutil.rmtree(run)
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
