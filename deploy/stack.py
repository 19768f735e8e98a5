"""`make stack`: runs the demo, Prometheus and Alertmanager on loopback, with the configuration of deploy/prometheus.

Only the ports in the configuration are changed. It ends, with all three processes, on Ctrl-C, on SIGTERM, after --duration, and
when one of the processes ends. Data and logs are in a folder that is removed at the end.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import yaml

from adaptive_spec.cli.processes import last_line, stop_signals
from adaptive_spec.errors import BadInput
from adaptive_spec.sidecar.listening import check_port
from adaptive_spec.sidecar.supervisor import end, end_with_parent

SHIPPED = Path(__file__).parent / "prometheus"
READY_S = 60.0
POLL_S = 0.25
PROGRAMS = {"prometheus": ("prometheus",), "alertmanager": ("prometheus-alertmanager", "alertmanager")}


def find_programs() -> dict[str, str]:
    """Return the paths of Prometheus and Alertmanager. Raises BadInput when one is not installed."""
    found = {name: next(filter(None, map(shutil.which, names)), None) for name, names in PROGRAMS.items()}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        raise BadInput(f"stack: {' and '.join(missing)} not found on PATH; Debian packages: prometheus, prometheus-alertmanager")
    return {name: str(path) for name, path in found.items()}


def configure(folder: Path, sidecar_port: int, alertmanager_port: int) -> None:
    """Copy the configuration into the folder and set these ports in it."""
    shutil.copytree(SHIPPED / "rules", folder / "rules")
    shutil.copy(SHIPPED / "alertmanager.yml", folder)
    config: dict[str, Any] = yaml.safe_load((SHIPPED / "prometheus.yml").read_text())
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{sidecar_port}"]
    config["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{alertmanager_port}"]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))


def commands(programs: dict[str, str], folder: Path, ports: dict[str, int], demo: Sequence[str]) -> dict[str, list[str]]:
    """Return the command lines of the three processes, by name."""
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

    def ended(self) -> str | None:
        """Return name, exit status and last output line of a process that has ended; None while all run."""
        for name, process in self._processes.items():
            if process.poll() is not None:
                return f"{name} ended with status {process.returncode}: {last_line(self.folder / f'{name}.log')}"
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
        """Stop all processes."""
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            end(process, patience_s=15.0)


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=2.0) as answer:
        return bytes(answer.read())


def run(ports: dict[str, int], duration_s: float | None) -> None:
    """Start the processes, print their addresses, and stop them at the end.

    Raises BadInput when a program is missing, a port is in use, or a process ends unexpectedly.
    """
    find_programs()
    for name, port in ports.items():
        check_port("127.0.0.1", port, f"--{name}-port")
    with tempfile.TemporaryDirectory(prefix="adaptive-spec-stack-") as name, stop_signals() as stopping:
        stack = Stack(Path(name), ports)
        started_s = time.monotonic()
        printed = False
        try:
            while not stopping and (duration_s is None or time.monotonic() - started_s < duration_s):
                if (reason := stack.ended()) is not None:
                    raise BadInput(f"stack: {reason}")
                if not printed and stack.ready():
                    printed = True
                    _print_addresses(stack)
                if not printed and time.monotonic() - started_s > READY_S:
                    raise BadInput(f"stack: not all processes answered within {READY_S:g} s")
                time.sleep(POLL_S)
        finally:
            stack.end()


def _print_addresses(stack: Stack) -> None:
    for title, url in (
        ("status page", f"{stack.url('demo')}/"),
        ("metrics", f"{stack.url('demo')}/metrics"),
        ("Prometheus", f"{stack.url('prometheus')}/graph"),
        ("alerts and rules", f"{stack.url('prometheus')}/alerts"),
        ("Alertmanager", f"{stack.url('alertmanager')}/"),
    ):
        click.echo(f"{title:<18}{url}")
    click.echo(f"{'logs':<18}{stack.folder}")
    click.echo("Ctrl-C to stop")


PORT = click.IntRange(1, 65535)


@click.command()
@click.option("--duration", type=click.FloatRange(min=1.0), help="Seconds to run.  [default: until Ctrl-C]")
@click.option("--demo-port", type=PORT, default=9477, show_default=True, help="Port of the demo's sidecar.")
@click.option("--prometheus-port", type=PORT, default=9090, show_default=True, help="Port of Prometheus.")
@click.option("--alertmanager-port", type=PORT, default=9093, show_default=True, help="Port of Alertmanager.")
def main(duration: float | None, demo_port: int, prometheus_port: int, alertmanager_port: int) -> None:
    """Run the demo, Prometheus and Alertmanager on this machine, with the configuration of deploy/prometheus."""
    try:
        run({"demo": demo_port, "prometheus": prometheus_port, "alertmanager": alertmanager_port}, duration)
    except BadInput as error:
        click.echo(f"stack: {' '.join(str(error).removeprefix('stack: ').split())}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
