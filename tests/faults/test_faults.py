"""The fault suite on one pair of processes, fault after fault; in full at night."""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from adaptive_spec.sidecar.own_files import CHECKPOINT_NAME
from tests.faults.disks import PROFILES_MB, RUN_MB, cannot_mount, full, read_only, small_disk
from tests.faults.pair import Pair
from tests.faults.scenarios import CI, FAULTS, NIGHTLY, Amounts, swept_pair
from tests.faults.shifted_clock import SHIFT_VARIABLE
from tests.support.processes import SidecarProcess, run_cli, wait_for

PACKAGE = Path(__file__).parents[2] / "adaptive_spec"
LONG_AGE_S = 60.0
"""Of a heartbeat, where it is not to be too old however busy the machine is."""
YEAR_S = 365 * 86400.0
WALL_CLOCK_USERS = {
    "client/sidecar.py",  # the age of the heartbeat file, for `doctor --alive`
    "runtime_folder.py",  # the age of temporary files in the shared profile folder
    "sidecar/grafana.py",  # the time of an annotation
    "storage/profile_store_worker.py",  # the date of a stored profile
}


@pytest.mark.parametrize("amounts", [CI, pytest.param(NIGHTLY, marks=pytest.mark.nightly)], ids=["ci", "nightly"])
def test_the_pair_survives_every_fault(tmp_path: Path, amounts: Amounts) -> None:
    with swept_pair(tmp_path) as pair:
        for fault in FAULTS:
            print(f"{fault.what}: {fault.run(pair, amounts)}", flush=True)
        print(f"records read beside the sidecar: {pair.watch.read:,}, not as written: {pair.watch.not_as_written}")


# -- disks -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[Path]:
    """A folder whose `run` and `profiles` are small disks."""
    if reason := cannot_mount():
        pytest.skip(reason)
    with ExitStack() as stack:
        stack.enter_context(small_disk(tmp_path / "run", RUN_MB))
        stack.enter_context(small_disk(tmp_path / "profiles", PROFILES_MB))
        yield tmp_path


def test_full_disks(disks: Path) -> None:
    with swept_pair(disks) as pair:
        wait_for((pair.run / CHECKPOINT_NAME).is_file, "a checkpoint")
        before = pair.books()
        with full(pair.run):
            pair.mark()
            print(f"runtime folder full: {pair.check()}")
            wait_for(lambda: pair.metric("controller_failures_total", call="checkpoint") > 0, "the failure to be counted")
            pair.noticed("checkpoint failed: .*No space left on device")
            pair.kill_sidecar()
            pair.start_sidecar()
            print(f"sidecar restarted on a full disk: {pair.check()}")
            print(f"after that: {pair.books().since(before)}")
            pair.mark()
            pair.kill_engine()
            pair.start_engine()
            state = pair.wait_engine(lambda state: state["steps"] > 200, "the engine to run on a full disk")
            assert (state["hook_failures"], state["records_written"]) == (0, 0)
            assert state["write_failures"] > 0
            pair.noticed("record ring in .*: cannot be created, .*No space left on device")
        state = pair.wait_engine(lambda state: state["records_written"] > 0, "the engine to write once there is space")
        print(f"engine started on a full disk: {state['write_failures']} steps unrecorded, then written; {pair.check()}")
        pair.mark()
        with full(pair.profiles):
            pair.sidecar.stop()
            pair.noticed("profile failed: .*No space left on device")
        pair.start_sidecar()
        print(f"sidecar ended on a full profile disk: status 0, named in the log; then {pair.check()}")


def test_read_only_disks(disks: Path) -> None:
    with swept_pair(disks) as pair:
        before = pair.books()
        pair.mark()
        with read_only(pair.run), read_only(pair.profiles):
            print(f"both folders read-only: {pair.check()}")
            wait_for(lambda: pair.metric("controller_failures_total", call="checkpoint") > 0, "the failure to be counted")
            pair.noticed("checkpoint failed: .*Read-only file system")
            print(f"after that: {pair.books().since(before)}")
            pair.sidecar.stop()
            pair.noticed("profile failed: .*Read-only file system")
            with SidecarProcess(pair.run, pair.profiles) as refused:
                assert refused.process.wait(60.0) == 2
                assert re.search(r"runtime_dir: .*Read-only file system", refused.log.read_text())
            pair.kill_engine()
            pair.start_engine()
            state = pair.wait_engine(lambda state: state["steps"] > 200, "the engine to run in a read-only folder")
            assert "Read-only file system" in state["refused"]
            assert (state["hook_failures"], state["records_written"]) == (0, 0)
        pair.start_sidecar()
        state = pair.wait_engine(lambda state: state["records_written"] > 0, "the engine to use the folder")
        print(f"started while read-only: {state['fallback_steps']} steps on the launch K, then {pair.check()}")


