"""Whether the process at the other end is running."""

from __future__ import annotations

import os


def process_alive(pid: int) -> bool:
    """Return False when this host has no process `pid`. True also where that cannot be told. Raises nothing.

    A process in another PID namespace has another number there: the caller must not rely on this alone.
    """
    if pid <= 0:  # kill(2) takes these for process groups
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    return True
