"""`adaptive-spec sweep`: start a sweep in a running sidecar and watch it to its end."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from adaptive_spec.client.sidecar import ControlClient
from adaptive_spec.domain.policy import Mode
from adaptive_spec.errors import BadInput

POLL_S = 0.25


def watch_sweep(client: ControlClient, timeout_s: float) -> None:
    """Show a progress bar until the sweep is over. Raises BadInput: no sidecar, refused, an engine that runs no trials, or
    no end in time."""
    client.send("resweep")
    deadline_s = time.monotonic() + timeout_s
    columns = (
        TextColumn("sweep"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%  {task.fields[steps]} steps"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("sweep", total=1.0, steps=0)
        while True:
            status = client.status()
            sweep = status.get("sweep") or {"progress": 0.0, "steps": 0}
            if status["mode"] == Mode.SHADOW:
                raise BadInput(f"sweep: not possible: {status['reason']}")
            over = status["mode"] != Mode.SWEEP
            progress.update(task, completed=1.0 if over else sweep["progress"], steps=sweep["steps"])
            if over:
                break
            if time.monotonic() > deadline_s:
                raise BadInput(f"--timeout: {timeout_s:g} is not enough: the sweep goes on in the sidecar; must be longer")
            time.sleep(POLL_S)
    boundaries = ", ".join(map(str, status["boundaries"])) or "none"
    Console().print(f"sweep over: {sweep['steps']} steps, tile boundaries {boundaries}", highlight=False)
