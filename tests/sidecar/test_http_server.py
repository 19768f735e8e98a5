from __future__ import annotations

import hashlib
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from adaptive_spec.client.sidecar import ControlClient
from adaptive_spec.domain.policy import Granularity, Mode
from adaptive_spec.errors import BadInput
from adaptive_spec.sidecar.allowed_hosts import AllowedHosts
from adaptive_spec.sidecar.http_routes import MAX_DOCUMENTS, TICK_S, Command, Documents
from adaptive_spec.sidecar.http_server import WebServer, network_of
from adaptive_spec.sidecar.view import CurrentView, View
from tests.sidecar.test_metrics import SNAPSHOT
from tests.support.numbers_engine import engine_info
from tests.support.simulated_server import SimulatedServer, staircase
from tests.support.simulated_server import engine_info as simulated_info

TOKEN = "secret"


@pytest.fixture
def current_view() -> CurrentView:
    return CurrentView(time.monotonic())


@pytest.fixture
def server(current_view: CurrentView) -> Iterator[WebServer]:
    server = WebServer(current_view, "127.0.0.1", 0, TOKEN)
    yield server
    server.close()


def _get(server: WebServer, path: str, **headers: str) -> tuple[int, Any, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(server.url + path, headers=headers), timeout=10) as answer:
            return answer.status, answer.headers, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read().decode()


