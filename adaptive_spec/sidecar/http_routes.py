"""What the sidecar's HTTP server answers: metrics, status, health, the status page and the commands of `adaptive-spec ctl`.

    GET  /             the status page              GET  /status.json  `status_document`
    GET  /metrics      Prometheus or OpenMetrics    GET  /healthz      200 while the sidecar's loop runs, else 503
    GET  /history.json `history_document`           GET  /explain.json[?batch=N]  `explain_document`
                                                    each with [dp_rank=N] for a data-parallel rank
    POST /control      {"command": NAME, "k": N}    with the header `Authorization: Bearer TOKEN`

The controller is never called here: the current view is read, and commands go through a queue to the thread of the loop.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources
from urllib.parse import parse_qs

from prometheus_client.exposition import choose_encoder

from adaptive_spec.client.sidecar import ALIVE_S
from adaptive_spec.domain.commands import CONTROL_COMMANDS
from adaptive_spec.sidecar.allowed_hosts import AllowedHosts
from adaptive_spec.sidecar.http_message import Answer, RefusedError, Request, to_json
from adaptive_spec.sidecar.metrics import metrics_registry
from adaptive_spec.sidecar.status_document import explain_document, history_document, status_document, view_of_rank
from adaptive_spec.sidecar.view import CurrentView, View

ANSWER_S = 5.0
"""How long POST /control waits for the loop."""
LOOK_S = 0.01
"""Between two looks at whether the loop has answered."""
TICK_S = 0.25
"""A document of the same view is made again after this long, for the ages in it. The loop replaces the view as often."""
MAX_DOCUMENTS = 32
"""Documents kept at a time: the explanations of some batch sizes, and one of each other kind."""
MAX_BODY_BYTES = 4096
_PAGE = {
    "": "text/html",
    "status.css": "text/css",
    "status.js": "text/javascript",
    "charts.js": "text/javascript",
    "vendor/uPlot.min.css": "text/css",
    "vendor/uPlot.iife.min.js": "text/javascript",
}
_OPENMETRICS = "application/openmetrics-text"


@dataclass
class Command:
    """A command of an operator. answer: set by the loop before `done`; "" = carried out, otherwise the reason it was not."""

    name: str
    k: int | None
    answer: str = ""
    done: threading.Event = field(default_factory=threading.Event)


class Routes:
    """Answers requests. token: required by POST /control. commands: taken by the loop."""

    def __init__(self, current_view: CurrentView, token: str, hosts: AllowedHosts) -> None:
        self.commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._current_view, self._token, self._hosts = current_view, token.encode(), hosts
        self._registry = metrics_registry(current_view)
        self._documents = Documents(current_view)
        self._gets: dict[str, Callable[[Request], Answer]] = {
            "/metrics": self._metrics,
            "/status.json": lambda request: self._of_rank(request, "status", self._status),
            "/history.json": lambda request: self._of_rank(request, "history", self._history),
            "/explain.json": self._explain,
            "/healthz": self._healthz,
        }
        folder = resources.files("adaptive_spec") / "sidecar" / "page"
        for name, kind in _PAGE.items():
            page = Answer(200, (folder / (name or "index.html")).read_bytes(), f"{kind}; charset=utf-8")
            self._gets[f"/{name}"] = lambda _, page=page: page  # type: ignore[misc]  # mypy: no default in a Callable

    async def answer(self, request: Request) -> Answer:
        """Return the answer. Raises RefusedError."""
        host = request.headers.get("host")
        if host is not None and not self._hosts.allow(host):  # HTTP/1.0 may do without; h11 refuses a later version without
            raise RefusedError(421, f"Host: {_shown(host)}: is not this sidecar; see allowed_hosts")
        if request.path == "/control":
            _check_method(request, "POST")
            return await self._control(request)
        if (route := self._gets.get(request.path)) is None:
            raise RefusedError(404, f"{_shown(request.path)}: no such page")
        _check_method(request, "GET", "HEAD")
        return route(request)

    def _metrics(self, request: Request) -> Answer:
        try:
            accept = request.headers.get("accept", "").encode("latin-1").decode("ascii")
            chosen = choose_encoder(accept)[1]
        except Exception as error:  # the library parses versions in it
            raise RefusedError(400, "Accept: must be media types") from error
        # One of two, whatever the versions a client lists, so that there are two documents a tick. Every name is legal in all.
        encode, content_type = choose_encoder(_OPENMETRICS if chosen.startswith(_OPENMETRICS) else "")
        return Answer(200, self._documents.get(content_type, lambda _: encode(self._registry)), content_type)

    def _status(self, view: View) -> bytes:
        return to_json(status_document(view, self._current_view.heartbeat_s, time.monotonic()))

    def _history(self, view: View) -> bytes:
        return to_json(history_document(view, time.monotonic()))

    def _explain(self, request: Request) -> Answer:
        try:
            batch_size = _asked(request, "batch", 1)
        except ValueError as error:
            raise RefusedError(404, str(error)) from error
        return self._of_rank(
            request, f"explain {batch_size}", lambda view: to_json(explain_document(view, batch_size, time.monotonic()))
        )

    def _of_rank(self, request: Request, name: str, make: Callable[[View], bytes]) -> Answer:
        """The document of the data-parallel rank that the request names, of the first without."""
        try:
            dp_rank = _asked(request, "dp_rank", 0)
            return Answer(200, self._documents.get(f"{name} {dp_rank}", lambda view: make(view_of_rank(view, dp_rank))))
        except ValueError as error:
            raise RefusedError(404, str(error)) from error

    def _healthz(self, _: Request) -> Answer:
        age_s = time.monotonic() - self._current_view.heartbeat_s
        document = {
            "alive": age_s <= ALIVE_S,
            "loop_age_s": round(age_s, 3),
            "engine_attached": self._current_view.view.attached,
        }
        return Answer(200 if age_s <= ALIVE_S else 503, to_json(document))

    async def _control(self, request: Request) -> Answer:
        shown = request.headers.get("authorization", "").removeprefix("Bearer ").encode("latin-1")
        if not hmac.compare_digest(shown, self._token):
            raise RefusedError(403, "wrong token: it must be the one in the sidecar's token file")
        try:
            body = json.loads(await request.read_body(MAX_BODY_BYTES))
            name, k = body["command"], body.get("k")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise RefusedError(400, 'the body must be JSON: {"command": NAME} or {"command": "pin", "k": N}') from error
        if name not in CONTROL_COMMANDS:
            raise RefusedError(400, f"command: {repr(name)[:80]}: must be one of {', '.join(CONTROL_COMMANDS)}")
        if (k is None) == (name == "pin") or (k is not None and (not isinstance(k, int) or isinstance(k, bool))):
            raise RefusedError(400, f"k: must be a whole number for pin and absent for other commands, got {repr(k)[:80]}")
        command = Command(name, k)
        self.commands.put(command)
        deadline_s = time.monotonic() + ANSWER_S
        while not command.done.is_set():
            if time.monotonic() > deadline_s:
                raise RefusedError(503, f"the sidecar's loop did not answer within {ANSWER_S:g} s")
            await asyncio.sleep(LOOK_S)
        if command.answer:
            raise RefusedError(409, command.answer)
        view = self._current_view.view
        return Answer(200, to_json({"done": True, "mode": status_document(view, 0.0, 0.0)["mode"]}))


class Documents:
    """Documents of the current view, each made once a tick for all who ask."""

    def __init__(self, current_view: CurrentView) -> None:
        self._current_view = current_view
        self._made: dict[str, tuple[View, float, bytes]] = {}

    def __len__(self) -> int:
        return len(self._made)

    def get(self, name: str, make: Callable[[View], bytes]) -> bytes:
        """Return the document of this name, made now or in this tick."""
        view, now_s = self._current_view.view, time.monotonic()
        kept = self._made.get(name)
        if kept is not None and kept[0] is view and now_s - kept[1] < TICK_S:
            return kept[2]
        document = make(view)
        if len(self._made) >= MAX_DOCUMENTS:
            self._made.clear()
        self._made[name] = view, now_s, document
        return document


def _asked(request: Request, name: str, least: int) -> int | None:
    asked = parse_qs(request.query, keep_blank_values=True).get(name)
    return None if asked is None else whole_number(asked[-1], name, least)


def whole_number(text: str, name: str = "batch", least: int = 1) -> int:
    """Parse a number of a request. Raises ValueError with one line."""
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise ValueError(f"{name}: must be a whole number >= {least}, got {text[:40]!r}")
    return int(text)


def _check_method(request: Request, *allowed: str) -> None:
    if request.method not in allowed:
        raise RefusedError(405, f"{_shown(request.method)}: not allowed here", (("Allow", ", ".join(allowed)),))


def _shown(text: str) -> str:
    return repr(text[:80])
