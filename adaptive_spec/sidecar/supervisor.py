"""Keeping a process alive: started again when it has died, with growing pauses while it does not live long."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from collections.abc import Callable

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """In a child, before its program: ask Linux for a SIGTERM when the parent dies, however it dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def end(process: subprocess.Popen[bytes], patience_s: float = 10.0) -> None:
    """Stop a process, gently at first."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Supervisor:
    """Looks after one process. start: starts it. now_s: seconds on any steadily rising clock.

    A process that dies is started again after 0.5 s, and twice as long after each further death, up to 30 s; one that has lived
    for 30 s begins anew. A start that raises OSError counts as a death.
    """

    def __init__(self, start: Callable[[], subprocess.Popen[bytes]], now_s: float) -> None:
        self._start = start
        self._pause_s = FIRST_PAUSE_S
        self._died_s: float | None = None
        self._started_s = now_s
        self.restarts = 0
        self.process: subprocess.Popen[bytes] = start()

    def look(self, now_s: float) -> None:
        """Restart the process if it is dead and has been for long enough."""
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
