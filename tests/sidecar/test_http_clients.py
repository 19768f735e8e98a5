"""The HTTP server of a sidecar process against clients that are slow, silent, many or malformed."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

import pytest

from adaptive_spec.sidecar.http_connection import HEADER_S, MAX_HEADER_BYTES
from adaptive_spec.sidecar.http_message import SECURITY_HEADERS
from adaptive_spec.sidecar.http_routes import MAX_BODY_BYTES
from adaptive_spec.sidecar.http_server import MAX_CONNECTIONS, MAX_PER_CLIENT
from tests.support.processes import PATIENCE_S, SidecarProcess, run_cli

HOST = b"Host: localhost\r\n"


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SidecarProcess]:
    folder = tmp_path_factory.mktemp("http")
    config = folder / "config.yaml"
    config.write_text("allowed_hosts: [metrics.example]\n")
    with SidecarProcess(folder / "run", folder / "profiles", "--config", str(config)) as sidecar:
        yield sidecar
        assert "Traceback" not in sidecar.stop()


def _connect(sidecar: SidecarProcess) -> socket.socket:
    parts = urlsplit(sidecar.url)
    return socket.create_connection((parts.hostname, parts.port or 0), timeout=PATIENCE_S)


def _read_all(connection: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while data := connection.recv(65_536):
            received += data
    return received


def _talk(sidecar: SidecarProcess, request: bytes) -> tuple[int, bytes]:
    """Send bytes, close our side, return the status of the first answer and all that came."""
    with _connect(sidecar) as connection:
        connection.sendall(request)
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_WR)
        received = _read_all(connection)
    status = re.match(rb"HTTP/1\.1 (\d{3}) ", received)
    return int(status[1]) if status else 0, received


def _token(sidecar: SidecarProcess) -> bytes:
    return (sidecar.runtime_dir / "control.token").read_bytes().strip()


def _memory_bytes(sidecar: SidecarProcess) -> int:
    lines = Path(f"/proc/{sidecar.process.pid}/status").read_text()
    return 1024 * int(re.findall(r"VmRSS:\s+(\d+) kB", lines)[0])


def _answers(sidecar: SidecarProcess) -> None:
    assert json.loads(sidecar.get("/healthz"))["alive"]
    assert "adaptive_spec_build_info" in sidecar.get("/metrics")
    assert run_cli("doctor", "--alive", "--runtime-dir", sidecar.runtime_dir).returncode == 0
    assert run_cli("ctl", "status", "--runtime-dir", sidecar.runtime_dir).returncode == 0


def test_idle_half_open_and_unread_connections_keep_no_one_out(sidecar: SidecarProcess) -> None:
    with contextlib.ExitStack() as held:
        for _ in range(100):
            held.enter_context(_connect(sidecar))
        for _ in range(MAX_PER_CLIENT):
            held.enter_context(_connect(sidecar)).sendall(b"GET /metrics HTTP/1.1\r\n" + HOST)
        _answers(sidecar)
        unread = b"GET /vendor/uPlot.iife.min.js HTTP/1.1\r\n" + HOST + b"\r\n"
        for _ in range(100):
            connection = held.enter_context(_connect(sidecar))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            with contextlib.suppress(OSError):
                connection.sendall(unread * 100)
        _answers(sidecar)
        descriptors = len(list(Path(f"/proc/{sidecar.process.pid}/fd").iterdir()))
        assert descriptors < MAX_CONNECTIONS


def test_slow_header_is_ended(sidecar: SidecarProcess) -> None:
    """A byte now and then keeps no connection open: the deadline is on the whole header."""
    with _connect(sidecar) as connection:
        start_s = time.monotonic()
        connection.sendall(b"GET / HTTP/1.1\r\n" + HOST + b"X: ")
        connection.settimeout(0.5)
        received = b""
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < start_s + PATIENCE_S:
                with contextlib.suppress(TimeoutError):
                    if not (data := connection.recv(4096)):
                        break
                    received += data
                connection.sendall(b"x")
        assert time.monotonic() - start_s >= HEADER_S - 0.1
        assert received.startswith(b"HTTP/1.1 408 ")


def test_silent_connection_is_closed(sidecar: SidecarProcess) -> None:
    with _connect(sidecar) as connection:
        assert _read_all(connection) == b""


def _control(length: bytes, token: bytes) -> bytes:
    return b"POST /control HTTP/1.1\r\n" + HOST + b"Authorization: Bearer " + token + b"\r\n" + length + b"\r\n\r\n"


def test_body_without_a_token_is_not_read(sidecar: SidecarProcess, tmp_path: Path) -> None:
    before = _memory_bytes(sidecar)
    piece = b"x" * 1_000_000
    with contextlib.ExitStack() as held:
        for length in (b"Content-Length: 200000000", b"Content-Length: 100", b"Transfer-Encoding: chunked"):
            connection = held.enter_context(_connect(sidecar))
            connection.sendall(_control(length, b"wrong"))  # the answer comes although no body does
            assert connection.recv(4096).startswith(b"HTTP/1.1 4")
            with contextlib.suppress(ConnectionError):
                for _ in range(200):
                    connection.sendall(piece)
    assert _memory_bytes(sidecar) - before < 20e6
    files = [link.readlink() for link in Path(f"/proc/{sidecar.process.pid}/fd").iterdir() if link.is_symlink()]
    assert not [file for file in files if "/tmp" in str(file) and "(deleted)" in str(file)]


def test_body_with_a_token_is_bounded_and_must_come(sidecar: SidecarProcess) -> None:
    status, _ = _talk(sidecar, _control(b"Content-Length: %d" % (MAX_BODY_BYTES + 1), _token(sidecar)))
    assert status == 413
    with _connect(sidecar) as connection:
        connection.sendall(_control(b"Content-Length: 100", _token(sidecar)) + b"{")
        assert _read_all(connection).startswith(b"HTTP/1.1 408 ")


def test_continue_is_sent_only_with_the_token(sidecar: SidecarProcess) -> None:
    expect = b"Expect: 100-continue\r\nContent-Length: 20"
    with _connect(sidecar) as connection:
        connection.sendall(_control(expect, b"wrong"))
        assert connection.recv(4096).startswith(b"HTTP/1.1 403 ")
    with _connect(sidecar) as connection:
        connection.sendall(_control(expect, _token(sidecar)))
        assert connection.recv(4096).startswith(b"HTTP/1.1 100 ")
        connection.sendall(b'{"command": "pause"}')
        connection.shutdown(socket.SHUT_WR)
        assert b"no engine is attached" in _read_all(connection)


def _get(target: bytes, headers: bytes = b"") -> bytes:
    return b"GET " + target + b" HTTP/1.1\r\n" + HOST + headers + b"\r\n"


MALFORMED = {
    "accept that is no text": (_get(b"/metrics", b"Accept: \xff\xfe\x80\r\n"), 400),
    "accept with a bad version": (_get(b"/metrics", b"Accept: application/openmetrics-text; version=a.b.c\r\n"), 400),
    "bad percent-encoding": (_get(b"/%zz"), 404),
    "percent-encoded NUL": (_get(b"/%00"), 404),
    "percent-encoded no text": (_get(b"/%ff%fe"), 404),
    "percent-encoded traversal": (_get(b"/vendor/%2e%2e/%2e%2e/process.py"), 404),
    "bad query": (_get(b"/explain.json?batch=%ff&%zz=1&&&=;"), 404),
    "NUL in the target": (_get(b"/\x00"), 400),
    "NUL in a header": (_get(b"/", b"X: a\x00b\r\n"), 400),
    "no text in the target": (_get(b"/\xff"), 400),
    "absolute-form target": (_get(b"http://localhost/metrics"), 400),
    "authority-form target": (b"CONNECT localhost:80 HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "asterisk-form target": (b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "no request": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20 + b"\r\n\r\n", 400),
    "long request line": (_get(b"/" + b"a" * 2 * MAX_HEADER_BYTES + b"b" * 65_536), 431),
    "many headers": (_get(b"/", b"X: y\r\n" * 20_000), 431),
    "two lengths": (_get(b"/", b"Content-Length: 1\r\nContent-Length: 2\r\n"), 400),
    "negative length": (_get(b"/", b"Content-Length: -1\r\n"), 400),
    "length of letters": (_get(b"/", b"Content-Length: 0x10\r\n"), 400),
    "endless length": (_control(b"Content-Length: " + b"9" * 400, b"wrong"), 400),
    "length and chunks": (_control(b"Content-Length: 4\r\nTransfer-Encoding: chunked", b"x") + b"0\r\n\r\n", 400),
    "chunks": (_control(b"Transfer-Encoding: chunked", b"x") + b"ffffffffffffffff\r\n", 411),
    "unknown coding": (_control(b"Transfer-Encoding: gzip, chunked", b"x"), 400),
    "coding with a blank before the colon": (_control(b"Transfer-Encoding : chunked", b"x"), 400),
    "folded coding": (_control(b"Transfer-Encoding:\r\n chunked", b"x") + b"0\r\n\r\n", 411),
    "no length": (b"POST /control HTTP/1.1\r\n" + HOST + b"\r\n", 403),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two hosts": (_get(b"/", HOST), 400),
    "unknown version without a host": (b"GET / HTTP/1.9\r\n\r\n", 505),
    "HTTP/2 in plain": (b"GET / HTTP/2.0\r\n" + HOST + b"\r\n", 505),
    "method that is not known": (b"BREW / HTTP/1.1\r\n" + HOST + b"\r\n", 405),
    "method in small letters": (b"get / HTTP/1.1\r\n" + HOST + b"\r\n", 405),
    "control by GET": (_get(b"/control"), 405),
    "half a header": (b"GET / HTTP/1.1\r\nHost: loc", 400),
    "token that is no text": (_control(b"Content-Length: 2", b"\xff\xfe") + b"{}", 403),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_requests(sidecar: SidecarProcess, name: str) -> None:
    request, wanted = MALFORMED[name]
    status, received = _talk(sidecar, request)
    assert status == wanted, received[:500]
    head, _, body = received.partition(b"\r\n\r\n")
    assert "error" in json.loads(body)
    for header, value in SECURITY_HEADERS:
        assert f"\r\n{header}: {value}\r\n".lower() in (head.decode("latin-1") + "\r\n").lower()
    assert "Traceback" not in sidecar.log.read_text()


def test_bodies_that_are_no_command(sidecar: SidecarProcess) -> None:
    for body in (
        b"\xff\xfe",
        b"[" * 4000,
        b'{"command": "pin", "k": 1' + b"0" * 4000 + b"}",
        b'{"command": "pin", "k": 1e999}',
        b"\x00",
    ):
        status, received = _talk(sidecar, _control(b"Content-Length: %d" % len(body), _token(sidecar)) + body)
        assert status in (400, 409), received[:500]
    assert "Traceback" not in sidecar.log.read_text()


def test_requests_in_one_packet_are_answered_in_order(sidecar: SidecarProcess) -> None:
    wanted = (b"/healthz", b"/no", b"/metrics", b"/status.json")
    _, received = _talk(sidecar, b"".join(_get(target) for target in wanted))
    assert re.findall(rb"HTTP/1\.1 (\d{3}) ", received) == [b"200", b"404", b"200", b"200"]


def test_a_request_hidden_in_a_body_is_not_answered(sidecar: SidecarProcess) -> None:
    hidden = _get(b"/metrics")
    for header in (b"Content-Length: %d" % len(hidden), b"Content-Length: 0\r\nTransfer-Encoding: chunked"):
        _, received = _talk(sidecar, _control(header, b"wrong") + hidden)
        assert received.count(b"HTTP/1.1 ") == 1
        _, received = _talk(sidecar, _get(b"/healthz", header + b"\r\n") + hidden)
        assert received.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize("path", ["/", "/metrics", "/status.json", "/history.json", "/healthz", "/status.js", "/no"])
def test_every_answer_has_the_security_headers(sidecar: SidecarProcess, path: str) -> None:
    for method in (b"GET", b"HEAD"):
        _, received = _talk(sidecar, method + b" " + path.encode() + b" HTTP/1.1\r\n" + HOST + b"\r\n")
        head, _, body = received.partition(b"\r\n\r\n")
        names = {line.partition(b":")[0].lower().decode() for line in head.split(b"\r\n")[1:]}
        assert {header.lower() for header, _ in SECURITY_HEADERS} <= names
        assert "server" not in names
        assert bool(body) == (method == b"GET")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200), ("localhost:9477", 200), ("LOCALHOST.", 200), ("127.0.0.1:1", 200), ("127.8.9.1", 200),
        ("[::1]:80", 200), ("metrics.example", 200), ("Metrics.Example:443", 200), (socket.gethostname(), 200),
        ("evil.example", 421), ("localhost.evil.example", 421), ("evil.example:9477", 421), ("10.0.0.1", 421), ("[fe80::1]", 421),
        ("0.0.0.0", 421), ("", 421), ("localhost@evil.example", 421), ("localhost/", 421), ("127.0.0.1.evil.example", 421),
        ("2130706433", 421), ("localhost:99999999", 421), ("[::1", 421), ("\xe9", 421),
    ],
)  # fmt: skip
def test_only_own_names_are_answered(sidecar: SidecarProcess, host: str, status: int) -> None:
    for target in (b"/metrics", b"/no"):
        request = b"GET " + target + b" HTTP/1.1\r\nHost: " + host.encode("latin-1") + b"\r\n\r\n"
        assert _talk(sidecar, request)[0] == (404 if status == 200 and target == b"/no" else status)
    assert (b" 421 " in _talk(sidecar, _control(b"Content-Length: 0", _token(sidecar)).replace(b"localhost", b"evil"))[1]) is True


def test_http_1_0_needs_no_host(sidecar: SidecarProcess) -> None:
    assert _talk(sidecar, b"GET /healthz HTTP/1.0\r\n\r\n")[0] == 200


def test_many_scrapers_at_once(sidecar: SidecarProcess) -> None:
    answers: list[str] = []
    threads = [Thread(target=lambda: answers.append(sidecar.get("/metrics"))) for _ in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert len(answers) == 100
    assert all(answer.endswith("\n") for answer in answers)
    # Some ticks at most: what differs between two renderings is the time of the process.
    assert len(set(answers)) < 50
