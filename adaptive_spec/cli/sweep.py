"""`adaptive-spec sweep`: starts a sweep in a running sidecar and shows its progress until it ends."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from adaptive_spec.client.sidecar import ControlClient
from adaptive_spec.domain.policy import Mode
from adaptive_spec.errors import BadInput

POLL_S = 0.25


def watch_sweep(client: ControlClient, timeout_s: float) -> None:
    """Start a sweep and show a progress bar until it is over.

    Raises BadInput when no sidecar answers or it refuses, when the engine is observe-only, and after timeout_s seconds.
    """
    client.send("resweep")
    deadline_s = time.monotonic() + timeout_s
    columns = (
        TextColumn("sweep"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%  {task.fields[steps]} steps"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True, markup=False, emoji=False)) as progress:
        task = progress.add_task("sweep", total=1.0, steps=0)
        while True:
            status = client.status()
            sweep = status.get("sweep") or {"progress": 0.0, "steps": 0}
            if status["mode"] == Mode.SHADOW:
                raise BadInput(f"sweep: cannot run: {status['reason']}")
            finished = status["mode"] != Mode.SWEEP
            progress.update(task, completed=1.0 if finished else sweep["progress"], steps=sweep["steps"])
            if finished:
                break
            if time.monotonic() > deadline_s:
                raise BadInput(f"--timeout: the sweep did not end within {timeout_s:g} s; it continues in the sidecar")
            time.sleep(POLL_S)
    boundaries = ", ".join(map(str, status["boundaries"])) or "none"
    Console(markup=False, emoji=False).print(
        f"sweep finished: {sweep['steps']} steps, tile boundaries {boundaries}", highlight=False
    )