def _post(server: WebServer, body: bytes, token: str = TOKEN) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(server.url + "/control", body, {"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_health_follows_the_loop(server: WebServer, current_view: CurrentView) -> None:
    assert _get(server, "/healthz")[0] == 200
    current_view.heartbeat_s -= 60.0
    status, _, text = _get(server, "/healthz")
    assert status == 503
    assert json.loads(text)["alive"] is False


def test_status_before_an_engine(server: WebServer) -> None:
    status, headers, text = _get(server, "/status.json")
    document = json.loads(text)
    assert status == 200
    assert headers["Content-Type"] == "application/json"
    assert document["mode"] == "fallback"
    assert document["reason"] == "waiting for an engine"
    assert document["engine_pid"] is None
    assert document["k_by_batch_size"] == {}


def test_status_and_metrics_show_the_current_view(server: WebServer, current_view: CurrentView) -> None:
    current_view.view = View(time.monotonic(), SNAPSHOT, engine_info(pid=123), True)
    document = json.loads(_get(server, "/status.json")[2])
    assert document["k_by_batch_size"] == {"1": 4, "2": 3}
    assert document["boundaries"] == [6]
    assert document["engine_pid"] == 123
    assert document["segments"][0]["intercept_ms"] == 1.0
    assert document["events"][0]["text"] == "K 2 to 3"
    status, headers, text = _get(server, "/metrics")
    assert status == 200
    assert headers["Content-Type"].startswith("text/plain")
    assert "adaptive_spec_decode_steps_total{" in text
    _, headers, text = _get(server, "/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert headers["Content-Type"].startswith("application/openmetrics-text")
    assert text.endswith("# EOF\n")


def test_page_loads_nothing_from_elsewhere(server: WebServer) -> None:
    status, headers, text = _get(server, "/")
    assert status == 200
    assert headers["Content-Security-Policy"].startswith("default-src 'self'")
    assert "http" not in text
    for name, kind in (
        ("status.js", "text/javascript"),
        ("status.css", "text/css"),
        ("vendor/uPlot.iife.min.js", "text/javascript"),
        ("vendor/uPlot.min.css", "text/css"),
    ):
        assert name in text
        status, headers, _ = _get(server, f"/{name}")
        assert status == 200
        assert headers["Content-Type"].startswith(kind)


def test_vendored_files_have_their_checksums() -> None:
    folder = Path(str(resources.files("adaptive_spec"))) / "sidecar" / "page" / "vendor"
    sums = dict(line.split()[::-1] for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert sums.keys() == {"uPlot.iife.min.js", "uPlot.min.css", "uPlot.LICENSE"}
    for name, checksum in sums.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == checksum, name
    version = re.search(r"\(v([\d.]+)\)", (folder / "uPlot.iife.min.js").read_text()[:200])
    assert version is not None
    assert f"uPlot {version[1]} " in (folder / "README.md").read_text()
    assert "MIT" in (folder / "uPlot.LICENSE").read_text()


@pytest.mark.parametrize(
    "path",
    [
        "/vendor/README.md",
        "/vendor/",
        "/vendor/../status.js",
        "/no",
        "/index.html",
        "/..%2fsession.py",
        "/control",
        "/../session.py",
    ],
)
def test_nothing_else_is_served(server: WebServer, path: str) -> None:
    status, _, text = _get(server, path)
    assert status in (404, 405)
    assert "error" in json.loads(text)


def test_a_document_is_made_once_a_tick_for_all(current_view: CurrentView) -> None:
    documents, made = Documents(current_view), 0

    def make(view: View) -> bytes:
        nonlocal made
        made += 1
        return b"%d" % made

    start_s = time.monotonic()
    for _ in range(10_000):
        documents.get("metrics", make)
    assert 1 <= made <= 1 + (time.monotonic() - start_s) / TICK_S
    current_view.view = View(time.monotonic())
    before = made
    assert documents.get("metrics", make) == b"%d" % (before + 1)
    for batch_size in range(10 * MAX_DOCUMENTS):
        documents.get(f"explain {batch_size}", make)
    assert len(documents) <= MAX_DOCUMENTS


@pytest.mark.parametrize("address", ["0.0.0.0", "10.1.2.3", "::", "fd00::1"])
def test_beyond_loopback_every_address_is_a_host(address: str) -> None:
    hosts = AllowedHosts(address, address, ["sidecar"])
    for host in ("10.1.2.3:9477", "192.0.2.7", "[fd00::5]:9477", "127.0.0.1", "sidecar:9477"):
        assert hosts.allow(host)
    for host in ("evil.example", "sidecar.evil.example", "10.1.2.3.evil.example", "1.2.3", "0x7f000001"):
        assert not hosts.allow(host)


def test_networks_of_clients() -> None:
    """A client owns an IPv6 /64; IPv4 clients of a dual-stack socket are told apart."""
    assert network_of("192.0.2.1") == network_of("::ffff:192.0.2.1") != network_of("::ffff:192.0.2.2")
    assert network_of("2001:db8::1") == network_of("2001:db8::ffff:1") != network_of("2001:db8:0:1::1")
    assert network_of("fe80::1%eth0") == network_of("fe80::2")


def _answer(server: WebServer, answer: str) -> list[Command]:
    """Answer one command in place of the sidecar's loop."""
    taken: list[Command] = []

    def loop() -> None:
        command = server.commands.get(timeout=10)
        taken.append(command)
        command.answer = answer
        command.done.set()

    Thread(target=loop, daemon=True).start()
    return taken


def test_commands_go_through_the_queue(server: WebServer) -> None:
    taken = _answer(server, "")
    assert _post(server, b'{"command": "pin", "k": 3}') == (200, {"done": True, "mode": "fallback"})
    assert (taken[0].name, taken[0].k) == ("pin", 3)
    _answer(server, "not now")
    assert _post(server, b'{"command": "resweep"}') == (409, {"error": "not now"})


@pytest.mark.parametrize("token", ["", "wrong", TOKEN + "x", TOKEN[:-1], "é"])
def test_wrong_token(server: WebServer, token: str) -> None:
    request = urllib.request.Request(server.url + "/control", b'{"command": "pause"}')
    request.add_header("Authorization", f"Bearer {token}")
    with pytest.raises(urllib.error.HTTPError, match="403") as error:
        urllib.request.urlopen(request, timeout=10)
    error.value.close()
    assert server.commands.empty()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "must be JSON"),
        (b"pause", "must be JSON"),
        (b"[]", "must be JSON"),
        (b'{"k": 1}', "must be JSON"),
        (b'{"command": "stop"}', "command: 'stop': must be one of pause, resume"),
        (b'{"command": ["pause"]}', "command: ['pause']: must be one of"),
        (b'{"command": "pin"}', "k: must be a whole number for pin and absent for other commands, got None"),
        (b'{"command": "pin", "k": true}', "got True"),
        (b'{"command": "pin", "k": "3"}', "got '3'"),
        (b'{"command": "pause", "k": 3}', "absent for other commands, got 3"),
    ],
)
def test_bad_commands(server: WebServer, body: bytes, words: str) -> None:
    status, document = _post(server, body)
    assert status == 400
    assert words in document["error"]
    assert server.commands.empty()


def test_long_body_is_refused(server: WebServer) -> None:
    assert _post(server, b" " * 5000)[0] == 413


def test_port_in_use(server: WebServer, current_view: CurrentView) -> None:
    with pytest.raises(BadInput, match=f"port: {server.port} on host '127.0.0.1': Address already in use"):
        WebServer(current_view, "127.0.0.1", server.port, TOKEN)


def test_host_that_does_not_resolve(current_view: CurrentView) -> None:
    with pytest.raises(BadInput, match=r"port: 0 on host 'no\.such\.host\.invalid': "):
        WebServer(current_view, "no.such.host.invalid", 0, TOKEN)


def test_messages_of_the_client(server: WebServer) -> None:
    with pytest.raises(BadInput, match="refused: wrong token"):
        ControlClient(server.url, "wrong").send("pause")
    assert ControlClient(server.url).status()["mode"] == "fallback"
    server.close()
    with pytest.raises(BadInput, match="--url: must begin with http:// or https://, got 'ftp://x'"):
        ControlClient("ftp://x")
    with pytest.raises(BadInput, match="no sidecar answers"):
        ControlClient("http://127.0.0.1:1").status()


def test_explain_needs_a_decision_and_a_batch_size_of_the_engine(server: WebServer, current_view: CurrentView) -> None:
    status, _, body = _get(server, "/explain.json")
    assert (status, json.loads(body)["error"]) == (404, "nothing was decided yet (no engine is attached)")
    simulated = decided()
    snapshot = simulated.controller.snapshot(simulated.now_s)
    current_view.view = View(time.monotonic(), snapshot, simulated.info, True)
    for asked, error in {
        "0": "batch: must be in 1..64, got 0", "65": "batch: must be in 1..64, got 65",
        "-1": "batch: must be a whole number >= 1",
        "x": "batch: must be a whole number >= 1", "": "batch: must be a whole number >= 1", "9" * 400: "batch: must be a whole",
        "%C2%B2": "batch: must be a whole number >= 1",
    }.items():  # fmt: skip
        status, _, body = _get(server, f"/explain.json?batch={asked}")
        assert status == 404
        assert json.loads(body)["error"].startswith(error)
    document = json.loads(_get(server, "/explain.json")[2])
    assert document["batch_size"] == simulated.batch_size
    assert document["k"] == snapshot.k_by_batch_size[simulated.batch_size]
    assert document["note"] == ""
    for plan in document["plans"]:
        assert sum(plan["stage_ms"].values()) == pytest.approx(plan["step_ms"])
    assert json.loads(_get(server, "/explain.json?batch=64")[2])["batch_size"] == 64


def test_explain_says_when_the_decision_does_not_set_k(server: WebServer, current_view: CurrentView) -> None:
    simulated = decided()
    simulated.controller.command("pin", simulated.now_s, 1)
    snapshot = simulated.controller.snapshot(simulated.now_s)
    current_view.view = View(time.monotonic(), snapshot, simulated.info, True)
    document = json.loads(_get(server, "/explain.json?batch=4")[2])
    assert document["k_in_force"] == 1
    assert document["note"] == "mode pinned (pinned at K = 1): the last decision does not set K"


def decided() -> SimulatedServer:
    """A simulated server whose controller has decided."""
    simulated = SimulatedServer(simulated_info(Granularity.BATCH, holds_batch=True), staircase())
    while simulated.controller.mode is not Mode.ACTIVE:
        simulated.run(20)
    simulated.run(20)
    return simulated
