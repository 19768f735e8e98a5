"""Client of a running SGLang server's own HTTP API, for sweeps and demonstrations."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from adaptive_spec.errors import BadInput, one_line

TIMEOUT_S = 120.0


class Output(NamedTuple):
    """The answer to a request. ids: output tokens. meta: SGLang's meta_info."""

    ids: list[int]
    meta: dict[str, Any]


class ServerApi:
    """Client of one server. url: "http://host:port". api_key: "" without one. Raises BadInput for another form of URL."""

    def __init__(self, url: str, api_key: str = "") -> None:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadInput(f"--url: must be like http://HOST:PORT, got {url!r}")
        self.url = f"{parts.scheme}://{parts.netloc}"
        self._host, self._port, self._secure = parts.hostname, parts.port, parts.scheme == "https"
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})

    def info(self) -> dict[str, Any]:
        """Return the server's information. Raises BadInput when no SGLang server answers."""
        reason = "no answer"
        for path in ("/server_info", "/get_server_info"):
            try:
                status, body = self._ask("GET", path, None, 10.0)
                document = json.loads(body) if status == 200 else None
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = str(getattr(error, "strerror", None) or error)
                continue
            if isinstance(document, dict):
                return document
            reason = f"status {status} for {path}"
        raise BadInput(f"--url: '{self.url}': {reason}; must be a running SGLang server")

    def generate(self, text: str, tokens: int) -> Output:
        """Return a greedy continuation of exactly `tokens` tokens. Raises OSError or HTTPException when the request fails."""
        status, body = self._ask("POST", "/generate", _request(text, tokens, stream=False), TIMEOUT_S)
        if status != 200:
            raise OSError(f"status {status}: {body[:200].decode(errors='replace')}")
        document = json.loads(body)
        return Output(list(document["output_ids"]), dict(document["meta_info"]))

    @contextlib.contextmanager
    def stream(self, text: str, tokens: int) -> Iterator[Iterator[int]]:
        """Like `generate`, as an iterator over the number of tokens so far. Leaving the block aborts the request."""
        connection = self._connection(TIMEOUT_S)
        try:
            connection.request("POST", "/generate", json.dumps(_request(text, tokens, stream=True)), self._headers)
            answer = connection.getresponse()
            if answer.status != 200:
                raise OSError(f"status {answer.status}: {answer.read(200).decode(errors='replace')}")
            yield _tokens_so_far(answer)
        finally:
            connection.close()

    def _ask(self, method: str, path: str, body: dict[str, Any] | None, timeout_s: float) -> tuple[int, bytes]:
        connection = self._connection(timeout_s)
        try:
            connection.request(method, path, json.dumps(body) if body is not None else None, self._headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def _connection(self, timeout_s: float) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        return kind(self._host, self._port, timeout=timeout_s)


def _request(text: str, tokens: int, stream: bool) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    return {"text": text, "sampling_params": sampling, "stream": stream}


def _tokens_so_far(answer: http.client.HTTPResponse) -> Iterator[int]:
    for line in answer:
        if line.startswith(b"data: {"):
            document = json.loads(line[len(b"data: ") :])
            if "error" in document:
                raise OSError(str(document["error"]))
            yield int(document["meta_info"]["completion_tokens"])


class HeldBatch:
    """Keeps exactly `size` requests running: a request that ends is replaced at once. Context manager.

    prompts: texts, used in turn. tokens: length of a request. failure: message of the first failure, None without one.
    """

    def __init__(self, api: ServerApi, size: int, prompts: Sequence[str], tokens: int) -> None:
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
            except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
                self.failure = self.failure or one_line(error)
            turn += len(self._threads)
        self._running[slot].set()
