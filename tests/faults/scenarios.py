"""The faults. Each scenario works on a running pair, asserts what must hold, and returns what was seen, for the table."""

from __future__ import annotations

import contextlib
import os
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
from tests.support.counter_series import went_back
from tests.support.processes import wait_for


class Amounts(NamedTuple):
    """How often, how long: in CI, and in the run that the table of docs/reliability.md is from."""

    sidecar_kills: int
    engine_kills: int
    stop_s: float


CI = Amounts(3, 2, 6.0)
NIGHTLY = Amounts(100, 20, 40.0)
BY_RECORD = tuple(
    f"adaptive_spec_{name}"
    for name in ("observations", "output_tokens", "decode_steps", "draft_tokens", "verified_tokens", "accepted_tokens")
)
"""Counters that only depend on the records: these the ring gives again behind a checkpoint, without the counters page."""


DROPPED = "observations_dropped"


def harmless(how: str) -> bool:
    """Whether there is nothing to notice: root reads a file of any mode."""
    return how == "mode 0000" and os.geteuid() == 0


def live_files(pair: Pair, amounts: Amounts) -> str:
    """Files that both have open are damaged one after another."""
    before = pair.books()
    for how in HOWS:
        pair.mark()
        damage(pair.run / RING_NAME, how)
        pair.noticed("record ring in .*: was deleted or damaged, and is made again")
        pair.check()
        damage(pair.run / PAGE_NAME, how)
        pair.noticed("policy page in .*: was deleted or damaged, and is made again")
        damage(pair.run / ADDRESS_NAME, how)
        if not harmless(how):
            pair.noticed(f"{ADDRESS_NAME}: was deleted or damaged, and is made again")
        with contextlib.suppress(FileNotFoundError, FileExistsError):  # the engine replaces its report ten times a second
            damage(pair.run / REPORT_NAME, how)
        pair.check()
        wait_for(lambda: pair.metric("engine_state", state="attached") == 1.0, "the engine's report")
    return f"{pair.books().since(before)}; {pair.check()}"


def files_read_at_start(pair: Pair, amounts: Amounts) -> str:
    """Checkpoint and profile are damaged while no sidecar runs."""
    for how in HOWS:
        checkpoint = pair.run / CHECKPOINT_NAME
        wait_for(lambda: checkpoint.is_file() and len(_profile(pair)) == 3, "checkpoint and profile")  # noqa: B023 - at once
        pair.kill_sidecar()
        pair.mark()
        for path in (checkpoint, *_profile(pair)):
            damage(path, how)
        pair.start_sidecar()
        seen = pair.check()
        if harmless(how):
            assert pair.sidecar.status()["origin"] == "checkpoint"
        elif how == "deleted":
            assert pair.sidecar.status()["origin"] == "sweep"
        else:
            pair.noticed(f"checkpoint .*{CHECKPOINT_NAME} cannot be used: .*; set aside as")
            pair.noticed(r"profile .* cannot be used: .*; set aside as")
    return seen


def _profile(pair: Pair) -> list[Path]:
    folders = [path for path in pair.profiles.iterdir() if path.is_dir() and not path.is_symlink()]
    whole = [folder for folder in folders if not any(mark in folder.name for mark in (".damaged-", ".foreign-"))]
    return [path for folder in whole for path in folder.iterdir() if path.is_file()]


def counters_page(pair: Pair, amounts: Amounts) -> str:
    """The counters page is damaged while no sidecar runs: the checkpoint's continue, and the ring has what came after it."""
    before = pair.books()
    for how in HOWS:
        wait_for((pair.run / CHECKPOINT_NAME).is_file, "a checkpoint")
        pair.kill_sidecar()
        pair.mark()
        damage(pair.run / COUNTERS_NAME, how)
        shown = {series: value for series, value in pair.counters.items() if series[0].startswith(BY_RECORD)}
        pair.counters = {}
        pair.start_sidecar()
        seen = pair.check()
        found = pair.scrape()
        if pair.total(found, DROPPED) == pair.total(shown, DROPPED):  # else the ring had not all that came after the checkpoint
            assert went_back(shown, found) == []
        if how != "deleted" and not harmless(how):
            pair.noticed(f"{COUNTERS_NAME} cannot be used: .*; set aside as")
    return f"{pair.books().since(before)}; {seen}"


