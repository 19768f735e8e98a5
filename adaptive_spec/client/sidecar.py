"""Client of the sidecar's HTTP server, for `ctl`, `sweep`, `doctor` and the demo."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from adaptive_spec.errors import BadInput

ADDRESS_NAME = "sidecar.json"
TOKEN_NAME = "control.token"


class ControlClient:
    """Client of one sidecar.

    url: "http://host:port". token: for `send`, "" without one. timeout_s: of each request. Raises BadInput for other URLs.
    """

    def __init__(self, url: str, token: str = "", timeout_s: float = 10.0) -> None:
        if not url.startswith(("http://", "https://")):
            raise BadInput(f"--url: must begin with http:// or https://, got {url!r}")
        self.url = url.rstrip("/")
        self._token = token
        self._timeout_s = timeout_s
        # No proxy of the environment: a sidecar runs on this host or in this cluster.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    @classmethod
    def find(cls, runtime_dir: Path, url: str | None, token_file: Path | None) -> ControlClient:
        """Use the URL, or without one the address and token in the sidecar's runtime directory. Raises BadInput."""
        if url is None:
            try:
                url = str(json.loads((runtime_dir / ADDRESS_NAME).read_bytes())["url"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise BadInput(f"--runtime-dir: '{runtime_dir}': no sidecar runs there; give --url") from error
        path = token_file or runtime_dir / TOKEN_NAME
        try:
            token = path.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            if token_file:
                raise BadInput(f"--token-file: '{path}': cannot be read") from error
            token = ""
        return cls(url, token)

    def status(self) -> dict[str, Any]:
        """Return /status.json. Raises BadInput when the sidecar cannot be reached."""
        return self._ask("/status.json", None)

    def send(self, command: str, k: int | None = None) -> dict[str, Any]:
        """Send a command and return the answer. Raises BadInput with the sidecar's message when it refuses."""
        return self._ask("/control", {"command": command} if k is None else {"command": command, "k": k})

    def _ask(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        data = json.dumps(body).encode() if body is not None else None
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._token}"} if body is not None else {}
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with self._opener.open(request, timeout=self._timeout_s) as answer:
                document = json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                raise BadInput(f"{self.url}: refused: {_reason(error)}") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise BadInput(f"{self.url}: no sidecar answers: {getattr(reason, 'strerror', None) or reason}") from error
        if not isinstance(document, dict):
            raise BadInput(f"{self.url}: no sidecar answers: the answer is not a JSON object")
        return document


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"status {error.code}"
