"""What a million switches of K leave behind in a real SGLang server on the CPU kit: memory, log, and the time of /server_info.

    python -m benchmarks.sglang_switches [--switches 1000000] [--alone 100000]

A million decode steps would take hours, so the switches are made at idle: a hook of this module in SGLang's scheduler process
lets SGLang's own AdaptiveController activate its captured states in turn, between two /server_info. That is the same code as in
a decode step: `apply_runtime_state`, its log line, its entry in the list of configuration changes. Two servers, one after the
other: with the plugin in mode active, and SGLang alone, with fewer switches.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import statistics
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from adaptive_spec.engines.sglang.cpu_kit import CpuKit

FOLDER_VARIABLE = "SGLANG_SWITCHES_FOLDER"
START_TIMEOUT_S = 900.0
SWITCHES_PER_REQUEST = 20_000
READS = 5
"""Times that /server_info is timed at each point."""
POINTS = 5


# -- in the scheduler process --------------------------------------------------------------------------------------------


def register() -> None:
    """Entry point of SGLang's plugins: hooks what answers /server_info in the scheduler process."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    path = "sglang.srt.managers.scheduler_components.internal_state.SchedulerInternalStateController.get_internal_state"
    HookRegistry.register(path, _switch_then_answer, HookType.AROUND)


def _switch_then_answer(original: Callable[..., Any], state: Any, request: Any) -> Any:
    folder = Path(os.environ[FOLDER_VARIABLE])
    if (folder / "order").exists():
        _switch(state.scheduler.draft_worker, int((folder / "order").read_text()), folder)
        (folder / "order").unlink()
    return original(state, request)


def _switch(worker: Any, count: int, folder: Path) -> None:
    from sglang.srt.runtime_context import get_context

    controller = worker.adaptive_controller
    turns = itertools.cycle(sorted(controller._states))
    began_s, done = time.perf_counter(), 0
    while done < count:
        k = next(turns)
        if k != worker.speculative_num_steps:
            controller._activate(k)
            done += 1
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    result = {
        "us_per_switch": 1e6 * (time.perf_counter() - began_s) / count,
        "resident_mb": resident / 1e6,
        "entries": len(get_context()._overrides_log),
        "k": worker.speculative_num_steps,
    }
    (folder / "result").write_text(json.dumps(result))


# -- beside the server ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _server(folder: Path, mode: str) -> Iterator[str]:
    """Start a server with SGLang's default adaptive configuration; its address."""
    kit = CpuKit()
    kit.install()
    info = folder / "site" / "sglang_switches-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang_switches\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[sglang.srt.plugins]\nsglang_switches = benchmarks.sglang_switches:register\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = int(taken.getsockname()[1])
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ADAPTIVE_SPEC_") or k.endswith(("_HOME", "_KIT"))}
    environment |= {"PYTHONPATH": str(info.parent), FOLDER_VARIABLE: str(folder)}
    environment |= {"ADAPTIVE_SPEC_MODE": mode, "ADAPTIVE_SPEC_RUNTIME_DIR": str(folder / "run")}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            kit.command("python", "-m", "sglang.launch_server", *kit.server_flags(port, adaptive="")),
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=environment,
        )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while True:
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise click.ClickException(f"the server did not start:\n{(folder / 'log').read_text(errors='replace')[-3000:]}")
            with contextlib.suppress(OSError):
                _get(url + "/health", 5.0)
                break
            time.sleep(1.0)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _get(url: str, timeout_s: float) -> bytes:
    with urllib.request.urlopen(url, timeout=timeout_s) as answer:
        data: bytes = answer.read()
        return data


def _info_s(url: str) -> tuple[float, int]:
    """Median seconds of /server_info, and the K that it says is in use."""
    seconds = []
    for _ in range(READS):
        began_s = time.perf_counter()
        answer = _get(url + "/server_info", 300.0)
        seconds.append(time.perf_counter() - began_s)
    return statistics.median(seconds), int(json.loads(answer)["internal_states"][0]["speculative_num_steps"])


def _run(mode: str, switches: int) -> None:
    with tempfile.TemporaryDirectory() as name, _server(Path(name), mode) as url:
        folder = Path(name)
        click.echo(f"{'with the plugin' if mode == 'active' else 'SGLang alone'}, /server_info before: {_info_s(url)[0]:.4f} s")
        click.echo("switches  us each  resident MB  entries  log kB  /server_info s")
        done, next_point = 0, 0
        while done < switches:
            count = min(SWITCHES_PER_REQUEST, switches - done)
            (folder / "order").write_text(str(count))
            _get(url + "/server_info", 600.0)
            done += count
            if done < next_point and done < switches:
                continue
            next_point += switches // POINTS
            result = json.loads((folder / "result").read_text())
            seconds, k = _info_s(url)
            if k != result["k"]:
                raise click.ClickException(f"/server_info says K {k}, the worker runs {result['k']}")
            log_kb = (folder / "log").stat().st_size / 1e3
            click.echo(
                f"{done:8d} {result['us_per_switch']:8.1f} {result['resident_mb']:12.1f} {result['entries']:8d} {log_kb:7.0f} "
                f"{seconds:15.4f}"
            )


@click.command()
@click.option("--switches", default=1_000_000, help="With the plugin.")
@click.option("--alone", default=100_000, help="Without it; 0 for none.")
def main(switches: int, alone: int) -> None:
    """Measure what switches of K leave behind."""
    _run("active", switches)
    if alone:
        _run("off", alone)


if __name__ == "__main__":
    main()