def sidecar_killed(pair: Pair, amounts: Amounts) -> str:
    """Kill -9 at random moments under load, every second one once it runs; then every record is accounted for."""
    choose, before = random.Random(12), pair.books()
    for number in range(amounts.sidecar_kills):
        if number % 2:  # on a busy machine the others come before it has begun
            pair.sidecar.wait_status(lambda status: status["mode"] == "active", "the sidecar to run again")
        time.sleep(choose.uniform(0.0, 1.5))  # the moment of the kill is what varies here
        with contextlib.suppress(OSError):
            pair.scrape()
        pair.kill_sidecar()
        pair.start_sidecar()
    seen = pair.check()
    return f"{pair.books().since(before)}; {seen}"


def engine_killed(pair: Pair, amounts: Amounts) -> str:
    before = pair.books()
    for _ in range(amounts.engine_kills):
        pair.mark()
        pair.kill_engine()
        pair.start_engine()
        seen = pair.check()
        pair.noticed(r"engine restarted \(pid \d+\), continuing with the same models")
    return f"{pair.books().since(before, same_engine=False)}; the last engine: {seen}"


def sidecar_stopped(pair: Pair, amounts: Amounts) -> str:
    """SIGSTOP: the engine takes its launch K when the heartbeat is too old, and the policy again afterwards."""
    before = pair.books()
    pair.sidecar.process.send_signal(signal.SIGSTOP)
    begun_s = time.monotonic()
    try:
        pair.wait_engine(lambda state: state["fallback"], "the engine to take its launch K")
        after_s = time.monotonic() - begun_s
        time.sleep(max(amounts.stop_s - after_s, 0.0))
    finally:
        pair.sidecar.process.send_signal(signal.SIGCONT)
    seen = pair.check()
    return f"launch K after {after_s:.1f} s (its bound here is {pair.max_age_s:g} s); {pair.books().since(before)}; {seen}"


def engine_stopped(pair: Pair, amounts: Amounts) -> str:
    before = pair.books()
    pair.engine.send_signal(signal.SIGSTOP)
    try:
        time.sleep(amounts.stop_s)
        status = pair.sidecar.status()
        assert status["mode"] == "active", status["reason"]
    finally:
        pair.engine.send_signal(signal.SIGCONT)
    seen = pair.check()
    return f"{pair.books().since(before)}; {seen}"


def sidecar_waits(pair: Pair, amounts: Amounts) -> str:
    """A sidecar is started before its engine, with something else in the ring's place."""
    for how in ("replaced by a link", "replaced by a FIFO", "replaced by a folder", "zeroed"):
        pair.kill_sidecar()
        pair.kill_engine()
        pair.mark()
        damage(pair.run / RING_NAME, how)
        pair.counters = {}  # nothing is shown before there is an engine
        pair.start_sidecar()
        pair.noticed(f"{RING_NAME}: .*; waiting for the engine to make it again")
        assert not pair.sidecar.status()["engine_attached"]
        pair.start_engine()
        seen = pair.check()
    return f"it waits, and says so; then the last engine: {seen}"


class Fault(NamedTuple):
    what: str
    expected: str
    run: Callable[[Pair, Amounts], str]


USUAL = "the engine goes on and raises nothing, follows a policy again, no counter goes back, all of /metrics is finite"
BOOKS = "learnt + dropped = written, and with nothing dropped the same tokens"
NAMED = "each is named in a log"
FAULTS = (
    Fault("files in use damaged", f"{USUAL}; {BOOKS}; {NAMED}", live_files),
    Fault("checkpoint and profile damaged, sidecar restarted", f"{USUAL}; {NAMED}", files_read_at_start),
    Fault("counters page damaged, sidecar restarted", f"{USUAL}, from the checkpoint on; {BOOKS}; {NAMED}", counters_page),
    Fault("something else in the ring's place, sidecar started first", f"it waits and says so; then: {USUAL}", sidecar_waits),
    Fault("SIGSTOP of the sidecar", f"launch K once the heartbeat is too old; then: {USUAL}; {BOOKS}", sidecar_stopped),
    Fault("SIGSTOP of the engine", f"the sidecar stays active; then: {USUAL}; {BOOKS}", engine_stopped),
    Fault("kill -9 of the engine", f"{USUAL}; learnt + dropped = written", engine_killed),
    Fault("kill -9 of the sidecar", f"{USUAL}; {BOOKS}", sidecar_killed),
)


def swept_pair(folder: Path, *sidecar_arguments: str, module: str = "adaptive_spec.cli", max_age_s: float = 5.0) -> Pair:
    """A pair after its sweep."""
    pair = Pair(folder, *sidecar_arguments, module=module, max_age_s=max_age_s)
    try:
        pair.sidecar.wait_status(lambda status: status["mode"] == "active", "the sweep to end")
        pair.check()
    except BaseException as error:
        pair.__exit__(type(error), error, None)
        raise
    return pair
