"""Runs an image confined as compose and Kubernetes confine it (docker/confined.sh), and checks what must work inside."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from adaptive_spec.errors import BadInput

DEPLOY = Path(__file__).parent
COMPOSE = DEPLOY / "compose"
HEALTHY_S = 60.0
STOPPED_S = 20.0


class Mount(NamedTuple):
    """A folder or file of the host at `target` in the container. access: ro or rw."""

    source: Path
    target: str
    access: str


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program to its end. Raises BadInput with the last line of its stderr when it fails."""
    result = subprocess.run(list(map(str, command)), text=True, check=False, **{"capture_output": True, **options})
    if result.returncode != 0:
        lines = [line for line in ((result.stdout or "") + (result.stderr or "")).splitlines() if line.strip()]
        words = lines[-1].strip() if lines else "no output"
        raise BadInput(f"{Path(str(command[0])).name} {command[1]}: status {result.returncode}: {words}")
    return result


class Container:
    """An image that runs: as uid 1000, with a read-only root, a /tmp in memory and these mounts."""

    def __init__(self, root: Path, environment: Sequence[str], tmp_size: str, mounts: Sequence[Mount]) -> None:
        self._root, self._environment, self._tmp_size, self._mounts = root, list(environment), tmp_size, mounts
        for mount in mounts:  # an engine makes missing mount points, too
            point = root / mount.target.lstrip("/")
            if mount.source.is_dir():
                point.mkdir(parents=True, exist_ok=True)
            else:
                point.parent.mkdir(parents=True, exist_ok=True)
                point.touch()

    def command(self, *arguments: str) -> list[str]:
        """What starts a command in a container of its own."""
        binds = [word for m in self._mounts for word in ("--bind", str(m.source), m.target, m.access)]
        return [
            str(DEPLOY / "docker" / "confined.sh"),
            str(self._root),
            self._tmp_size,
            *binds,
            "--",
            *self._environment,
            *arguments,
        ]

    def run(self, *arguments: str) -> str:
        """Run a command to its end; returns its output. Raises BadInput when it fails."""
        return run(*self.command(*arguments)).stdout

    def inside(self, process: subprocess.Popen[str], *arguments: str) -> list[str]:
        """What runs a command beside the one that `process` runs, as a health check is run."""
        pid = _only_child(process.pid)
        enter = ["nsenter", f"--target={pid}", "--mount", "--pid", "--ipc", "--net", "--root", "--wd=/"]
        return [*enter, "--setuid=1000", "--setgid=1000", "env", "--ignore-environment", *self._environment, *arguments]


def _only_child(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    if len(children) != 1:
        raise BadInput(f"images: process {pid} has {len(children)} children: must be one")
    return int(children[0])


def compose_service(name: str) -> dict[str, Any]:
    """One service of the compose file."""
    service: dict[str, Any] = yaml.safe_load((COMPOSE / "compose.yaml").read_text())["services"][name]
    return service


def tmp_size(service: dict[str, Any]) -> str:
    """Size of /tmp that a service of the compose file has. Raises BadInput when it has none."""
    for entry in service.get("tmpfs", []):
        if match := re.fullmatch(r"/tmp:(?:.*,)?size=(\d+[kmg])(?:,.*)?", entry):
            return match[1]
    raise BadInput("compose.yaml: tmpfs: /tmp has no size: must be as /tmp:size=16m")


def check_confinement(container: Container) -> None:
    """Check that the container is confined as it is meant to be, or nothing below shows anything. Raises BadInput."""
    script = "id -u; grep CapEff /proc/self/status; touch /probe 2>/dev/null && echo written; touch /tmp/probe && echo ok"
    words = container.run("sh", "-c", script).split()
    if words != ["1000", "CapEff:", "0000000000000000", "ok"]:
        raise BadInput(f"images: the container is not confined: {' '.join(words)}")


def check_doctor(container: Container, *, complete: bool) -> None:
    """Run `doctor`. complete: nothing may be broken. Otherwise the libraries of the sidecar may be missing."""
    code = "import json; from pathlib import Path; from adaptive_spec.cli.doctor import examine\n"
    code += "from adaptive_spec.runtime_folder import default_runtime_dir\n"
    code += "print(json.dumps([f._asdict() for f in examine(default_runtime_dir(), Path('/tmp'), '127.0.0.1', 9477)]))"
    output = container.run("adaptive-spec", "doctor", "--json") if complete else container.run("python3", "-c", code)
    broken = [finding for finding in json.loads(output) if finding["state"] == "broken"]
    if (complete and broken) or any(finding["subject"] != "libraries" for finding in broken):
        raise BadInput(f"images: doctor: {broken[0]['subject']}: {broken[0]['text']}")


def check_sidecar(container: Container, configuration: dict[str, Any], say: Callable[[str], None]) -> None:
    """Start the image with its default command, wait for its health check, draw a picture, stop it. Raises BadInput."""
    command = container.command(*configuration["Entrypoint"], *configuration["Cmd"])
    with tempfile.TemporaryFile("w+") as log:
        begun_s = time.monotonic()
        process = subprocess.Popen(command, stdout=log, stderr=log, text=True)
        try:
            _wait_healthy(container, process, configuration["Healthcheck"]["Test"][1:])
            say(f"the health check passes after {time.monotonic() - begun_s:.1f} s")
            script = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9477/metrics', timeout=4).read().decode())"
            metrics = run(*container.inside(process, "python", "-c", script)).stdout
            if "adaptive_spec_build_info" not in metrics:
                raise BadInput("images: /metrics of the sidecar has no adaptive_spec_build_info")
            plots = {"title": "t", "calibration_title": "t", "samples": [], "medians": [[1, 1.0], [2, 1.5]], "segments": [],
                     "boundaries": [], "token_counts": [[1, 3], [2, 5]], "kind": "k", "calibration": [], "curve": []}  # fmt: skip
            drawn = container.inside(process, "python", "-m", "adaptive_spec.offline.plots", "/var/lib/adaptive-spec")
            run(*drawn, input=json.dumps(plots))
            used = run(*container.inside(process, "du", "-sk", "/tmp")).stdout.split()[0]
            say(f"after a picture /tmp holds {used} KiB")
            os.kill(_only_child(process.pid), signal.SIGTERM)
            status = process.wait(STOPPED_S)
            if status != 0:
                raise BadInput(f"images: the sidecar ended with status {status} after SIGTERM: must be 0")
        except (BadInput, subprocess.TimeoutExpired) as error:
            log.seek(0)
            raise BadInput(f"{error}; the sidecar's log: {' | '.join(log.read().splitlines()[-5:])}") from error
        finally:
            process.kill()
            process.wait()


def _wait_healthy(container: Container, process: subprocess.Popen[str], check: list[str]) -> None:
    until_s = time.monotonic() + HEALTHY_S
    while time.monotonic() < until_s:
        if process.poll() is not None:
            raise BadInput(f"images: the sidecar ended with status {process.returncode}")
        try:
            if subprocess.run(container.inside(process, *check), capture_output=True, check=False).returncode == 0:
                return
        except BadInput:
            pass  # the command has not been started yet
        time.sleep(0.5)
    raise BadInput(f"images: the health check has not passed within {HEALTHY_S:g} s: {shlex.join(check)}")
