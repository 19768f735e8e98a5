"""What clients of an LLM server's own HTTP API share, and requests that keep its batch at one size."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

from adaptive_spec.client.address import checked_url
from adaptive_spec.errors import one_line

TIMEOUT_S = 120.0
LARGEST_ANSWER = 16 << 20
"""Bytes of an answer, or of a line of an event stream."""


class Output(NamedTuple):
    """The answer to a request. ids: output tokens. meta: what else the server says of it."""

    ids: list[int]
    meta: dict[str, Any]


class LlmServer(Protocol):
    """What is asked of a server, whichever its engine. Prompts are texts, decoding is greedy."""

    url: str

    def max_running_requests(self) -> int | None:
        """Most requests in a batch, None where the server does not tell. Raises BadInput when it does not answer."""
        ...

    def generate(self, text: str, tokens: int) -> Output:
        """Return a continuation of exactly `tokens` tokens. Raises OSError, HTTPException, ValueError or KeyError."""
        ...

    def stream(self, text: str, tokens: int) -> contextlib.AbstractContextManager[Iterator[int]]:
        """Like `generate`, as an iterator over the number of tokens so far. Leaving the block aborts the request."""
        ...


class HttpServer:
    """Connections to one server. url: "http://host:port". api_key: "" without one. Raises BadInput for another form of URL."""

    def __init__(self, url: str, api_key: str = "") -> None:
        parts = urlsplit(checked_url(url if "//" in url else f"http://{url}"))
        self.url = f"{parts.scheme}://{parts.netloc}"
        self._host, self._port, self._secure = parts.hostname or "", parts.port, parts.scheme == "https"
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})

    def ask(
        self, method: str, path: str, body: dict[str, Any] | None, timeout_s: float, largest: int | None = None
    ) -> tuple[int, bytes]:
        """Return status and body, of at most `largest` bytes (None: LARGEST_ANSWER). Follows no redirect.

        timeout_s: of connecting and of each read. Raises OSError or HTTPException.
        """
        largest = LARGEST_ANSWER if largest is None else largest
        connection = self.connection(timeout_s)
        try:
            connection.request(method, path, json.dumps(body) if body is not None else None, self._headers)
            answer = connection.getresponse()
            content = answer.read(largest + 1)
            if len(content) > largest:
                raise OSError(f"the answer is longer than {largest} bytes")
            if answer.length:  # what is missing: `read` of a number of bytes does not tell
                raise OSError("the answer ended before its end")
            return answer.status, content
        finally:
            connection.close()

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Return the document of a successful request. Raises OSError for another status."""
        status, answer = self.ask("POST", path, body, TIMEOUT_S)
        if status != 200:
            raise OSError(f"status {status}: {answer[:200].decode(errors='replace')}")
        return json.loads(answer)

    @contextlib.contextmanager
    def events(self, path: str, body: dict[str, Any]) -> Iterator[Iterator[dict[str, Any]]]:
        """The documents of an event stream. Leaving the block closes the connection."""
        connection = self.connection(TIMEOUT_S)
        try:
            connection.request("POST", path, json.dumps(body), self._headers)
            answer = connection.getresponse()
            if answer.status != 200:
                raise OSError(f"status {answer.status}: {answer.read(200).decode(errors='replace')}")
            yield _documents(answer)
        finally:
            connection.close()

    def connection(self, timeout_s: float) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        return kind(self._host, self._port, timeout=timeout_s)


def _documents(answer: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    while line := answer.readline(LARGEST_ANSWER):
        if line.startswith(b"data: {"):
            document = json.loads(line[len(b"data: ") :])
            if "error" in document:
                raise OSError(str(document["error"]))
            yield document


class HeldBatch:
    """Keeps exactly `size` requests running: a request that ends is replaced at once. Context manager.

    prompts: texts, used in turn. tokens: length of a request. failure: message of the first failure, None without one.
    """

    def __init__(self, api: LlmServer, size: int, prompts: Sequence[str], tokens: int) -> None:
        self._api, self._prompts, self._tokens = api, prompts, tokens
        self._stop = threading.Event()
        self._running = [threading.Event() for _ in range(size)]
        self._threads = [threading.Thread(target=self._keep, args=(slot,), daemon=True) for slot in range(size)]
        self.failure: str | None = None

    def __enter__(self) -> HeldBatch:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(TIMEOUT_S)

    def wait(self, timeout_s: float) -> bool:
        """Wait up to timeout_s for each request to start; return whether all run and none has failed."""
        return all(event.wait(timeout_s) for event in self._running) and self.failure is None

    def _keep(self, slot: int) -> None:
        turn = slot
        while not self._stop.is_set() and self.failure is None:
            try:
                with self._api.stream(self._prompts[turn % len(self._prompts)], self._tokens) as tokens:
                    for count in tokens:
                        if count >= 2:
                            self._running[slot].set()
                        if self._stop.is_set():
                            return
            except Exception as error:  # whatever the server answers
                self.failure = self.failure or one_line(error)
            turn += len(self._threads)
        self._running[slot].set()
