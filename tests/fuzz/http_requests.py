"""Bytes on the sidecar's port, sent to a real sidecar process with an engine's ring beside it.

Which server answers does not matter here: the answers are checked, the log, and the memory of the process.
"""

from __future__ import annotations

import http.client
import io
import json
import os
import re
import socket
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

from adaptive_spec.client.sidecar import TOKEN_NAME
from tests.fuzz.target import SHARED_MEMORY, FileTarget
from tests.support.numbers_engine import NumbersEngine
from tests.support.processes import SidecarProcess

ANSWER_S = 30.0
LARGEST_ANSWER = 4 << 20
LARGEST_GROWTH_KB = 100_000
CHECK_EVERY = 500
"""Inputs between two looks at health, memory and mode."""
TOKEN = b"@TOKEN@"
"""Stands for the right token in an input."""
WITHOUT_TOKEN = {"mode": "active"}
SERVER_ERRORS = {b"501", b"503", b"505"}
"""Documented: method or version that is not known, the loop does not answer or too many connections."""
STATUS = re.compile(rb"^HTTP/1\.[01] (\d{3}) [^\r\n]*\r\n")


class HttpRequests(FileTarget):
    """The whole input is what a client sends before it closes its half of the connection."""

    name = "http"
    longest = 4096

    def __init__(self) -> None:
        super().__init__()
        self._home = tempfile.TemporaryDirectory(
            prefix="adaptive-spec-fuzz-", dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
        )
        runtime = Path(self._home.name) / "run"
        self._engine = NumbersEngine(runtime)
        for _ in range(50):
            self._engine.step()
        self._sidecar = SidecarProcess(runtime, Path(self._home.name) / "profiles")
        parts = urlsplit(self._sidecar.url)
        self._address = (str(parts.hostname), int(parts.port or 0))
        self._token = (runtime / TOKEN_NAME).read_bytes().strip()
        self._sidecar.wait_status(lambda status: status["engine_attached"], "the sidecar to attach")
        self._seen = 0
        self._first_kb = 0
        self._tokens_sent = False

    def seeds(self) -> dict[str, bytes]:
        def get(path: str, *headers: str) -> bytes:
            return "\r\n".join([f"GET {path} HTTP/1.1", "Host: 127.0.0.1", "Connection: close", *headers, "", ""]).encode()

        def post(body: bytes, token: bytes = TOKEN, *headers: bytes) -> bytes:
            head = [
                b"POST /control HTTP/1.1",
                b"Host: 127.0.0.1",
                b"Connection: close",
                b"Authorization: Bearer " + token,
                *headers,
            ]
            return b"\r\n".join([*head, b"Content-Length: %d" % len(body), b"", body])

        chunked = b"POST /control HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer @TOKEN@\r\nTransfer-Encoding: chunked\r\n\r\n"
        return {
            "page": get("/"), "metrics": get("/metrics", "Accept: application/openmetrics-text; version=1.0.0, text/plain;q=0.5"),
            "status": get("/status.json"), "history": get("/history.json"), "explain": get("/explain.json?batch=2"),
            "explain_bad": get("/explain.json?batch=%00%ff"), "healthz": get("/healthz"),
            "script": get("/vendor/uPlot.iife.min.js"),
            "traversal": get("/%2e%2e/..//etc/passwd"), "pause": post(b'{"command": "pause"}'),
            "pin": post(b'{"command": "pin", "k": 2}'), "resume": post(b'{"command": "resume"}'), "deep": post(b"[" * 2000),
            "huge_k": post(b'{"command": "pin", "k": 1' + b"0" * 400 + b"}"), "wrong": post(b'{"command": "pause"}', b"wrong"),
            "both": post(b"{}", TOKEN, b"Transfer-Encoding: chunked"), "length": post(b"{}").replace(b"Length: 2", b"Length: -2"),
            "chunked": chunked + b"5\r\n{\"com\r\n0\r\n\r\n", "chunk_size": chunked + b"ffffffffffffffff\r\nx",
            "old": b"GET /healthz HTTP/1.0\r\n\r\n", "none": b"\r\n\r\n", "head": get("/metrics").replace(b"GET", b"HEAD", 1),
            "options": get("*").replace(b"GET", b"OPTIONS", 1), "upgrade": get("/", "Upgrade: websocket"),
            "accept": get("/metrics", "Accept: \xff"),
            "pipeline": get("/healthz").replace(b"close", b"keep-alive") * 3, "fold": get("/", "X: a\r\n b"),
            "tls": b"\x16\x03\x01\x00\xa5\x01",
            "host": get("/").replace(b"127.0.0.1", b"evil.example"), "absolute": get("http://evil.example/"),
            "origin": get("/", "Origin: null"),
        }  # fmt: skip

    def run(self, data: bytes) -> str:
        self._seen += 1
        self._tokens_sent |= TOKEN in data
        answer = self._sent(data.replace(TOKEN, self._token))
        status = self._checked(answer)
        assert TOKEN in data or self._token not in answer, "the token is in an answer"
        if self._seen % CHECK_EVERY == 0:
            self._looked_at()
        return "" if status == b"200" else f"status {status.decode() or 'none'}"

    def _sent(self, data: bytes) -> bytes:
        with socket.create_connection(self._address, ANSWER_S) as connection:
            try:
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                answer = b""
                while len(answer) <= LARGEST_ANSWER and (piece := connection.recv(1 << 16)):
                    answer += piece
            except (ConnectionResetError, BrokenPipeError):
                return b""  # the server has closed before it had read everything
        assert len(answer) <= LARGEST_ANSWER, "an answer without an end"
        return answer

    def _checked(self, answer: bytes) -> bytes:
        """Return the status of the first answer, b"" for none. Raises AssertionError for one that is not documented."""
        if not answer:
            return b""
        found = STATUS.match(answer)
        if found is None:  # an answer to HTTP/0.9 has no status line
            assert b"Traceback" not in answer, answer
            return b""
        status = found[1]
        assert status[:1] in b"1234" or status in SERVER_ERRORS, answer[:500]
        assert b"Traceback (most recent call last)" not in answer, answer
        head, _, body = answer.partition(b"\r\n\r\n")
        headers = http.client.parse_headers(io.BytesIO(head.partition(b"\r\n")[2] + b"\r\n\r\n"))
        if (
            status == b"200"
            and headers.get_content_type() == "application/json"
            and headers.get("Content-Length") == str(len(body))
        ):
            json.loads(body)
        return status

    def _looked_at(self) -> None:
        """Health, memory, log and mode of the process."""
        assert self._sidecar.process.poll() is None, self._log()
        status = self._sidecar.status()
        assert json.loads(self._sidecar.get("/healthz"))["alive"]
        assert self._tokens_sent or status["mode"] != "paused", "a command without the token was carried out"
        assert not status["failures"], status["failures"]
        assert "Traceback" not in self._log(), self._log()
        used_kb = _resident_kb(self._sidecar.process.pid)
        self._first_kb = self._first_kb or used_kb
        assert used_kb - self._first_kb < LARGEST_GROWTH_KB, f"{used_kb} KB of memory, {self._first_kb} KB at first"
        descriptors = len(os.listdir(f"/proc/{self._sidecar.process.pid}/fd"))
        assert descriptors < 200, f"{descriptors} open files"

    def _log(self) -> str:
        return self._sidecar.log.read_text(errors="replace")[-4000:]

    def close(self) -> None:
        try:
            time.sleep(0)
            self._looked_at()
            assert "Traceback" not in self._sidecar.stop()
        finally:
            self._sidecar.__exit__(None, None, None)
            self._engine.close()
            self._home.cleanup()
            super().close()


def _resident_kb(pid: int) -> int:
    found = re.search(r"^VmRSS:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0
