"""An engine process and a sidecar process, and what must hold of them after every fault."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from adaptive_spec.engine_side.tap import RING_NAME
from adaptive_spec.wire.ring import RingReader
from tests.faults.marks import RecordsWatch
from tests.support.counter_series import Series, accounted, counters_of, went_back
from tests.support.processes import SidecarProcess, wait_for

TOKENS = ("output_tokens", "verified_tokens", "accepted_tokens")
STEADY_LOOKS = 30
"""Looks, 20 ms apart, in which nothing changes when all is read: the view is made four times a second."""


class Books(NamedTuple):
    """written: records, by the engines' own count. learnt, dropped: by /metrics. engine_tokens, sidecar_tokens: see TOKENS."""

    written: int
    learnt: int
    dropped: int
    engine_tokens: tuple[int, ...]
    sidecar_tokens: tuple[int, ...]

    def since(self, before: Books, *, same_engine: bool = True) -> str:
        """Assert that everything written since is accounted for, token by token where nothing was dropped; says what was.

        same_engine: False: its tokens are not known.
        """
        written, learnt, dropped = (now - then for now, then in zip(self[:3], before[:3], strict=True))
        assert learnt + dropped == written, (before, self)
        said = f"{written:,} records written, {learnt:,} learnt, {dropped:,} counted as dropped"
        engine, sidecar = (
            [now - then for now, then in zip(a, b, strict=True)]
            for a, b in ((self.engine_tokens, before.engine_tokens), (self.sidecar_tokens, before.sidecar_tokens))
        )
        if not same_engine:
            return said
        if dropped:
            assert all(s <= e for s, e in zip(sidecar, engine, strict=True)), (before, self)
            return said
        assert sidecar == engine, (before, self)
        return f"{said}; output, verified and accepted tokens equal"


