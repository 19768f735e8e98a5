"""`adaptive-spec serve`: starts and ends a sidecar and an SGLang or vLLM server together.

The exit status is the server's, signals are forwarded to the server, and the server never waits for the sidecar, which is
restarted whenever it ends. Only an error that keeps the first sidecar from starting (a bad configuration, a port in use) ends
the command at once, before the server loads a model.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import yaml

from adaptive_spec.client.sidecar import ADDRESS_NAME
from adaptive_spec.config.load import load_settings
from adaptive_spec.config.settings import SidecarSettings
from adaptive_spec.errors import BadInput
from adaptive_spec.runtime_folder import DEFAULT_SERVER_PORT, default_runtime_dir, server_port_of
from adaptive_spec.sidecar.listening import check_port
from adaptive_spec.sidecar.supervisor import Supervisor, end, end_with_parent

POLL_S = 0.2
SIDECAR_TIMEOUT_S = 10.0
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)

log = logging.getLogger("adaptive_spec.cli.serve")


class ServedEngine(NamedTuple):
    """name: in messages. package: what must be importable. module: its server. model_flag: of an example. port: its default."""

    name: str
    package: str
    module: str
    model_flag: str
    port: int


ENGINES = {
    "sglang": ServedEngine("SGLang", "sglang", "sglang.launch_server", "--model-path", DEFAULT_SERVER_PORT),
    # Not `vllm serve`: its command line asks for the metadata of a package named vllm, which builds of other names lack.
    "vllm": ServedEngine("vLLM", "vllm", "vllm.entrypoints.openai.api_server", "--model", 8000),
}


@dataclass(frozen=True)
class ServeOptions:
    """mode None: that of the configuration. config None: the defaults. flags: passed to SGLang unchanged, to vLLM with the
    schedule of K that the plugin needs. engine: of `ENGINES`.
    """

    mode: str | None
    config: Path | None
    overrides: dict[str, Any]
    flags: tuple[str, ...]
    engine: str = "sglang"


def run_serve(options: ServeOptions) -> int:
    """Run until the server ends; returns its exit status, 128 + N when signal N ended it. Raises BadInput."""
    engine = ENGINES[options.engine]
    if importlib.util.find_spec(engine.package) is None:
        raise BadInput(
            f"serve: {engine.package} is not installed: install the extra '{engine.package}' "
            f"(pip install '.[{engine.package}]' in a checkout)"
        )
    if not options.flags:
        raise BadInput(f"serve: no {engine.name} server flags: give them after --, for example -- {engine.model_flag} MODEL")
    if options.engine == "vllm":
        from adaptive_spec.engines.vllm.launch_schedule import completed_flags

        options = replace(options, flags=tuple(completed_flags(options.flags)))
    settings = _settings(options)
    check_port(settings.host, settings.port)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    with tempfile.TemporaryDirectory(prefix="adaptive-spec-serve-") as folder:
        config = Path(folder) / "config.yaml"
        config.write_text(yaml.safe_dump(settings.model_dump(mode="json", exclude_none=True)))
        return _Service(settings, config, engine, options.flags).run()


def _settings(options: ServeOptions) -> SidecarSettings:
    """Return the settings of both processes. Both read the same file, so they always agree."""
    settings = load_settings(options.config, options.overrides)
    if "server_port" not in settings.model_fields_set:
        port = server_port_of(options.flags, ENGINES[options.engine].port)
        folder = settings.runtime_dir if "runtime_dir" in settings.model_fields_set else default_runtime_dir(port)
        settings = settings.model_copy(update={"server_port": port, "runtime_dir": folder})
    update: dict[str, Any] = {"runtime_dir": settings.runtime_dir.absolute(), "profile_dir": settings.profile_dir.absolute()}
    if options.mode is not None:
        update["controller"] = settings.controller.model_copy(update={"mode": options.mode})
    return settings.model_copy(update=update)


class _Service:
    """The sidecar and the server of one `serve`."""

    def __init__(self, settings: SidecarSettings, config: Path, engine: ServedEngine, flags: Sequence[str]) -> None:
        self._settings, self._config, self._engine, self._flags = settings, config, engine, flags
        self._signals: list[int] = []
        self._server: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        for kind in FORWARDED:
            signal.signal(kind, self._forward)
        supervisor = Supervisor(self._start_sidecar, time.monotonic())
        try:
            self._await_sidecar(supervisor)
            self._server = self._start_server()
            for number in self._signals:  # received before the server was started
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
                return server.wait(POLL_S)
            supervisor.look(time.monotonic())
            if supervisor.restarts > restarts:
                restarts = supervisor.restarts
                log.warning("the sidecar ended and was restarted (%d times so far); the server kept running", restarts)

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        if self._server is None:
            self._signals.append(number)
        elif self._server.poll() is None:
            self._server.send_signal(number)

    def _await_sidecar(self, supervisor: Supervisor) -> None:
        """Wait for the first sidecar to serve. Raises BadInput when it refuses its configuration."""
        address = self._settings.runtime_dir / ADDRESS_NAME
        deadline_s = time.monotonic() + SIDECAR_TIMEOUT_S
        while time.monotonic() < deadline_s and not self._signals:
            if supervisor.process.poll() is not None:
                if supervisor.process.returncode == 2:
                    raise BadInput("serve: the sidecar did not start, see its message above")
                return  # the supervisor restarts it
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                if json.loads(address.read_bytes())["pid"] == supervisor.process.pid:
                    return
            time.sleep(0.05)

    def _start_sidecar(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "adaptive_spec.cli", "sidecar", "--config", str(self._config)]
        # Its own session, so that Ctrl-C on the terminal does not reach it: the sidecar is ended after the server.
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=end_with_parent)

    def _start_server(self) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ,
            "ADAPTIVE_SPEC_MODE": self._settings.controller.mode,
            "ADAPTIVE_SPEC_CONFIG": str(self._config),
            "ADAPTIVE_SPEC_RUNTIME_DIR": str(self._settings.runtime_dir),
        }
        command = [sys.executable, "-m", self._engine.module, *self._flags]
        return subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=end_with_parent)
