from __future__ import annotations

import subprocess
import sys

from adaptive_spec.sidecar.supervisor import Supervisor


def _ends_at_once() -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process


def test_restarts_with_growing_delays() -> None:
    supervisor = Supervisor(_ends_at_once, 100.0)
    at_s: list[float] = []
    for look in range(650):  # 65 simulated seconds in steps of 0.1 s
        before = supervisor.restarts
        supervisor.look(100.0 + 0.1 * look)
        if supervisor.restarts > before:
            at_s.append(round(0.1 * look, 1))
    pauses = [round(b - a, 1) for a, b in zip([0.0, *at_s], at_s, strict=False)]
    assert pauses == [0.5, 1.1, 2.1, 4.1, 8.1, 16.1, 30.1]


def test_delay_returns_to_its_start_after_a_long_run() -> None:
    supervisor = Supervisor(lambda: subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE), 0.0)
    for death in range(3):
        at_s = 100.0 * death
        supervisor.look(at_s + 31.0)
        supervisor.process.communicate(b"\n")
        supervisor.look(at_s + 32.0)
        supervisor.look(at_s + 32.4)
        assert supervisor.restarts == death
        supervisor.look(at_s + 32.6)
        assert supervisor.restarts == death + 1
    supervisor.process.communicate(b"\n")


def test_a_failed_start_is_retried() -> None:
    starts = 0

    def start() -> subprocess.Popen[bytes]:
        nonlocal starts
        starts += 1
        if starts in (2, 3):
            raise FileNotFoundError("not there")
        return _ends_at_once()

    supervisor = Supervisor(start, 0.0)
    for look in range(60):
        supervisor.look(0.1 * look)
    assert starts == 4
    assert supervisor.restarts == 1
