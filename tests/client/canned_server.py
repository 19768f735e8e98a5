"""An HTTP server in a thread that gives prepared answers and remembers the requests."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Seen(NamedTuple):
    """One request: "METHOD /path", its headers and body."""

    line: str
    headers: dict[str, str]
    body: bytes


class CannedServer:
    """answers: (status, body) by "METHOD /path"; any other request gets 404. requests: those received, in order.

    headers: sent with every answer.
    """

    def __init__(self, answers: dict[str, tuple[int, bytes]]) -> None:
        self.answers, self.requests = answers, list[Seen]()
        self.headers: dict[str, str] = {}
        canned = self

        class Handler(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                line = f"{self.command} {self.path}"
                canned.requests.append(Seen(line, dict(self.headers), body))
                status, answer = canned.answers.get(line, (404, b"{}"))
                self.send_response(status)
                self.send_header("Content-Length", str(len(answer)))
                for name, value in canned.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(OSError):  # the client may have left
                    self.wfile.write(answer)

            do_GET = do_POST = _answer  # noqa: N815 - the names that http.server calls

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @contextlib.contextmanager
    def running(self) -> Iterator[CannedServer]:
        """Serve while the block runs."""
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            thread.join()
            self._server.server_close()
