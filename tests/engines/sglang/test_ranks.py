"""Four real processes and gloo: one K in every step, whatever happens to sidecar and ranks."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from adaptive_spec.domain.policy import Policy
from adaptive_spec.engines.sglang.ranks import RankedTap, Rendezvous
from tests.engines.sglang.rank_policies import random_policy, rank_info

RANKS = 4
SWAPS = 10_000


class RestartedSidecar:
    """Publishes policies; killed with SIGKILL and started again at random moments."""

    def __init__(self, runtime_dir: Path) -> None:
        self._runtime_dir, self._dice, self.restarts = runtime_dir, random.Random(0), -1
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            self.restarts += 1
            command = [sys.executable, "-m", "tests.engines.sglang.rank_policies", str(self._runtime_dir), str(self.restarts)]
            process = subprocess.Popen(command)
            self._stop.wait(1.5 + 2.0 * self._dice.random())
            process.kill()
            process.wait()
            self._stop.wait(0.5 * self._dice.random())

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def _run_ranks(folder: Path, **options: Any) -> tuple[list[dict[str, Any]], list[NDArray[np.uint8]], list[NDArray[np.int64]]]:
    processes = []
    for rank in range(RANKS):
        file = folder / f"rank{rank}.json"
        file.write_text(json.dumps({
            "rank": rank, "ranks": RANKS, "store": str(folder / "store"), "runtime_dir": str(folder / "run"),
            "out": str(folder / f"rank{rank}.npz"), "max_age_s": 0.2, "limit_s": 600.0, **options,
        }))  # fmt: skip
        command = [sys.executable, "-m", "tests.engines.sglang.rank_process", str(file)]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    try:
        outputs = [process.communicate(timeout=700) for process in processes]
    except subprocess.TimeoutExpired as error:
        raise AssertionError("deadlock") from error
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    results = [json.loads(out) for out, _ in outputs]
    files = [np.load(folder / f"rank{rank}.npz") for rank in range(RANKS)]
    return results, [file["k"] for file in files], [file["version"] for file in files]


def test_ten_thousand_swaps_and_never_two_ks(tmp_path: Path) -> None:
    sidecar = RestartedSidecar(tmp_path / "run")
    try:
        results, ks, versions = _run_ranks(tmp_path, swaps=SWAPS, interval_steps=2)
    finally:
        sidecar.stop()
    assert [r["swaps"] for r in results] == [results[0]["swaps"]] * RANKS
    assert results[0]["swaps"] >= SWAPS
    assert sidecar.restarts >= 3
    differing = sum(int((ks[0] != other).sum() + (versions[0] != other_version).sum())
                    for other, other_version in zip(ks[1:], versions[1:], strict=True))  # fmt: skip
    assert differing == 0, f"{differing} steps with differing K"
    assert len(np.unique(versions[0])) > SWAPS / 2
    assert (versions[0] == 0).any(), "the launch K while no sidecar lives"
    assert [r["failures"] for r in results] == [0] * RANKS


def test_a_failing_rank_takes_all_to_the_launch_k(tmp_path: Path) -> None:
    sidecar = RestartedSidecar(tmp_path / "run")
    try:
        _, ks, versions = _run_ranks(tmp_path, swaps=1_000, interval_steps=3, failing_rank=2)
    finally:
        sidecar.stop()
    assert all(np.array_equal(ks[0], other) for other in ks[1:])
    synchronisations = versions[0][2::3]
    assert 0.005 < (synchronisations == 0).mean() < 0.5


class Loopback:
    """A group of one rank."""

    def total(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        return numbers

    def from_first(self, data: bytes | None, size: int) -> bytes:
        assert data is not None
        assert len(data) == size
        return data


class CorruptingGroup(Loopback):
    """Delivers zeros in place of the broadcast bytes."""

    def from_first(self, data: bytes | None, size: int) -> bytes:
        return bytes(size)


def _policies() -> list[Policy]:
    return [random_policy(version, random.Random(version)) for version in range(1, 5)]


def test_ranks_synchronise_every_n_steps_only() -> None:
    asked: list[int] = []
    policies = iter(_policies())
    rendezvous = Rendezvous(Loopback(), 0, 4)
    for step in range(1, 13):

        def newest(step: int = step) -> Policy:
            asked.append(step)
            return next(policies)

        policy = rendezvous.at_step(newest)
        assert (policy.version if policy else 0) == step // 4
    assert asked == [4, 8, 12]


def test_a_policy_that_cannot_be_decoded_is_adopted_by_no_rank() -> None:
    rendezvous = Rendezvous(CorruptingGroup(), 0, 1)
    assert rendezvous.at_step(lambda: _policies()[0]) is None
    assert (rendezvous.swaps, rendezvous.failures) == (0, 1)


def test_a_silent_sidecar_is_the_launch_k_and_needs_no_second_broadcast() -> None:
    first = _policies()[0]
    rendezvous = Rendezvous(Loopback(), 0, 1)
    found = rendezvous.at_step(lambda: first)
    assert found is not None
    assert rendezvous.at_step(lambda: None) is None
    assert rendezvous.at_step(lambda: first) is found
    assert rendezvous.swaps == 1

    def broken() -> Policy | None:
        raise OSError("the page is gone")

    assert rendezvous.at_step(broken) is None
    assert rendezvous.at_step(lambda: first) is found


def test_interval_must_be_positive() -> None:
    with pytest.raises(ValueError, match="interval_steps: must be at least 1, got 0"):
        Rendezvous(Loopback(), 0, 0)


def test_a_rank_that_falls_back_tells_the_others(tmp_path: Path) -> None:
    rendezvous = Rendezvous(Loopback(), 0, 1000)
    rendezvous.policy = _policies()[0]
    tap = RankedTap(tmp_path, rank_info(), None, rendezvous)
    tap.planner = None  # type: ignore[assignment]  # what could not be foreseen
    assert tap.begin_step(4, 100, time.monotonic_ns()) == 3
    assert rendezvous.failed
