"""Ranks as real processes on gloo: one K in every step or a clean leave, whatever happens to one of them. None can hang."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from adaptive_spec.engines.sglang.cpu_kit import CpuKit
from tests.engines.sglang.eagle_rank import STOCK_K

LIMIT_S = 60.0
"""Of a run."""
START_S = 240.0
"""Of the start before it: each process imports PyTorch, some SGLang as well, and the machine may be busy."""


class Ranks:
    """The processes of all ranks and a sidecar that publishes all the time. Ended when the block is left."""

    def __init__(self, folder: Path, ranks: int = 2, command: tuple[str, ...] = (sys.executable,), **options: Any) -> None:
        self.folder, self.ranks, self._command = folder, ranks, command
        self.runtime_dir = folder / "run"
        self.runtime_dir.mkdir(0o700)
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = int(taken.getsockname()[1])
        self.options = {
            "ranks": ranks, "port": port, "runtime_dir": str(self.runtime_dir), "stop": str(folder / "stop"),
            "max_age_s": 0.5, "timeout_s": 5, "limit_s": LIMIT_S, **options,
        }  # fmt: skip
        self.deadline_s = time.monotonic() + START_S
        self.sidecars = 0
        self.sidecar = self._sidecar()
        self.processes = [self._rank(rank) for rank in range(ranks)]

    def started(self) -> None:
        self.wait(lambda: self.progress()[0], "the first steps")
        self.deadline_s = time.monotonic() + float(self.options["limit_s"])

    def _sidecar(self) -> subprocess.Popen[bytes]:
        self.sidecars += 1
        return subprocess.Popen(
            [sys.executable, "-m", "tests.engines.sglang.rank_policies", str(self.runtime_dir), str(self.sidecars), "acting"]
        )

    def _rank(self, rank: int) -> subprocess.Popen[str]:
        file = self.folder / f"rank{rank}.options"
        file.write_text(json.dumps({**self.options, "rank": rank, "out": str(self.folder / f"rank{rank}.json")}))
        command = [*self._command, "-m", "tests.engines.sglang.rank_process", str(file)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def restart_sidecar(self) -> None:
        self.sidecar = self._sidecar()

    def progress(self, rank: int = 0) -> tuple[int, int, str]:
        """Steps, policies taken into use, why the ranks left."""
        with contextlib.suppress(OSError, ValueError):
            steps, adopted, left = json.loads((self.folder / f"rank{rank}.steps").read_text())
            return steps, adopted, left
        return 0, 0, ""

    def wait(self, condition: Callable[[], Any], what: str) -> None:
        while not condition():
            assert time.monotonic() < self.deadline_s, f"too late: {what}; {self.progress()}"
            for process in self.processes:
                assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)

    def end(self) -> list[dict[str, Any]]:
        (self.folder / "stop").touch()
        for process in self.processes:
            try:
                _, errors = process.communicate(timeout=max(self.deadline_s - time.monotonic(), 5.0))
            except subprocess.TimeoutExpired as error:
                raise AssertionError("the ranks hang") from error
            assert process.returncode == 0, errors
        found = [json.loads((self.folder / f"rank{rank}.json").read_text()) for rank in range(self.ranks)]
        assert [rank["differing"] for rank in found] == [0] * self.ranks
        assert all(rank["ks"] == found[0]["ks"] for rank in found)
        return found

    def close(self) -> None:
        every: list[subprocess.Popen[Any]] = [*self.processes, self.sidecar]
        for process in every:
            with contextlib.suppress(OSError):
                process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()
            if process.stderr is not None:
                process.stderr.close()


@contextlib.contextmanager
def running(folder: Path, **options: Any) -> Iterator[Ranks]:
    ranks = Ranks(folder, **options)
    try:
        ranks.started()
        yield ranks
    finally:
        ranks.close()


def test_many_swaps_and_a_sidecar_killed_again_and_again(tmp_path: Path) -> None:
    with running(tmp_path, ranks=3) as ranks:
        for kill in range(3):
            before = ranks.progress()[1]
            ranks.wait(lambda before=before: ranks.progress()[1] > before + 15, "swaps")  # type: ignore[misc]
            ranks.sidecar.kill()
            ranks.sidecar.wait()
            steps = ranks.progress()[0]
            if kill < 2:
                ranks.wait(lambda steps=steps: ranks.progress()[0] > steps + 300, "steps without a sidecar")  # type: ignore[misc]
                ranks.restart_sidecar()
        found = ranks.end()
    assert all(rank["adopted"] > 45 and not rank["left"] for rank in found)
    assert len(set(found[0]["ks"])) > 2
    assert STOCK_K in found[0]["ks"]
    assert not any(rank["failures"] for rank in found)


HOOKS = ("step", "step/after", "verify", "verify/after", "results", "results/after")


@pytest.mark.parametrize("rank", [0, 1])
def test_every_hook_fails_on_one_rank(tmp_path: Path, rank: int) -> None:
    """One after the other, from the middle of the run on."""
    faults = tmp_path / "faults"
    faults.write_text("")
    with running(tmp_path, faults={str(rank): f"@{faults}"}) as ranks:
        ranks.wait(lambda: ranks.progress()[1] > 3, "swaps")
        for hook in HOOKS:
            steps = ranks.progress()[0]
            faults.write_text(f"{hook}:5")
            ranks.wait(lambda steps=steps: ranks.progress()[0] > steps + 60, "steps with a failing hook")  # type: ignore[misc]
            assert not ranks.progress()[2], "five failures are no reason to leave"
        faults.write_text(HOOKS[-1])
        ranks.wait(lambda: all(ranks.progress(i)[2] for i in (0, 1)), "all ranks to leave")
        found = ranks.end()
    assert found[rank]["failures"]["step"] == 10
    assert all("hook results failed" in one["left"] for one in found)
    assert found[0]["ks"][-5:] == [STOCK_K] * 5


def test_a_hook_fails_on_one_rank_while_the_server_starts(tmp_path: Path) -> None:
    with running(tmp_path, faults={"1": "attach/after"}) as ranks:
        ranks.wait(lambda: ranks.progress(0)[2], "rank 0 to give up")
        found = ranks.end()
    assert "on rank 1" in found[0]["left"]
    assert set(found[0]["ks"]) == {STOCK_K}


def test_one_rank_has_lost_the_environment(tmp_path: Path) -> None:
    with running(tmp_path, without_plugin=[1], timeout_s=2) as ranks:
        ranks.wait(lambda: ranks.progress()[2], "rank 0 to give up")
        found = ranks.end()
    assert "rank 1 did not answer within 2 s" in found[0]["left"]
    assert set(found[0]["ks"]) == {STOCK_K}
    assert found[0]["attach_s"] < 5.0, "nothing waits while the server starts"
    assert not found[0]["steers"]


def test_one_rank_is_stopped_for_longer_than_every_timeout(tmp_path: Path) -> None:
    with running(tmp_path, timeout_s=2) as ranks:
        for rank in (0, 1):
            before = ranks.progress()[1]
            ranks.wait(lambda before=before: ranks.progress()[1] > before + 5, "swaps")  # type: ignore[misc]
            ranks.processes[rank].send_signal(signal.SIGSTOP)
            time.sleep(8.0)
            ranks.processes[rank].send_signal(signal.SIGCONT)
        before = ranks.progress()[1]
        ranks.wait(lambda: ranks.progress()[1] > before + 5 or ranks.progress()[2], "swaps after the pauses")
        found = ranks.end()
    assert not found[0]["left"], "the server stood still, and so did every rank: no reason to leave"


@pytest.mark.nightly
@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_is_stopped_for_half_a_minute(tmp_path: Path, rank: int) -> None:
    """Six times the rank timeout, and sixty times the age at which a policy is stale. No rank hangs, none leaves."""
    with running(tmp_path, timeout_s=5, limit_s=150.0) as ranks:
        ranks.wait(lambda: ranks.progress()[1] > 5, "swaps")
        ranks.processes[rank].send_signal(signal.SIGSTOP)
        time.sleep(1.0)  # the other rank waits for this one in SGLang's broadcast or in the forward
        steps = ranks.progress(1 - rank)[0]
        time.sleep(29.0)
        assert ranks.progress(1 - rank)[0] == steps
        ranks.processes[rank].send_signal(signal.SIGCONT)
        before = ranks.progress()[1]
        ranks.wait(lambda: ranks.progress()[1] > before + 5 or ranks.progress()[2], "swaps after the pause")
        found = ranks.end()
    assert not any(one["left"] for one in found)
    assert not any(one["failures"] for one in found)


def test_no_call_of_ours_blocks_a_step_while_the_other_rank_is_stopped(tmp_path: Path) -> None:
    """Rank 1 waits in SGLang's broadcast or in the forward: the store, in the process of rank 0, is stopped too."""
    with running(tmp_path) as ranks:
        ranks.wait(lambda: ranks.progress()[1] > 5, "swaps")
        ranks.processes[0].send_signal(signal.SIGSTOP)
        time.sleep(3.0)
        ranks.processes[0].send_signal(signal.SIGCONT)
        found = ranks.end()
    assert found[1]["longest_s"] < 2.0


@pytest.mark.server
@pytest.mark.parametrize("options", [pytest.param({}, marks=pytest.mark.nightly), {"without_plugin": [1], "timeout_s": 2}])
def test_on_sglangs_own_receiver(kit: CpuKit, tmp_path: Path, options: dict[str, Any]) -> None:
    """Its own broadcast of the requests, hooked by its own registry."""
    with running(tmp_path, command=tuple(kit.command("python")), sglang=True, **options) as ranks:
        ranks.wait(lambda: ranks.progress()[1] > 10 or ranks.progress()[2], "swaps")
        found = ranks.end()
    assert bool(found[0]["left"]) == bool(options)
    assert (found[0]["adopted"] > 10) == (not options)
