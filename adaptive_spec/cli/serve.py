"""`adaptive-spec serve`: a sidecar and an SGLang server, started and ended together.

The server is what counts: its exit status is ours, signals go to it, and it never waits for the sidecar, which is started again
whenever it has died. Only what keeps the first sidecar from starting at all (a bad configuration, a port in use) is refused at
once, before the server loads a model.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from adaptive_spec.client.sidecar import ADDRESS_NAME
from adaptive_spec.config.load import load_settings
from adaptive_spec.config.settings import SidecarSettings
from adaptive_spec.errors import BadInput
from adaptive_spec.sidecar.supervisor import Supervisor, end, end_with_parent

LOOK_S = 0.2
SIDECAR_PATIENCE_S = 10.0
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)

log = logging.getLogger("adaptive_spec.cli.serve")


@dataclass(frozen=True)
class ServeOptions:
    """mode None: as the configuration says. config None: defaults. flags: SGLang's own, as they are."""

    mode: str | None
    config: Path | None
    overrides: dict[str, Any]
    flags: tuple[str, ...]


def run_serve(options: ServeOptions) -> int:
    """Serve until the server ends; returns its exit status, 128 + N when signal N ended it. Raises BadInput."""
    if importlib.util.find_spec("sglang") is None:
        raise BadInput(
            "serve: sglang is not installed here: install it beside adaptive-spec, pip install 'adaptive-spec[sglang]'"
        )
    if not options.flags:
        raise BadInput("serve: no SGLang server flags are given: must be like -- --model-path MODEL")
    settings = _settings(options)
    _check_port(settings.host, settings.port)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    with tempfile.TemporaryDirectory(prefix="adaptive-spec-serve-") as folder:
        config = Path(folder) / "config.yaml"
        config.write_text(yaml.safe_dump(settings.model_dump(mode="json", exclude_none=True)))
        return _Service(settings, config, options.flags).run()


def _settings(options: ServeOptions) -> SidecarSettings:
    """The sidecar's settings: both processes get the same file, so that they cannot disagree."""
    settings = load_settings(options.config, options.overrides)
    update: dict[str, Any] = {"runtime_dir": settings.runtime_dir.absolute(), "profile_dir": settings.profile_dir.absolute()}
    if options.mode is not None:
        update["controller"] = settings.controller.model_copy(update={"mode": options.mode})
    return settings.model_copy(update=update)


def _check_port(host: str, port: int) -> None:
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise BadInput(f"--port: {port} on host {host!r} is not allowed: {error.strerror or error}; must be free") from error


class _Service:
    def __init__(self, settings: SidecarSettings, config: Path, flags: Sequence[str]) -> None:
        self._settings, self._config, self._flags = settings, config, flags
        self._signals: list[int] = []
        self._server: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        for kind in FORWARDED:
            signal.signal(kind, self._forward)
        supervisor = Supervisor(self._start_sidecar, time.monotonic())
        try:
            self._await_sidecar(supervisor)
            self._server = self._start_server()
            for number in self._signals:  # those that came before there was anybody to get them
                self._server.send_signal(number)
            status = self._watch(self._server, supervisor)
        finally:
            end(supervisor.process)
        log.info("the server ended with status %d", status)
        return status if status >= 0 else 128 - status

    def _watch(self, server: subprocess.Popen[bytes], supervisor: Supervisor) -> int:
        restarts = 0
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return server.wait(LOOK_S)
            supervisor.look(time.monotonic())
            if supervisor.restarts > restarts:
                restarts = supervisor.restarts
                log.warning("the sidecar had died and was started again (%d times so far); the server went on", restarts)

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        if self._server is None:
            self._signals.append(number)
        elif self._server.poll() is None:
            self._server.send_signal(number)

    def _await_sidecar(self, supervisor: Supervisor) -> None:
        """Give the first sidecar time to refuse its configuration. Raises BadInput with what it said."""
        address = self._settings.runtime_dir / ADDRESS_NAME
        deadline_s = time.monotonic() + SIDECAR_PATIENCE_S
        while time.monotonic() < deadline_s and not self._signals:
            if supervisor.process.poll() is not None:
                if supervisor.process.returncode == 2:
                    raise BadInput("serve: the sidecar refused to start, see its line above")
                return  # the supervisor tries again
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                if json.loads(address.read_bytes())["pid"] == supervisor.process.pid:
                    return
            time.sleep(0.05)

    def _start_sidecar(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "adaptive_spec.cli", "sidecar", "--config", str(self._config)]
        # A session of its own: a Ctrl-C on the terminal is the server's, the sidecar is ended when the server has.
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=end_with_parent)

    def _start_server(self) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ,
            "ADAPTIVE_SPEC_MODE": self._settings.controller.mode,
            "ADAPTIVE_SPEC_CONFIG": str(self._config),
            "ADAPTIVE_SPEC_RUNTIME_DIR": str(self._settings.runtime_dir),
        }
        command = [sys.executable, "-m", "sglang.launch_server", *self._flags]
        return subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=end_with_parent)
