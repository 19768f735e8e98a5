from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from adaptive_spec.cli.alive import alive_line
from adaptive_spec.client.sidecar import ALIVE_S, HEARTBEAT_NAME
from adaptive_spec.runtime_folder import RoleLock, make_runtime_dir
from tests.support.processes import SidecarProcess, run_cli, wait_for


def test_alive_follows_the_loop_of_a_sidecar(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def alive() -> bool:
        result = run_cli("doctor", "--alive", "--runtime-dir", folder)
        assert (result.returncode == 0) == (": alive: " in result.stdout), result.stdout + result.stderr
        assert result.stdout.count("\n") == 1
        return result.returncode == 0

    assert not alive()
    with SidecarProcess(folder, tmp_path / "profiles") as sidecar:
        assert sidecar.url
        wait_for(alive, "the sidecar to live")
        sidecar.process.send_signal(signal.SIGSTOP)
        wait_for(lambda: not alive(), "a stopped sidecar to be found out")
        sidecar.process.send_signal(signal.SIGCONT)
        wait_for(alive, "the sidecar to live again")
        (folder / HEARTBEAT_NAME).unlink()
        wait_for(alive, "the heartbeat to be made again")
        sidecar.kill()
        assert not alive(), "the lock is not held any more"


def test_the_heartbeat_counts_only_while_the_role_is_held(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert alive_line(folder) == (f"{folder}: not alive: No such file or directory", False)
    make_runtime_dir(folder)
    (folder / HEARTBEAT_NAME).touch()
    assert alive_line(folder) == (f"{folder}: not alive: no sidecar runs there", False)
    lock = RoleLock.acquire(folder, "sidecar")
    assert alive_line(folder)[1]
    for age_s in (ALIVE_S + 60.0, -ALIVE_S - 60.0):
        os.utime(folder / HEARTBEAT_NAME, (time.time() - age_s,) * 2)
        assert not alive_line(folder)[1]
    (folder / HEARTBEAT_NAME).unlink()
    assert not alive_line(folder)[1]
    folder.chmod(0o755)
    (folder / HEARTBEAT_NAME).touch()
    assert alive_line(folder) == (
        f"{folder}: not alive: other users can read it; must be your own folder with mode 0700, got mode 0755",
        False,
    )
    lock.release()
