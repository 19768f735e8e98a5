"""The faults. Each scenario works on a running pair, asserts what must hold, and returns what was seen, for the table."""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from adaptive_spec.client.sidecar import ADDRESS_NAME
from adaptive_spec.engine_side.tap import PAGE_NAME, RING_NAME
from adaptive_spec.sidecar.counters_page import COUNTERS_NAME
from adaptive_spec.sidecar.own_files import CHECKPOINT_NAME
from adaptive_spec.wire.engine_report import REPORT_NAME
from tests.faults.pair import HOWS, Pair, damage


class Amounts(NamedTuple):
    """How often, how long: in CI, and in the run that the table of docs/reliability.md is from."""

    sidecar_kills: int
    engine_kills: int
    stop_s: float


CI = Amounts(3, 2, 2.0)
NIGHTLY = Amounts(100, 20, 40.0)


def live_files(pair: Pair, amounts: Amounts) -> str:
    """Files that both have open are damaged one after another."""
    for how in HOWS:
        damage(pair.run / RING_NAME, how)
        pair.check()
        for name in (PAGE_NAME, ADDRESS_NAME, REPORT_NAME):
            with contextlib.suppress(FileNotFoundError):  # the engine replaces its report ten times a second
                damage(pair.run / name, how)
        seen = pair.check()
    return f"{len(HOWS)} kinds of damage to {RING_NAME}, {PAGE_NAME}, {ADDRESS_NAME}, {REPORT_NAME}: {seen}"


def files_read_at_start(pair: Pair, amounts: Amounts) -> str:
    """Checkpoint and profile are damaged while no sidecar runs."""
    for how in HOWS:
        pair.kill_sidecar()
        profiles = [path for path in pair.profiles.rglob("*.npz") if path.is_file()]
        for path in (pair.run / CHECKPOINT_NAME, *profiles):
            if path.is_file() and not path.is_symlink():
                damage(path, how)
        pair.start_sidecar()
        seen = pair.check()
    return f"{len(HOWS)} kinds of damage to {CHECKPOINT_NAME} and the profile: {seen}"


def counters_page(pair: Pair, amounts: Amounts) -> str:
    """The counters page is damaged while no sidecar runs: the counters of the checkpoint continue, which may be less."""
    for how in HOWS:
        pair.kill_sidecar()
        damage(pair.run / COUNTERS_NAME, how)
        pair.counters.clear()
        pair.start_sidecar()
        seen = pair.check()
    return f"{len(HOWS)} kinds of damage to {COUNTERS_NAME}: {seen}"


def sidecar_killed(pair: Pair, amounts: Amounts) -> str:
    """Kill -9 at random moments under load; then every record is accounted for."""
    choose = random.Random(12)
    for _ in range(amounts.sidecar_kills):
        time.sleep(choose.uniform(0.0, 1.5))  # the moment of the kill is what varies here
        with contextlib.suppress(OSError):
            pair.scrape()
        pair.kill_sidecar()
        pair.start_sidecar()
    pair.check()
    written, learnt, dropped = pair.account()
    assert learnt + dropped == written
    return f"{amounts.sidecar_kills} kills: {written} records written, {learnt} learnt, {dropped} counted as dropped"


def engine_killed(pair: Pair, amounts: Amounts) -> str:
    for _ in range(amounts.engine_kills):
        pair.kill_engine()
        seen = pair.check()
    return f"{amounts.engine_kills} kills; the last engine: {seen}"


def sidecar_stopped(pair: Pair, amounts: Amounts) -> str:
    """SIGSTOP: the engine takes its launch K when the heartbeat is too old, and the policy again afterwards."""
    pair.sidecar.process.send_signal(signal.SIGSTOP)
    begun_s = time.monotonic()
    try:
        pair.wait_engine(lambda state: state["fallback"], "the engine to take its launch K")
        after_s = time.monotonic() - begun_s
        time.sleep(max(amounts.stop_s - after_s, 0.0))
    finally:
        pair.sidecar.process.send_signal(signal.SIGCONT)
    seen = pair.check()
    return f"{amounts.stop_s:g} s: launch K after {after_s:.1f} s (its bound here is 1 s), the policy again afterwards; {seen}"


def engine_stopped(pair: Pair, amounts: Amounts) -> str:
    pair.engine.send_signal(signal.SIGSTOP)
    try:
        time.sleep(amounts.stop_s)
        status = pair.sidecar.status()
        assert status["mode"] == "active", status["reason"]
    finally:
        pair.engine.send_signal(signal.SIGCONT)
    return f"{amounts.stop_s:g} s: the sidecar stays {status['mode']}; {pair.check()}"


class Fault(NamedTuple):
    what: str
    expected: str
    run: Callable[[Pair, Amounts], str]


USUAL = "the engine goes on and raises nothing, follows a policy again, no counter goes back, all of /metrics is finite"
# sidecar_killed is first: only there every record since the start can be accounted for.
FAULTS = (
    Fault("kill -9 of the sidecar", f"{USUAL}; learnt + dropped = written", sidecar_killed),
    Fault("SIGSTOP of the sidecar", f"launch K once the heartbeat is too old; then: {USUAL}", sidecar_stopped),
    Fault("SIGSTOP of the engine", f"the sidecar stays active; then: {USUAL}", engine_stopped),
    Fault("files in use damaged", USUAL, live_files),
    Fault("kill -9 of the engine", USUAL, engine_killed),
    Fault("checkpoint and profile damaged, sidecar restarted", USUAL, files_read_at_start),
    Fault("counters page damaged, sidecar restarted", f"{USUAL}, from the counters of the checkpoint on", counters_page),
)


def swept_pair(folder: Path) -> Pair:
    pair = Pair(folder)
    try:
        pair.sidecar.wait_status(lambda status: status["mode"] == "active", "the sweep to end")
        pair.check()
    except BaseException:
        pair.__exit__(None, None, None)
        raise
    return pair
