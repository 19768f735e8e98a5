"""Runs Prometheus, Alertmanager and a webhook, and finds their programs."""

from __future__ import annotations

import http.server
import json
import re
import shutil
import socket
import subprocess
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.processes import wait_for

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy" / "prometheus"
PROGRAMS = {"prometheus": ("prometheus",), "alertmanager": ("prometheus-alertmanager", "alertmanager"), "promtool": ("promtool",),
            "amtool": ("amtool",)}  # fmt: skip


def program(name: str) -> str | None:
    """Path of one of Prometheus' programs, None where it is not installed."""
    return next((path for candidate in PROGRAMS[name] if (path := shutil.which(candidate))), None)


def needs(*names: str) -> pytest.MarkDecorator:
    """Skip the test when a program is missing; CI has them all."""
    missing = [name for name in names if program(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)} (Debian: prometheus, -alertmanager)")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def scaled(text: str, factor: float) -> str:
    """Rules with every window and every `for` shortened by `factor`; the rest stays as it is shipped.

    Windows never fall below 10 s (with a scrape every half second they need some samples), waits never below 1 s.
    """

    def seconds(duration: str) -> float:
        return float(duration[:-1]) * {"s": 1, "m": 60, "h": 3600}[duration[-1]]

    def window(found: re.Match[str]) -> str:
        return f"[{max(round(seconds(found[1]) / factor), 10)}s]"

    text = re.sub(r"\[(\d+[smh])\]", window, text)
    return re.sub(r"(?m)^(\s+for: )(\d+[smh])$", lambda m: f"{m[1]}{max(round(seconds(m[2]) / factor), 1)}s", text)


@contextmanager
def running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process; it is ended at the end of the block."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Api:
    """HTTP API of Prometheus or Alertmanager."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **query: str) -> Any:
        with urllib.request.urlopen(f"{self.url}{path}?{urllib.parse.urlencode(query)}", timeout=10) as answer:
            return json.load(answer)

    def text(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            return str(answer.read().decode())

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def query(self, expr: str) -> list[Any]:
        """Samples of an instant query."""
        result: list[Any] = self.get("/api/v1/query", query=expr)["data"]["result"]
        return result


@contextmanager
def prometheus(
    folder: Path, targets: list[str], alertmanager: str | None = None, interval: str = "1s", factor: float | None = None
) -> Iterator[Api]:
    """Prometheus on a free port with the shipped rules (shortened by `factor` if given), scraping sidecars (host:port)."""
    for rules in (DEPLOY / "rules").glob("*.yaml"):
        text = rules.read_text()
        (folder / rules.name).write_text(text if factor is None else scaled(text, factor))
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": interval, "evaluation_interval": interval, "scrape_timeout": interval}
    config["rule_files"] = ["*.yaml"]
    config["scrape_configs"][0]["static_configs"] = [{"targets": targets}]
    config["alerting"]["alertmanagers"][0]["static_configs"] = [{"targets": [alertmanager] if alertmanager else []}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = [str(program("prometheus")), f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    with running([*command, f"--web.listen-address=127.0.0.1:{port}"], folder / "prometheus.log"):
        api = Api(f"http://127.0.0.1:{port}")
        wait_for(api.ready, "Prometheus")
        yield api


@contextmanager
def alertmanager(folder: Path, webhook: str) -> Iterator[str]:
    """Alertmanager on a free port with the shipped configuration, sending to a webhook without waiting; its host:port."""
    config = yaml.safe_load((DEPLOY / "alertmanager.yml").read_text())
    config["route"] |= {"group_wait": "0s", "group_interval": "1s"}
    config["receivers"][0]["webhook_configs"] = [{"url": webhook, "send_resolved": True}]
    (folder / "alertmanager.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = [
        str(program("alertmanager")),
        f"--config.file={folder / 'alertmanager.yml'}",
        f"--storage.path={folder / 'silences'}",
    ]
    with running([*command, f"--web.listen-address=127.0.0.1:{port}", "--cluster.listen-address="], folder / "alertmanager.log"):
        wait_for(Api(f"http://127.0.0.1:{port}").ready, "Alertmanager")
        yield f"127.0.0.1:{port}"


class Webhook:
    """Takes what Alertmanager sends: `alerts` holds every alert of every notification, in the order they came."""

    def __init__(self) -> None:
        self.alerts: list[dict[str, Any]] = []
        webhook = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                webhook.alerts += json.loads(body)["alerts"]
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Webhook:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def first(self, name: str, status: str) -> dict[str, Any] | None:
        return next((a for a in self.alerts if a["labels"]["alertname"] == name and a["status"] == status), None)
