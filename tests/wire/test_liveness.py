"""Liveness by pid."""

from __future__ import annotations

import os

import pytest

from adaptive_spec.wire.liveness import process_alive


def test_this_process_is_alive() -> None:
    assert process_alive(os.getpid())


def test_a_process_that_has_ended_is_not_alive() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    assert not process_alive(child)


def test_a_process_of_another_user_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(pid: int, number: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("adaptive_spec.wire.liveness.os.kill", refused)
    assert process_alive(1)


@pytest.mark.parametrize("pid", [0, -1, -5])
def test_what_is_no_pid_is_not_alive(pid: int) -> None:
    assert not process_alive(pid)
