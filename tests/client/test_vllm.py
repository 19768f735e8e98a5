"""The client of vLLM's API against canned answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from adaptive_spec.client.vllm import ServerApi
from adaptive_spec.errors import BadInput


class Canned(BaseHTTPRequestHandler):
    asked: ClassVar[list[dict[str, Any]]] = []
    models: ClassVar[Any] = {"data": [{"id": "tiny"}]}

    def log_message(self, *_: Any) -> None: ...

    def _send(self, body: bytes, kind: str = "application/json", status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:  # named by the standard library
        self._send(json.dumps(self.models).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        if body["prompt"] == "bad":
            self._send(b'{"error": "no"}', status=400)
        elif body["stream"]:
            chunks = [[11], [12, 13], []]
            events = [f"data: {json.dumps({'choices': [{'token_ids': ids}]})}\n\n" for ids in chunks]
            self._send("".join([*events, "data: [DONE]\n\n"]).encode(), "text/event-stream")
        else:
            answer = {"choices": [{"token_ids": [11, 12, 13]}], "usage": {"completion_tokens": 3}}
            self._send(json.dumps(answer).encode())


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Canned, "asked", [])
    with ThreadingHTTPServer(("127.0.0.1", 0), Canned) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_generate_asks_the_servers_model_for_exactly_so_many_greedy_tokens(url: str) -> None:
    assert ServerApi(url).generate("a0 a1", 3).ids == [11, 12, 13]
    [body] = Canned.asked
    wanted = {"model": "tiny", "prompt": "a0 a1", "temperature": 0, "max_tokens": 3, "ignore_eos": True, "stream": False}
    assert body.items() >= wanted.items()


def test_a_stream_counts_the_tokens_of_every_event(url: str) -> None:
    with ServerApi(url, model="tiny").stream("a0 a1", 3) as tokens:
        assert list(tokens) == [1, 3, 3]


def test_a_refused_request_is_an_error(url: str) -> None:
    with pytest.raises(OSError, match="status 400"):
        ServerApi(url).generate("bad", 3)


@pytest.mark.parametrize("models", [{}, {"data": []}, [], {"data": [{}]}])
def test_another_server_is_refused(url: str, models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Canned, "models", models)
    with pytest.raises(BadInput, match="must be a running vLLM server"):
        ServerApi(url).max_running_requests()


def test_no_server() -> None:
    with pytest.raises(BadInput, match="must be a running vLLM server"):
        ServerApi("http://127.0.0.1:9").max_running_requests()