class Pair:
    """Both processes in one folder, and a reader that checks every record.

    max_age_s: of the heartbeat; 30 s outside of tests, here so short that a test need not wait for the launch K.
    """

    def __init__(
        self, folder: Path, *sidecar_arguments: str, module: str = "adaptive_spec.cli", max_age_s: float = 5.0
    ) -> None:  # fmt: skip
        self.folder, self.run, self.profiles = folder, folder / "run", folder / "profiles"
        self.state = folder / "engine-state.json"
        self.arguments, self.module, self.max_age_s = sidecar_arguments, module, max_age_s
        self.counters: Series = {}
        self._written_before = self._in_earlier_rings = 0
        self._marks: dict[Path, int] = {}
        self.start_sidecar()
        self.sidecar.wait_status(lambda status: True, "the sidecar to answer")
        self.start_engine()
        self.watch = RecordsWatch(self.run)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.watch.end()
        for process in (self.engine, self.sidecar.process):
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait()
        if error is None:
            assert self.watch.read > 0
            assert self.watch.not_as_written == 0, f"of {self.watch.read} records"
            assert "Traceback" not in "".join(path.read_text() for path in self._logs())

    # -- the processes -------------------------------------------------------------------------------------------------

    def engine_state(self) -> dict[str, Any]:
        """What the engine says of itself; it must run."""
        assert self.engine.poll() is None, (self.folder / "engine.log").read_text()
        try:
            state: dict[str, Any] = json.loads(self.state.read_bytes())
        except FileNotFoundError:
            return {}
        return state

    def wait_engine(self, condition: Callable[[dict[str, Any]], Any], what: str) -> dict[str, Any]:
        """The engine's first state for which the condition holds."""

        def look() -> dict[str, Any] | None:
            state = self.engine_state()
            return state if state and condition(state) else None

        found: dict[str, Any] = wait_for(look, what)
        return found

    def kill_engine(self) -> None:
        """Kill -9. What it wrote is counted by its ring; where it made the ring again, as of the last `books`."""
        self.engine.kill()
        self.engine.wait()
        self._written_before += self._in_earlier_rings + self._cursor()
        self._in_earlier_rings = 0
        self.state.unlink(missing_ok=True)

    def _cursor(self) -> int:
        with RingReader.open(self.run / RING_NAME) as ring:
            return ring.cursor

    def start_engine(self) -> None:
        command = [sys.executable, "-m", "tests.faults.engine", "--runtime-dir", str(self.run), "--state", str(self.state)]
        command += ["--max-age", str(self.max_age_s)]
        with (self.folder / "engine.log").open("ab") as log:
            self.engine = subprocess.Popen(command, stdout=log, stderr=log)

    def kill_sidecar(self) -> None:
        self.sidecar.kill()

    def start_sidecar(self) -> None:
        self.sidecar = SidecarProcess(self.run, self.profiles, *self.arguments, module=self.module)

    # -- what they say -------------------------------------------------------------------------------------------------

    def _logs(self) -> list[Path]:
        return [self.folder / "engine.log", *self.folder.glob("sidecar-*.log")]

    def mark(self) -> None:
        """From here on, `noticed` looks."""
        self._marks = {path: path.stat().st_size for path in self._logs()}

    def noticed(self, words: str) -> None:
        """Wait until a log of either process has a line with these words, since `mark`. words: a regular expression."""

        def found() -> bool:
            return any(re.search(words, path.read_text()[self._marks.get(path, 0) :]) for path in self._logs())

        wait_for(found, f"a log to say {words!r}")

    def scrape(self) -> Series:
        """/metrics: every value is finite, no counter is less than in any scrape before."""
        page = self.sidecar.get("/metrics")
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                assert math.isfinite(sample.value), f"{sample.name} {sample.labels} is {sample.value}"
        found = counters_of(page)
        assert went_back(self.counters, found) == []
        self.counters |= found
        return found

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels, 0 where there is none."""
        return sum(
            sample.value
            for family in text_string_to_metric_families(self.sidecar.get("/metrics"))
            for sample in family.samples
            if sample.name == f"adaptive_spec_{name}" and labels.items() <= sample.labels.items()
        )

    def total(self, series: Series, name: str) -> int:
        return int(sum(value for (found, _), value in series.items() if found == f"adaptive_spec_{name}_total"))

    # -- what must hold ------------------------------------------------------------------------------------------------

    def check(self) -> str:
        """Assert what must hold after a fault, once both have had the time to notice it; returns what was seen."""
        before = self.engine_state().get("steps", 0)
        # LOOK_STEPS is 64: by then the engine has looked at its files.
        state = self.wait_engine(lambda s: s["steps"] > before + 140 and not s["fallback"], "the engine to follow a policy again")
        assert state["hook_failures"] == 0
        self.sidecar.wait_status(lambda s: s["engine_attached"] and s["mode"] == "active", "the sidecar to be active")
        self.scrape()
        return f"{state['steps']:,} steps, {state['fallback_steps']:,} on the launch K"

    def books(self) -> Books:
        """Stop the steps until the sidecar has read all, and count."""
        pause = self.state.with_name(self.state.name + ".pause")
        pause.touch()
        try:
            state = self.wait_engine(lambda s: s["paused"], "the engine to pause")
            seen: list[float] = []

            def quiet() -> bool:
                seen.append(accounted(self.scrape()))
                return seen[-1] > 0 and len(seen) > STEADY_LOOKS and len(set(seen[-STEADY_LOOKS:])) == 1

            wait_for(quiet, "the sidecar to have read every record")
            series = self.scrape()
            self._in_earlier_rings = state["records_written"] - self._cursor()
            return Books(
                self._written_before + state["records_written"],
                self.total(series, "observations"),
                self.total(series, "observations_dropped"),
                tuple(state[name] for name in TOKENS),
                tuple(self.total(series, name) for name in TOKENS),
            )
        finally:
            pause.unlink()
            self.wait_engine(lambda s: not s["paused"], "the engine to go on")


def damage(path: Path, how: str) -> None:
    """Damage a file in one of the ways of HOWS, in place where a process has it open."""
    data = path.read_bytes()
    if how == "truncated":
        os.truncate(path, len(data) // 2)
    elif how == "zeroed":
        with path.open("r+b") as file:
            file.write(bytes(len(data)))
    elif how == "bit-flipped":
        with path.open("r+b") as file:
            file.write(bytes([data[0] ^ 1]) + data[1:64])
    elif how == "of another version":
        _of_another_version(path)
    elif how == "deleted":
        path.unlink()
    elif how == "replaced by a link":
        elsewhere = path.parent.parent / f"elsewhere-{path.name}"
        shutil.copy2(path, elsewhere)
        path.unlink()
        path.symlink_to(elsewhere)
    elif how == "replaced by a FIFO":
        path.unlink()
        os.mkfifo(path, 0o600)
    elif how == "replaced by a folder":
        path.unlink()
        path.mkdir(0o700)
    elif how == "mode 0000":
        path.chmod(0)
    else:
        raise ValueError(how)


def _of_another_version(path: Path) -> None:
    if path.suffix == ".npz":
        with np.load(path) as archive:
            entries = dict(archive)
        header = json.loads(entries["header"].tobytes())
        entries["header"] = np.frombuffer(json.dumps(header | {"version": 99}).encode(), np.uint8)
        np.savez(path, **entries)
    elif path.name == "policy.json":
        path.write_text(json.dumps(json.loads(path.read_bytes()) | {"format_version": 99}))
    else:
        with path.open("r+b") as file:  # behind the magic, in 4 bytes
            file.seek(8)
            file.write(b"\xff\xff\x00\x00")


HOWS = (
    "truncated", "zeroed", "bit-flipped", "of another version", "deleted", "replaced by a link", "replaced by a FIFO",
    "replaced by a folder", "mode 0000",
)  # fmt: skip
