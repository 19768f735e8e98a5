"""The other end of the sidecar's HTTP server: how `ctl`, `sweep`, `doctor` and the demo talk to a running sidecar."""

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
    """Asks one sidecar. url: "http://host:port". token: for `send` only, "" where it is not needed."""

    def __init__(self, url: str, token: str = "", timeout_s: float = 10.0) -> None:
        if not url.startswith(("http://", "https://")):
            raise BadInput(f"--url: {url!r} is not allowed: must begin with http:// or https://")
        self.url = url.rstrip("/")
        self._token = token
        self._timeout_s = timeout_s
        # A proxy of the environment is for the world outside, not for a sidecar.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    @classmethod
    def find(cls, runtime_dir: Path, url: str | None, token_file: Path | None) -> ControlClient:
        """Find a sidecar by its runtime directory, or take the URL given. Raises BadInput."""
        if url is None:
            try:
                url = str(json.loads((runtime_dir / ADDRESS_NAME).read_bytes())["url"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise BadInput(f"--runtime-dir: '{runtime_dir}' is not allowed: no sidecar runs there; give --url") from error
        path = token_file or runtime_dir / TOKEN_NAME
        try:
            token = path.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            if token_file:
                raise BadInput(f"--token-file: '{path}' is not allowed: cannot be read") from error
            token = ""
        return cls(url, token)

    def status(self) -> dict[str, Any]:
        """Return /status.json. Raises BadInput when the sidecar cannot be reached."""
        return self._ask("/status.json", None)

    def send(self, command: str, k: int | None = None) -> dict[str, Any]:
        """Send a command. Raises BadInput with the sidecar's own words when it refuses."""
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
            raise BadInput(f"{self.url}: no sidecar answers: the answer is not one of a sidecar")
        return document


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"status {error.code}"
