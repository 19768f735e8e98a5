"""`make stack`: the demo, Prometheus and Alertmanager as plain processes on loopback, with the configuration that is shipped.

Only addresses differ from what is shipped, where a port is asked for. It ends, and all it started with it, on Ctrl-C, on SIGTERM
or after --duration, and before that when one of the three dies. Data and logs lie in a folder that is removed at the end.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import click
import yaml

from adaptive_spec.errors import BadInput
from adaptive_spec.sidecar.supervisor import end_with_parent

SHIPPED = Path(__file__).parent / "prometheus"
READY_S = 60.0
LOOK_S = 0.25
PROGRAMS = {"prometheus": ("prometheus",), "alertmanager": ("prometheus-alertmanager", "alertmanager")}


def find_programs() -> dict[str, str]:
    """Paths of Prometheus and Alertmanager. Raises BadInput when one is not installed."""
    found = {name: next(filter(None, map(shutil.which, names)), None) for name, names in PROGRAMS.items()}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        raise BadInput(
            f"stack: {' and '.join(missing)} cannot be found: install them (Debian: prometheus, prometheus-alertmanager) "
            "or put them on PATH"
        )
    return {name: str(path) for name, path in found.items()}


def configure(folder: Path, sidecar_port: int, alertmanager_port: int) -> None:
    """Copy the shipped configuration into the folder, with these ports in it."""
    shutil.copytree(SHIPPED / "rules", folder / "rules")
    shutil.copy(SHIPPED / "alertmanager.yml", folder)
    config: dict[str, Any] = yaml.safe_load((SHIPPED / "prometheus.yml").read_text())
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{sidecar_port}"]
    config["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{alertmanager_port}"]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))


def commands(programs: dict[str, str], folder: Path, ports: dict[str, int], demo: Sequence[str]) -> dict[str, list[str]]:
    """What is started, by name."""
    return {
        "demo": [sys.executable, "-m", "adaptive_spec.cli", "demo", "--port", str(ports["demo"]), *demo],
        "alertmanager": [
            programs["alertmanager"], f"--config.file={folder / 'alertmanager.yml'}", f"--storage.path={folder / 'alerts'}",
            f"--web.listen-address=127.0.0.1:{ports['alertmanager']}", "--cluster.listen-address=",
        ],
        "prometheus": [
            programs["prometheus"], f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{ports['prometheus']}",
        ],
    }  # fmt: skip


class Stack:
    """The running processes. folder: their data and logs."""

    def __init__(self, folder: Path, ports: dict[str, int], demo: Sequence[str] = ()) -> None:
        self.folder, self.ports = folder, ports
        configure(folder, ports["demo"], ports["alertmanager"])
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        for name, command in commands(find_programs(), folder, ports, demo).items():
            with (folder / f"{name}.log").open("wb") as output:
                self._processes[name] = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
                    preexec_fn=end_with_parent,
                )  # fmt: skip

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.ports[name]}"

    def dead(self) -> str | None:
        """Name and last words of a process that has ended, None while all live."""
        for name, process in self._processes.items():
            if process.poll() is not None:
                return f"{name} ended with status {process.returncode}: {_last_line(self.folder / f'{name}.log')}"
        return None

    def ready(self) -> bool:
        """Whether all three answer, and Prometheus has scraped the sidecar."""
        try:
            for name, path in (("demo", "/healthz"), ("alertmanager", "/-/ready"), ("prometheus", "/-/ready")):
                _get(self.url(name) + path)
            targets = json.loads(_get(self.url("prometheus") + "/api/v1/targets"))["data"]["activeTargets"]
            return bool(targets) and all(target["health"] == "up" for target in targets)
        except OSError:
            return False

    def end(self) -> None:
        """Stop all of it, gently at first."""
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            try:
                process.wait(15.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=2.0) as answer:
        return bytes(answer.read())


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def _check_ports(ports: dict[str, int]) -> None:
    for name, port in ports.items():
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError as error:
            raise BadInput(f"--{name}-port: {port} is not allowed: {error.strerror}; must be free") from error


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    stopping: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        stopping.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    yield stopping


def run(ports: dict[str, int], duration_s: float | None) -> None:
    """Start, say where, wait, end. Raises BadInput when something is missing, taken or dies."""
    find_programs()
    _check_ports(ports)
    with tempfile.TemporaryDirectory(prefix="adaptive-spec-stack-") as name, _stop_signals() as stopping:
        stack = Stack(Path(name), ports)
        begun_s = time.monotonic()
        said = False
        try:
            while not stopping and (duration_s is None or time.monotonic() - begun_s < duration_s):
                if (words := stack.dead()) is not None:
                    raise BadInput(f"stack: {words}")
                if not said and stack.ready():
                    said = True
                    _say(stack)
                if not said and time.monotonic() - begun_s > READY_S:
                    raise BadInput(f"stack: not everything answers within {READY_S:g} s")
                time.sleep(LOOK_S)
        finally:
            stack.end()


def _say(stack: Stack) -> None:
    for title, url in (
        ("status page", f"{stack.url('demo')}/"),
        ("metrics", f"{stack.url('demo')}/metrics"),
        ("Prometheus", f"{stack.url('prometheus')}/graph"),
        ("alerts and rules", f"{stack.url('prometheus')}/alerts"),
        ("Alertmanager", f"{stack.url('alertmanager')}/"),
    ):
        click.echo(f"{title:<18}{url}")
    click.echo(f"{'logs':<18}{stack.folder}")
    click.echo("Ctrl-C ends all of it.")


PORT = click.IntRange(1, 65535)


@click.command()
@click.option("--duration", type=click.FloatRange(min=1.0), help="Seconds; until Ctrl-C when not given.")
@click.option("--demo-port", type=PORT, default=9477, show_default=True, help="Port of the demo's sidecar.")
@click.option("--prometheus-port", type=PORT, default=9090, show_default=True, help="Port of Prometheus.")
@click.option("--alertmanager-port", type=PORT, default=9093, show_default=True, help="Port of Alertmanager.")
def main(duration: float | None, demo_port: int, prometheus_port: int, alertmanager_port: int) -> None:
    """Demo, Prometheus and Alertmanager on this machine, with the configuration that is shipped."""
    try:
        run({"demo": demo_port, "prometheus": prometheus_port, "alertmanager": alertmanager_port}, duration)
    except BadInput as error:
        click.echo(f"stack: {' '.join(str(error).removeprefix('stack: ').split())}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
