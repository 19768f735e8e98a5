"""Client of a running vLLM server's OpenAI API."""

from __future__ import annotations

import contextlib
import http.client
import json
from collections.abc import Iterator
from typing import Any

from adaptive_spec.client.server import HttpServer, Output
from adaptive_spec.errors import BadInput


class ServerApi(HttpServer):
    """See `LlmServer`. model: the name in requests, by default the first one that the server has."""

    def __init__(self, url: str, api_key: str = "", model: str | None = None) -> None:
        super().__init__(url, api_key)
        self._model = model

    @property
    def model(self) -> str:
        """Raises BadInput when no vLLM server answers."""
        if self._model is None:
            reason = "no model"
            try:
                status, body = self.ask("GET", "/v1/models", None, 10.0)
                if status == 200:
                    self._model = str(json.loads(body)["data"][0]["id"])
                else:
                    reason = f"status {status} for /v1/models"
            except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, RecursionError) as error:
                reason = str(getattr(error, "strerror", None) or error)
            if self._model is None:
                raise BadInput(f"--url: '{self.url}': {reason}; must be a running vLLM server")
        return self._model

    def max_running_requests(self) -> int | None:
        """None: vLLM's API does not tell."""
        assert self.model
        return None

    def generate(self, text: str, tokens: int) -> Output:
        document = self.post("/v1/completions", self._request(text, tokens, stream=False))
        return Output(list(document["choices"][0]["token_ids"]), dict(document["usage"]))

    @contextlib.contextmanager
    def stream(self, text: str, tokens: int) -> Iterator[Iterator[int]]:
        with self.events("/v1/completions", self._request(text, tokens, stream=True)) as documents:
            yield _tokens_so_far(documents)

    def _request(self, text: str, tokens: int, stream: bool) -> dict[str, Any]:
        return {
            "model": self.model, "prompt": text, "temperature": 0, "max_tokens": tokens, "ignore_eos": True, "stream": stream,
            "return_token_ids": True,
        }  # fmt: skip


def _tokens_so_far(documents: Iterator[dict[str, Any]]) -> Iterator[int]:
    count = 0
    for document in documents:
        for choice in document.get("choices") or ():
            count += len(choice.get("token_ids") or ())
            yield count
