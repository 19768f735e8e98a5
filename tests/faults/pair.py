"""An engine process and a sidecar process, and what must hold of them after every fault."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from prometheus_client.parser import text_string_to_metric_families

from tests.support.counter_series import Series, accounted, counters_of, went_back
from tests.support.processes import SidecarProcess, wait_for


class Pair:
    """Both processes in one folder. `engine_steps_before`: of engines that have ended."""

    def __init__(self, folder: Path, *sidecar_arguments: str) -> None:
        self.folder, self.run, self.profiles = folder, folder / "run", folder / "profiles"
        self.state = folder / "engine-state.json"
        self.arguments = sidecar_arguments
        self.sidecar = SidecarProcess(self.run, self.profiles, *self.arguments)
        self.counters: Series = {}
        self.sidecar.wait_status(lambda status: True, "the sidecar to answer")
        self.engine = self._start_engine()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process in (self.engine, self.sidecar.process):
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait()

    def _start_engine(self) -> subprocess.Popen[bytes]:
        self.state.unlink(missing_ok=True)
        command = [sys.executable, "-m", "tests.faults.engine", "--runtime-dir", str(self.run), "--state", str(self.state)]
        with (self.folder / "engine.log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log)

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
        """Kill -9, and start another."""
        self.engine.kill()
        self.engine.wait()
        self.engine = self._start_engine()

    def kill_sidecar(self) -> None:
        self.sidecar.kill()

    def start_sidecar(self) -> None:
        self.sidecar = SidecarProcess(self.run, self.profiles, *self.arguments)

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

    def total(self, series: Series, prefix: str) -> float:
        return sum(value for (name, _), value in series.items() if name.startswith(prefix))

    def check(self) -> str:
        """Assert what must hold after a fault, once both have had the time to notice it; returns what was seen."""
        before = self.engine_state().get("steps", 0)
        # LOOK_STEPS is 64: by then the engine has looked at its files.
        state = self.wait_engine(lambda s: s["steps"] > before + 140 and not s["fallback"], "the engine to follow a policy again")
        assert state["hook_failures"] == 0
        self.sidecar.wait_status(lambda s: s["engine_attached"] and s["mode"] == "active", "the sidecar to be active")
        self.scrape()
        return f"{state['steps']} steps, {state['fallback_steps']} on the launch K"

    def account(self) -> tuple[int, int, int]:
        """Stop the steps until the sidecar has read all: (records written, learnt, dropped), and compare the output tokens."""
        pause = self.state.with_name(self.state.name + ".pause")
        pause.touch()
        try:
            state = self.wait_engine(lambda s: s["paused"], "the engine to pause")
            seen: list[float] = []

            def quiet() -> bool:
                seen.append(accounted(self.scrape()))
                # The view is made four times a second: alike for 30 looks is longer than that.
                return len(seen) > 30 and len(set(seen[-30:])) == 1

            wait_for(quiet, "the sidecar to have read every record")
            series = self.scrape()
            learnt = int(self.total(series, "adaptive_spec_observations_total"))
            dropped = int(self.total(series, "adaptive_spec_observations_dropped_total"))
            output = int(self.total(series, "adaptive_spec_output_tokens_total"))
            if dropped == 0 and learnt == state["records_written"]:
                assert output == state["output_tokens"], "every record as it was written"
            return state["records_written"], learnt, dropped
        finally:
            pause.unlink()


def damage(path: Path, how: str) -> None:
    """Damage a file in one of the ways of HOWS, in place where a process has it mapped."""
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
        with path.open("r+b") as file:  # the version stands behind the magic, in 4 bytes
            file.seek(8)
            file.write(b"\xff\xff\x00\x00")
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
    elif how == "mode 0000":
        path.chmod(0)
    else:
        raise ValueError(how)


HOWS = (
    "truncated", "zeroed", "bit-flipped", "of another version", "deleted", "replaced by a link", "replaced by a FIFO",
    "mode 0000",
)  # fmt: skip
