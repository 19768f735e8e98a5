"""Runs the commands as processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

PATIENCE_S = 180.0


def run_cli(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `adaptive-spec ARGUMENTS` to its end."""
    command = [sys.executable, "-m", "adaptive_spec.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, cwd=cwd, check=False)


def assert_one_line(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """Assert the result of bad input: exit status 2, no stdout, one line on stderr that contains all the words."""
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.endswith("\n")
    for word in words:
        assert word in result.stderr


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    """Return the first true value of the condition; fail after PATIENCE_S."""
    deadline_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline_s:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"timeout: waited for {what}")


class SidecarProcess:
    """A sidecar on a free port; killed at the end of the block if it still runs. module: whose main runs the command."""

    def __init__(self, runtime_dir: Path, profile_dir: Path, *arguments: str, module: str = "adaptive_spec.cli") -> None:
        self.runtime_dir = runtime_dir
        self.log = runtime_dir.parent / f"sidecar-{time.monotonic_ns()}.log"
        command = [sys.executable, "-m", module, "sidecar", "--runtime-dir", str(runtime_dir)]
        command += ["--profile-dir", str(profile_dir), "--port", "0", *arguments]
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    @property
    def url(self) -> str:
        def address() -> Any:
            assert self.process.poll() is None, self.log.read_text()
            try:
                found = json.loads((self.runtime_dir / "sidecar.json").read_bytes())
            except (OSError, ValueError):
                return None
            return found["url"] if found["pid"] == self.process.pid else None

        return str(wait_for(address, "the sidecar to serve"))

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            return str(answer.read().decode())

    def status(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.get("/status.json"))
        return document

    def wait_status(self, condition: Callable[[dict[str, Any]], Any], what: str) -> dict[str, Any]:
        """The first status for which the condition holds."""

        def look() -> dict[str, Any] | None:
            status = self.status()
            return status if condition(status) else None

        found: dict[str, Any] = wait_for(look, what)
        return found

    def stop(self) -> str:
        """SIGTERM; returns the log of a sidecar that ended well."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(PATIENCE_S) == 0, self.log.read_text()
        return self.log.read_text()

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()
