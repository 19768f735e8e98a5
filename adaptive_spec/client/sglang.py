"""Client of a running SGLang server's own HTTP API."""

from __future__ import annotations

import contextlib
import http.client
import json
from collections.abc import Iterator
from typing import Any

from adaptive_spec.client.server import HttpServer, Output
from adaptive_spec.errors import BadInput


class ServerApi(HttpServer):
    """See `LlmServer`."""

    def info(self) -> dict[str, Any]:
        """Return the server's information. Raises BadInput when no SGLang server answers."""
        reason = "no answer"
        for path in ("/server_info", "/get_server_info"):
            try:
                status, body = self.ask("GET", path, None, 10.0)
                document = json.loads(body) if status == 200 else None
            except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
                reason = str(getattr(error, "strerror", None) or error)
                continue
            if isinstance(document, dict):
                return document
            reason = f"status {status} for {path}"
        raise BadInput(f"--url: '{self.url}': {reason}; must be a running SGLang server")

    def max_running_requests(self) -> int | None:
        most = self.info().get("max_running_requests")
        return most if isinstance(most, int) and most > 0 else None

    def generate(self, text: str, tokens: int) -> Output:
        document = self.post("/generate", _request(text, tokens, stream=False))
        return Output(list(document["output_ids"]), dict(document["meta_info"]))

    @contextlib.contextmanager
    def stream(self, text: str, tokens: int) -> Iterator[Iterator[int]]:
        with self.events("/generate", _request(text, tokens, stream=True)) as documents:
            yield (int(document["meta_info"]["completion_tokens"]) for document in documents)


def _request(text: str, tokens: int, stream: bool) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    return {"text": text, "sampling_params": sampling, "stream": stream}
