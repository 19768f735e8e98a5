from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from adaptive_spec.engines.common.rounds import Arm, Rounds, ratios
from adaptive_spec.errors import BadInput

ADAPTIVE, OWN, FIXED = Arm("adaptive", "active"), Arm("own", "shadow"), Arm.fixed(3)
SPEEDS = {"active": 120.0, "shadow": 100.0, "pin": 80.0}
"""Tokens per second after each command."""


class FakeSidecar:
    def __init__(self) -> None:
        self.pid, self.answers = 1, True
        self.sent: list[tuple[str, int | None]] = []

    def find(self) -> FakeSidecar:
        if not self.answers:
            raise BadInput("no sidecar answers")
        return self

    def status(self) -> dict[str, Any]:
        return {"sidecar_pid": self.pid}

    def send(self, command: str, k: int | None = None) -> dict[str, Any]:
        self.sent.append((command, k))
        return {}

    def serve(self, tokens: int) -> tuple[int, float]:
        return tokens, tokens / SPEEDS[self.sent[-1][0]]


def _rounds(sidecar: FakeSidecar, *arms: Arm) -> tuple[Rounds, threading.Event]:
    stopping = threading.Event()
    return Rounds(sidecar.find, arms, stopping), stopping


def test_every_arm_gets_all_phases_and_the_first_rotates() -> None:
    sidecar, sent = FakeSidecar(), []
    rounds, _ = _rounds(sidecar, ADAPTIVE, OWN, FIXED)

    def send(tokens: int) -> tuple[int, float]:
        sent.append((rounds.arm, tokens))
        return sidecar.serve(tokens)

    for _ in range(2):
        rounds.run([300, 600], send)
    order = ["adaptive", "own", "static-3"]
    assert [name for name, _ in sent] == [*order, *order[1:], *order[:1], *order[2:], *order[:2], *order]
    assert [tokens for _, tokens in sent] == [300, 300, 300, 600, 600, 600] * 2
    assert sidecar.sent[:3] == [("active", None), ("shadow", None), ("pin", 3)]
    assert rounds.found == [{"adaptive": pytest.approx(120.0), "own": pytest.approx(100.0), "static-3": pytest.approx(80.0)}] * 2
    assert rounds.goodput() == pytest.approx({"adaptive": 120.0, "own": 100.0, "static-3": 80.0})
    figures = rounds.figures()
    assert figures["arm"] == ""
    assert figures["ratios"]["own"]["median"] == pytest.approx(1.2)
    assert figures["ratios"]["static-3"]["by_round"] == pytest.approx([1.5, 1.5])


def test_a_round_in_which_the_sidecar_was_restarted_is_repeated() -> None:
    sidecar = FakeSidecar()
    rounds, _ = _rounds(sidecar, ADAPTIVE, OWN)

    def restart(tokens: int) -> tuple[int, float]:
        sidecar.pid += 1
        return sidecar.serve(tokens)

    rounds.run([300], restart)
    assert (rounds.found, rounds.repeated, rounds.goodput()) == ([], 1, {})
    rounds.run([300], sidecar.serve)
    assert (len(rounds.found), rounds.repeated, rounds.round) == (1, 1, 2)


def test_a_sidecar_that_is_being_restarted_is_waited_for() -> None:
    sidecar, asked = FakeSidecar(), 0

    def find() -> FakeSidecar:
        nonlocal asked
        asked += 1
        sidecar.answers = asked > 1
        return sidecar.find()

    rounds = Rounds(find, (ADAPTIVE, OWN), threading.Event())
    rounds.run([300], sidecar.serve)
    assert len(rounds.found) == 1


def _then_stop(stopping: threading.Event, sidecar: FakeSidecar) -> Callable[[int], tuple[int, float]]:
    def send(tokens: int) -> tuple[int, float]:
        stopping.set()
        return sidecar.serve(tokens)

    return send


@pytest.mark.parametrize("arms", [(ADAPTIVE, OWN), (ADAPTIVE,)])
def test_a_stopped_round_does_not_count(arms: tuple[Arm, ...]) -> None:
    sidecar = FakeSidecar()
    rounds, stopping = _rounds(sidecar, *arms)
    rounds.run([300], _then_stop(stopping, sidecar))
    assert (rounds.found, rounds.repeated) == ([], 0)


def test_a_round_without_a_token_does_not_count() -> None:
    sidecar = FakeSidecar()
    rounds, _ = _rounds(sidecar, ADAPTIVE, OWN)
    rounds.run([300], lambda _: (0, 1.0))
    assert rounds.found == []


def test_ratios() -> None:
    found = ratios([{"adaptive": a, "own": 100.0} for a in (90.0, 110.0, 120.0, 130.0)])
    assert found["own"]["by_round"] == [0.9, 1.1, 1.2, 1.3]
    assert found["own"]["median"] == pytest.approx(1.15)
    assert found["own"]["quartiles"] == pytest.approx([1.05, 1.225])
    assert ratios([{"adaptive": 90.0, "own": 100.0}])["own"] == {"by_round": [0.9], "median": 0.9, "quartiles": [None, None]}
    assert ratios([]) == {}
