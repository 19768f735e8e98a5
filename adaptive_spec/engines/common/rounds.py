"""Alternating rounds of a demonstration: each way of choosing K gets the same prompts, on one server, by commands to the sidecar.

A round has several phases of traffic. In each, all arms get the phase's prompts one after another, so that what else the machine
does meanwhile meets all arms alike; which arm is first, and has to follow the change of traffic, rotates from phase to phase. A
rate is output tokens of the round over wall time at the client, prefills and HTTP included. A round in which the sidecar was
restarted is not counted.
"""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from adaptive_spec.errors import BadInput

ADAPTIVE = "adaptive"
SIDECAR_TIMEOUT_S = 60.0
"""A killed sidecar is started again by the demonstration, with growing delays."""


class Arm(NamedTuple):
    """A way of choosing K. command, k: what makes the sidecar choose so."""

    name: str
    command: str
    k: int | None = None

    @classmethod
    def fixed(cls, k: int) -> Arm:
        return cls(f"static-{k}", "pin", k)


Phase = TypeVar("Phase")
"""A stretch of traffic; the same prompts every time it is sent."""


class Sidecar(Protocol):
    """A client of the sidecar: `client.sidecar.ControlClient`."""

    def status(self) -> dict[str, Any]: ...

    def send(self, command: str, k: int | None = None) -> dict[str, Any]: ...


class SidecarGoneError(Exception):
    """No sidecar, or another one than before."""


class Rounds:
    """Counted rounds, and the one that runs.

    sidecar: returns a client of the sidecar that runs now; raises BadInput when none does. found: tokens per second of each arm,
    by counted round. round, arm: what runs now; arm "" between rounds. repeated: rounds not counted because the sidecar was
    restarted.
    """

    def __init__(self, sidecar: Callable[[], Sidecar], arms: Sequence[Arm], stopping: threading.Event) -> None:
        self._sidecar, self.arms, self._stopping = sidecar, tuple(arms), stopping
        self.found: list[dict[str, float]] = []
        self._totals: dict[str, list[float]] = {arm.name: [0.0, 0.0] for arm in self.arms}
        self.round, self.arm, self.repeated, self._phases = 0, "", 0, 0

    def run(self, phases: Sequence[Phase], send: Callable[[Phase], tuple[int, float]]) -> None:
        """Run one round: all phases on every arm. Counts nothing when it is stopped meanwhile.

        send: sends a phase's prompts, returns the number of tokens received and the seconds until the last one.
        """
        self.round += 1
        totals = {arm.name: [0.0, 0.0] for arm in self.arms}
        pids: set[int | None] = set()
        try:
            for phase in phases:
                first = self._phases % len(self.arms)
                self._phases += 1
                for arm in self.arms[first:] + self.arms[:first]:
                    pids.add(self._choose(arm))
                    self.arm = arm.name
                    received, seconds = send(phase)
                    totals[arm.name][0] += received
                    totals[arm.name][1] += seconds
                    if self._stopping.is_set():
                        return
                    pids.add(self._pid())
                if len(pids) > 1:
                    raise SidecarGoneError
        except SidecarGoneError:
            self.repeated += not self._stopping.is_set()
            return
        finally:
            self.arm = ""
        if self._stopping.is_set() or not all(tokens for tokens, _ in totals.values()):
            return
        for name, (tokens, seconds) in totals.items():
            self._totals[name][0] += tokens
            self._totals[name][1] += seconds
        self.found.append({arm.name: totals[arm.name][0] / totals[arm.name][1] for arm in self.arms})

    def release(self) -> None:
        """Let the sidecar decide again."""
        with contextlib.suppress(BadInput):
            self._sidecar().send("active")

    def goodput(self) -> dict[str, float]:
        """Tokens per second of each arm over all counted rounds; empty before the first."""
        return {name: tokens / seconds for name, (tokens, seconds) in self._totals.items()} if self.found else {}

    def figures(self) -> dict[str, Any]:
        return {
            "round": self.round, "arm": self.arm, "rounds": list(self.found), "rounds_repeated": self.repeated,
            "ratios": ratios(self.found), "compare": self.goodput(), "compare_blocks": len(self.found),
        }  # fmt: skip

    def _choose(self, arm: Arm) -> int:
        """Give the arm's command, to a sidecar that answers; its process id. Raises SidecarGoneError if none does.

        The server is idle meanwhile, so its next step follows the policy that the command made.
        """
        deadline_s = time.monotonic() + SIDECAR_TIMEOUT_S
        while not self._stopping.is_set() and time.monotonic() < deadline_s:
            with contextlib.suppress(BadInput):
                client = self._sidecar()
                client.send(arm.command, arm.k)
                return int(client.status()["sidecar_pid"])
            self._stopping.wait(0.25)
        raise SidecarGoneError

    def _pid(self) -> int | None:
        with contextlib.suppress(BadInput):
            return int(self._sidecar().status()["sidecar_pid"])
        return None


def ratios(rounds: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Adaptive over each other arm: by round, with median and quartiles (null for a single round)."""
    found: dict[str, dict[str, Any]] = {}
    for name in rounds[0] if rounds else ():
        if name == ADAPTIVE:
            continue
        by_round = [one[ADAPTIVE] / one[name] for one in rounds]
        low, median, high = statistics.quantiles(by_round, method="inclusive") if len(by_round) > 1 else (None, by_round[0], None)
        found[name] = {"by_round": by_round, "median": median, "quartiles": [low, high]}
    return found
