"""Restarting a child process when it ends, with exponential backoff; ending it with its parent."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from collections.abc import Callable

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """For `preexec_fn`: on Linux, send this process SIGTERM when its parent dies, for whatever reason."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def end(process: subprocess.Popen[bytes], patience_s: float = 10.0) -> None:
    """Stop a process: SIGTERM, and SIGKILL after patience_s seconds."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Supervisor:
    """Restarts one process. start: starts it. now_s: seconds on any monotonic clock.

    A process that ends is started again after 0.5 s. The delay doubles with every further end, up to 30 s, and returns to 0.5 s
    once a process has run for 30 s. A start that raises OSError counts as an end.
    """

    def __init__(self, start: Callable[[], subprocess.Popen[bytes]], now_s: float) -> None:
        self._start = start
        self._pause_s = FIRST_PAUSE_S
        self._died_s: float | None = None
        self._started_s = now_s
        self.restarts = 0
        self.process: subprocess.Popen[bytes] = start()

    def look(self, now_s: float) -> None:
        """Restart the process if it has ended and the delay is over."""
        if self._died_s is None:
            if self.process.poll() is None:
                if now_s - self._started_s > LONGEST_PAUSE_S:
                    self._pause_s = FIRST_PAUSE_S
                return
            self._died_s = now_s
        if now_s - self._died_s < self._pause_s:
            return
        self._pause_s = min(2.0 * self._pause_s, LONGEST_PAUSE_S)
        try:
            self.process = self._start()
        except OSError:
            self._died_s = now_s
            return
        self._died_s, self._started_s = None, now_s
        self.restarts += 1
