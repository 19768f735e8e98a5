"""The sidecar's HTTP server: metrics, status, health, the status page and the commands of `adaptive-spec ctl`.

    GET  /             the status page              GET  /status.json  `status_document`
    GET  /metrics      Prometheus or OpenMetrics    GET  /healthz      200 while the sidecar's loop runs, else 503
    GET  /history.json `history_document`           GET  /explain.json[?batch=N]  `explain_document`
    POST /control      {"command": NAME, "k": N}    with the header `Authorization: Bearer TOKEN`

Its threads never call the controller. They read the current view; commands go through a queue to the thread of the loop.
"""

from __future__ import annotations

import hmac
import json
import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import bottle
from prometheus_client.exposition import choose_encoder
from waitress import wasyncore
from waitress.server import create_server

from adaptive_spec.domain.commands import CONTROL_COMMANDS
from adaptive_spec.sidecar.listening import listening_socket
from adaptive_spec.sidecar.metrics import metrics_registry
from adaptive_spec.sidecar.status_document import explain_document, history_document, status_document
from adaptive_spec.sidecar.view import CurrentView

ALIVE_S = 5.0
"""/healthz answers 503 when the loop has not run for this long."""
ANSWER_S = 5.0
"""How long POST /control waits for the loop."""
CLOSING_LOOK_S = 0.1
MAX_BODY_BYTES = 4096
_PAGE = {
    "": "text/html",
    "status.css": "text/css",
    "status.js": "text/javascript",
    "charts.js": "text/javascript",
    "vendor/uPlot.min.css": "text/css",
    "vendor/uPlot.iife.min.js": "text/javascript",
}
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'self'",
}


@dataclass
class Command:
    """A command of an operator. answer: set by the loop before `done`; "" = carried out, otherwise the reason it was not."""

    name: str
    k: int | None
    answer: str = ""
    done: threading.Event = field(default_factory=threading.Event)


class WebServer:
    """Serves the current view on host:port (port 0: a free one) in its own threads.

    token: required by POST /control. Raises BadInput when the address cannot be bound.
    """

    def __init__(self, current_view: CurrentView, host: str, port: int, token: str) -> None:
        self.commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._current_view = current_view
        self._token = token.encode()
        self._registry = metrics_registry(current_view)
        app = bottle.Bottle()
        app.default_error_handler = _plain_error
        app.route("/metrics", "GET", self._metrics)
        app.route("/status.json", "GET", self._status)
        app.route("/history.json", "GET", self._history)
        app.route("/explain.json", "GET", self._explain)
        app.route("/healthz", "GET", self._healthz)
        app.route("/control", "POST", self._control)
        app.route("/", "GET", lambda: _page(""))
        app.route("/<name:path>", "GET", _page)
        listening = listening_socket(host, port, "port")
        self._sockets: dict[int, Any] = {}
        self._server = create_server(app, map=self._sockets, sockets=[listening], threads=4, ident=None)
        self.port = int(listening.getsockname()[1])
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}"
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="http", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the server and release the port."""
        self._closing.set()
        self._thread.join(2.0)
        self._server.task_dispatcher.shutdown()

    def _serve(self) -> None:
        # The thread that waits on the sockets closes them: waitress offers no other clean way to end.
        while not self._closing.is_set():
            wasyncore.loop(timeout=CLOSING_LOOK_S, map=self._sockets, count=1)
        for channel in list(self._sockets.values()):
            channel.close()

    def _metrics(self) -> bytes:
        encode, content_type = choose_encoder(bottle.request.headers.get("Accept", ""))
        bottle.response.content_type = content_type
        return encode(self._registry)

    def _status(self) -> str:
        return _json(self._status_document())

    def _history(self) -> str:
        return _json(history_document(self._current_view.view, time.monotonic()))

    def _explain(self) -> str:
        asked = bottle.request.query.get("batch")
        try:
            batch_size = None if asked is None else whole_number(asked)
            return _json(explain_document(self._current_view.view, batch_size, time.monotonic()))
        except ValueError as error:
            return _refuse(404, str(error))

    def _healthz(self) -> str:
        age_s = time.monotonic() - self._current_view.heartbeat_s
        if age_s > ALIVE_S:
            bottle.response.status = 503
        return _json(
            {"alive": age_s <= ALIVE_S, "loop_age_s": round(age_s, 3), "engine_attached": self._current_view.view.attached}
        )

    def _control(self) -> str:
        shown = bottle.request.environ.get("HTTP_AUTHORIZATION", "").removeprefix("Bearer ").encode("latin-1")
        if not hmac.compare_digest(shown, self._token):
            return _refuse(403, "wrong token: it must be the one in the sidecar's token file")
        if bottle.request.content_length > MAX_BODY_BYTES:
            return _refuse(413, f"body: must be at most {MAX_BODY_BYTES} bytes")
        try:
            body = json.loads(bottle.request.body.read(MAX_BODY_BYTES))
            name, k = body["command"], body.get("k")
        except (ValueError, TypeError, KeyError, AttributeError):
            return _refuse(400, 'the body must be JSON: {"command": NAME} or {"command": "pin", "k": N}')
        if name not in CONTROL_COMMANDS:
            return _refuse(400, f"command: {name!r}: must be one of {', '.join(CONTROL_COMMANDS)}")
        if (k is None) == (name == "pin") or (k is not None and (not isinstance(k, int) or isinstance(k, bool))):
            return _refuse(400, f"k: must be a whole number for pin and absent for other commands, got {k!r}")
        command = Command(name, k)
        self.commands.put(command)
        if not command.done.wait(ANSWER_S):
            return _refuse(503, f"the sidecar's loop did not answer within {ANSWER_S:g} s")
        if command.answer:
            return _refuse(409, command.answer)
        return _json({"done": True, "mode": self._status_document()["mode"]})

    def _status_document(self) -> dict[str, Any]:
        return status_document(self._current_view.view, self._current_view.heartbeat_s, time.monotonic())


def whole_number(text: str) -> int:
    """Parse the `batch` of a request. Raises ValueError with one line."""
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise ValueError(f"batch: must be a whole number >= 1, got {text[:40]!r}")
    return int(text)


def _page(name: str) -> bytes | str:
    if name not in _PAGE:
        return _refuse(404, f"/{name}: no such page")
    bottle.response.content_type = f"{_PAGE[name]}; charset=utf-8"
    for header, value in _HEADERS.items():
        bottle.response.set_header(header, value)
    return (resources.files("adaptive_spec") / "sidecar" / "page" / (name or "index.html")).read_bytes()


def _json(document: Mapping[str, Any]) -> str:
    bottle.response.content_type = "application/json"
    bottle.response.set_header("Cache-Control", "no-store")
    return json.dumps(_finite(document), allow_nan=False)


def _finite(value: Any) -> Any:
    """Replace NaN and infinities, which JSON does not have, by None, and numpy numbers by plain ones."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def _refuse(status: int, reason: str) -> str:
    bottle.response.status = status
    return _json({"error": reason})


def _plain_error(error: Any) -> str:
    bottle.response.content_type = "application/json"
    return json.dumps({"error": error.status_line})
