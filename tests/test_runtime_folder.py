"""The shared folder: who may use it, its default path, and one holder for each role."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adaptive_spec import runtime_folder
from adaptive_spec.runtime_folder import (
    RoleLock,
    check_own_file,
    check_runtime_dir,
    default_runtime_dir,
    default_runtime_dirs,
    ensure_role,
    make_runtime_dir,
    remove_temporary_files,
    role_holder,
    role_is_held,
    server_port_of,
)

HOLDER = """
import sys, time
from pathlib import Path
from adaptive_spec.runtime_folder import RoleLock
lock = RoleLock.acquire(Path(sys.argv[1]), sys.argv[2])
print("held", flush=True)
time.sleep(600)
"""


def _holder(folder: Path, role: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder), role], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_a_made_folder_is_private(tmp_path: Path) -> None:
    make_runtime_dir(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    make_runtime_dir(tmp_path / "a" / "b")


@pytest.mark.parametrize("mode", [0o701, 0o710, 0o720, 0o750, 0o755, 0o770, 0o777, 0o1777])
def test_a_folder_that_others_can_use_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(mode)
    with pytest.raises(PermissionError, match="must be your own folder with mode 0700, got mode"):
        make_runtime_dir(tmp_path / "run")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
@pytest.mark.parametrize("mode", [0o700, 0o777])
def test_root_refuses_the_folder_of_another_user(tmp_path: Path, mode: int) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(mode)
    os.chown(tmp_path / "run", 12345, 12345)
    with pytest.raises(PermissionError, match="got one of user 12345"):
        make_runtime_dir(tmp_path / "run")


def test_a_link_and_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    (tmp_path / "file").touch(0o600)
    for name in ("link", "file"):
        with pytest.raises(NotADirectoryError, match="must be your own folder"):
            check_runtime_dir(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        check_runtime_dir(tmp_path / "none")


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o602, 0o620, 0o601])
def test_a_file_that_others_can_use_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "f").touch()
    (tmp_path / "f").chmod(mode)
    with (tmp_path / "f").open() as file, pytest.raises(PermissionError, match="must be your own file with mode 0600"):
        check_own_file(file.fileno(), tmp_path / "f")


def test_the_default_is_of_user_and_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_runtime_dir(8000, 17) == Path("/dev/shm/adaptive-spec-17-8000")
    assert default_runtime_dir() == Path(f"/dev/shm/adaptive-spec-{os.geteuid()}-30000")
    monkeypatch.setattr(runtime_folder, "MEMORY", tmp_path)
    for name in (
        f"adaptive-spec-{os.geteuid()}-8000",
        f"adaptive-spec-{os.geteuid()}-80",
        "adaptive-spec-99999-1",
        "adaptive-spec-x",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / f"adaptive-spec-{os.geteuid()}-x").mkdir()
    assert list(default_runtime_dirs()) == [80, 8000]


@pytest.mark.parametrize(
    ("flags", "port"),
    [
        (["--port", "8000"], 8000), (["--port=1", "--port", "2"], 2), (["--port"], 30000), (["--port", "x"], 30000),
        (["--portal", "8000"], 30000), (["--port", "99999"], 30000), (["--model-path", "m"], 30000), ([], 30000),
    ],
)  # fmt: skip
def test_the_port_among_the_flags_of_a_server(flags: list[str], port: int) -> None:
    assert server_port_of(flags) == port


def test_a_role_has_one_holder(tmp_path: Path) -> None:
    assert role_is_held(tmp_path, "engine") is None
    lock = RoleLock.acquire(tmp_path, "engine")
    assert role_is_held(tmp_path, "engine")
    assert role_is_held(tmp_path, "sidecar") is None
    assert role_holder(tmp_path, "engine") == os.getpid()
    with pytest.raises(BlockingIOError, match=rf"another engine uses this folder \(pid {os.getpid()}\)"):
        RoleLock.acquire(tmp_path, "engine", attempts=2)
    RoleLock.acquire(tmp_path, "sidecar").release()
    lock.release()
    assert role_is_held(tmp_path, "engine") is False
    RoleLock.acquire(tmp_path, "engine", attempts=1).release()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_role_ends_with_its_process(tmp_path: Path, number: int) -> None:
    process = _holder(tmp_path, "sidecar")
    assert role_is_held(tmp_path, "sidecar")
    process.send_signal(number)
    # A zombie: nobody has waited for it, so its process id still exists.
    while role_is_held(tmp_path, "sidecar"):
        time.sleep(0.01)
    os.kill(process.pid, 0)
    RoleLock.acquire(tmp_path, "sidecar").release()
    process.communicate()


def test_a_role_that_nobody_uses_any_more_is_free(tmp_path: Path) -> None:
    RoleLock.acquire(tmp_path, "engine")
    assert role_is_held(tmp_path, "engine") is False


def test_a_forked_child_does_not_keep_the_role(tmp_path: Path) -> None:
    lock = RoleLock.acquire(tmp_path, "engine")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    os.close(reader)
    assert lock.in_place
    lock.release()
    try:
        # The child may not have reached its own code yet: acquire tries for a second.
        RoleLock.acquire(tmp_path, "engine").release()
    finally:
        os.close(writer)
        os.waitpid(child, 0)


def test_a_deleted_lock_file_is_noticed(tmp_path: Path) -> None:
    lock = RoleLock.acquire(tmp_path, "engine")
    lock.path.unlink()
    assert not lock.in_place
    assert role_is_held(tmp_path, "engine") is None


@pytest.mark.parametrize("mode", [0o644, 0o666, 0o000, 0o400])
def test_another_mode_of_a_held_lock_is_set_back(tmp_path: Path, mode: int) -> None:
    lock = RoleLock.acquire(tmp_path, "sidecar")
    lock.path.chmod(mode)
    assert lock.in_place
    assert lock.path.stat().st_mode & 0o777 == 0o600
    assert role_is_held(tmp_path, "sidecar")
    lock.release()


@pytest.mark.parametrize("kind", ["link", "fifo", "folder", "open to others"])
def test_another_thing_in_place_of_the_lock_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "engine.lock"
    if kind == "link":
        (tmp_path / "other").touch(0o600)
        path.symlink_to(tmp_path / "other")
    elif kind == "fifo":
        os.mkfifo(path, 0o600)
    elif kind == "folder":
        path.mkdir(0o700)
    else:
        path.touch()
        path.chmod(0o666)
    with pytest.raises(OSError, match=r"engine\.lock: "):
        RoleLock.acquire(tmp_path, "engine", attempts=1)
    assert role_is_held(tmp_path, "engine") is None


def test_a_role_for_reports_passes_to_who_acquires_it(tmp_path: Path) -> None:
    ensure_role(tmp_path, "engine")
    assert role_is_held(tmp_path, "engine")
    lock = RoleLock.acquire(tmp_path, "engine", attempts=1)
    ensure_role(tmp_path, "engine")
    lock.release()
    assert role_is_held(tmp_path, "engine") is False
    other = _holder(tmp_path, "engine")
    with pytest.raises(BlockingIOError):
        ensure_role(tmp_path, "engine")
    _end(other)


def _race(folder: str, barrier: multiprocessing.synchronize.Barrier, answers: multiprocessing.Queue[bool]) -> None:
    for _ in range(20):
        barrier.wait()
        try:
            lock: RoleLock | None = RoleLock.acquire(Path(folder), "sidecar", attempts=1)
        except BlockingIOError:
            lock = None
        answers.put(lock is not None)
        barrier.wait()
        if lock is not None:
            lock.release()


def test_processes_that_start_together_have_one_holder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(3), context.Queue()
    processes = [context.Process(target=_race, args=(str(tmp_path), barrier, answers)) for _ in range(3)]
    for process in processes:
        process.start()
    won = sum(answers.get(timeout=60) for _ in range(60))
    for process in processes:
        process.join()
    assert won == 20


def test_temporary_files_of_killed_processes_are_removed(tmp_path: Path) -> None:
    for name in (".policy.page.12.ab.tmp", ".checkpoint.npz.x.tmp", ".other.x.tmp", "policy.page", ".policy.page"):
        (tmp_path / name).touch()
    assert remove_temporary_files(tmp_path, ("policy.page", "checkpoint.npz"), older_than_s=3600.0) == 0
    assert remove_temporary_files(tmp_path, ("policy.page", "checkpoint.npz")) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == [".other.x.tmp", ".policy.page", "policy.page"]
    assert remove_temporary_files(tmp_path / "none", ("policy.page",)) == 0