# -- the clock, Grafana ------------------------------------------------------------------------------------------------


def test_the_wall_clock_is_used_in_few_places() -> None:
    """What decides, and what passes between the processes, goes by the monotonic clock."""
    wall_clock = re.compile(r"\btime\.time(_ns)?\b|\bdatetime\.|\b(gm|local)time\b|CLOCK_REALTIME")
    used = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if wall_clock.search(path.read_text())}
    assert used == WALL_CLOCK_USERS


def test_steps_of_the_wall_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shift = tmp_path / "shift"
    shift.write_text("0")
    monkeypatch.setenv(SHIFT_VARIABLE, str(shift))
    with swept_pair(tmp_path, module="tests.faults.shifted_clock", max_age_s=LONG_AGE_S) as pair:
        before, steps = pair.books(), pair.engine_state()["fallback_steps"]
        for shift_s in (YEAR_S, -YEAR_S, 0.0):
            shift.write_text(str(shift_s))
            pair.mark()
            assert run_cli("ctl", "refit", "--runtime-dir", pair.run).returncode == 0
            year = 1970 + int((os.stat(shift).st_mtime + shift_s) / (365.2425 * 86400.0))
            pair.noticed(rf"{year}-.* command: refit")
            seen = pair.check()
        assert pair.engine_state()["fallback_steps"] == steps, "the policy is followed all the while"
        print(f"{pair.books().since(before)}; {seen}")
        assert run_cli("doctor", "--alive", "--runtime-dir", pair.run).returncode == 0
        pair.kill_sidecar()
        shift.write_text(str(-YEAR_S))
        pair.start_sidecar()
        print(f"restarted a year earlier: {pair.check()}")


def test_grafana_that_hangs(tmp_path: Path) -> None:
    """It accepts and never answers: the loop goes on, the engine follows the policy all the while, failures are counted."""
    taken: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as hung:
        port = hung.getsockname()[1]

        def accept() -> None:
            try:
                while True:
                    taken.append(hung.accept()[0])
            except OSError:  # closed: the test is over
                return

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        configuration = tmp_path / "sidecar.yaml"
        configuration.write_text(f"grafana: {{url: 'http://127.0.0.1:{port}', timeout_s: 0.5}}\n")
        with swept_pair(tmp_path, "--config", str(configuration), max_age_s=LONG_AGE_S) as pair:
            before, steps = pair.books(), pair.engine_state()["fallback_steps"]
            for command in (("pin", "3"), ("unpin",), ("pin", "1"), ("unpin",)):
                assert run_cli("ctl", *command, "--runtime-dir", pair.run).returncode == 0
            refused = {"reason": "refused"}
            wait_for(lambda: pair.metric("annotations_dropped_total", **refused) >= 3, "failures to be counted")
            pair.noticed("annotations: .*did not answer in time")
            seen = pair.check()
            assert pair.engine_state()["fallback_steps"] == steps
            assert taken
            dropped = pair.metric("annotations_dropped_total", **refused)
            print(f"{dropped:g} annotations dropped; {pair.books().since(before)}; {seen}")
            pair.sidecar.stop()
            pair.start_sidecar()
            pair.check()
        hung.shutdown(socket.SHUT_RDWR)
    for connection in taken:
        connection.close()


def test_pair_is_quiet_in_its_logs(tmp_path: Path) -> None:
    """Without a fault nothing is noticed: the words that the scenarios look for are not said anyway."""
    with swept_pair(tmp_path) as pair:
        pair.books()
        said = "".join(path.read_text() for path in Pair._logs(pair))
    for words in ("made again", "cannot be used", "waiting for the engine to make", "failed", "restarted"):
        assert words not in said
