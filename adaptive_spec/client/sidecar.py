"""Client of the sidecar's HTTP server, for `ctl`, `sweep`, `doctor` and the demo."""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from adaptive_spec.client.address import checked_url, shown_url
from adaptive_spec.client.tls import ClientTls
from adaptive_spec.errors import BadInput, one_line
from adaptive_spec.regular_file import read_regular_file, read_token
from adaptive_spec.runtime_folder import check_runtime_dir, role_holder, role_is_held

NO_TLS = ClientTls()
ADDRESS_NAME = "sidecar.json"
TOKEN_NAME = "control.token"
HEARTBEAT_NAME = "sidecar.alive"
"""Empty; the sidecar's loop sets its time of change every second."""
ALIVE_S = 5.0
"""A sidecar whose loop has not run for this long does not live: `doctor --alive` and /healthz say so."""
LARGEST_BYTES = 1 << 14
"""Of an address or a token file."""
LARGEST_ANSWER = 16 << 20
"""Bytes. /status.json of 64 data-parallel ranks with 1024 batch sizes each has some 5 MB."""
LONGEST_REASON = 300


class ControlClient:
    """Client of one sidecar.

    url: "http://host:port" or "https://host:port". token: for `send`, "" without one. timeout_s: of each request. tls: for https.
    Raises BadInput for other URLs, and for files of tls that cannot be used. Text in an answer is made printable: whoever
    answers must not write to the terminal of the user as it likes.
    """

    def __init__(self, url: str, token: str = "", timeout_s: float = 10.0, tls: ClientTls = NO_TLS) -> None:
        if not url.startswith(("http://", "https://")):
            raise BadInput(f"--url: must begin with http:// or https://, got {shown_url(url)!r}")
        self.url = checked_url(url)
        self._token = token
        self._timeout_s = timeout_s
        # No proxy of the environment: a sidecar runs on this host or in this cluster. No redirects: a sidecar never sends one,
        # and the token would go along.
        handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({}), _NoRedirects()]
        if url.startswith("https://"):
            handlers.append(urllib.request.HTTPSHandler(context=tls.context()))
        elif tls != NO_TLS:
            raise BadInput(f"--ca, --cert, --key: need a URL that begins with https://, got {url!r}")
        self._opener = urllib.request.build_opener(*handlers)

    @classmethod
    def find(cls, runtime_dir: Path, url: str | None, token_file: Path | None, tls: ClientTls = NO_TLS) -> ControlClient:
        """Use the URL, or without one the address of the sidecar that runs in the runtime directory. Raises BadInput.

        Without a token file, the token in the runtime directory is sent, and only to the sidecar that runs there. Without a ca in
        tls, that sidecar is known by its certificate file.
        """
        address = _address(runtime_dir)
        running = address["url"] if address else None
        if url is None:
            if running is None:
                raise BadInput(f"--runtime-dir: '{runtime_dir}': no sidecar runs there; give --url")
            url = running
        local = url.rstrip("/") == running
        if local and address and isinstance(certfile := address.get("certfile"), str):
            tls = replace(tls, pinned=Path(certfile))
        if token_file is not None:
            return cls(url, token_from(token_file, "--token-file"), tls=tls)
        token = own_token(runtime_dir / TOKEN_NAME) if local else None
        return cls(url, token or "", tls=tls)

    def status(self, dp_rank: int | None = None) -> dict[str, Any]:
        """Return /status.json, of a data-parallel rank where one is given. Raises BadInput when the sidecar cannot be reached."""
        return self._ask(_with("/status.json", dp_rank=dp_rank), None)

    def explain(self, batch_size: int | None, dp_rank: int | None = None) -> dict[str, Any]:
        """Return /explain.json of a batch size (None: that of the latest step). Raises BadInput with the sidecar's message."""
        return self._ask(_with("/explain.json", batch=batch_size, dp_rank=dp_rank), None)

    def send(self, command: str, k: int | None = None) -> dict[str, Any]:
        """Send a command and return the answer. Raises BadInput with the sidecar's message when it refuses."""
        return self._ask("/control", {"command": command} if k is None else {"command": command, "k": k})

    def _ask(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        data = json.dumps(body).encode() if body is not None else None
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._token}"} if body is not None else {}
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with self._opener.open(request, timeout=self._timeout_s) as answer:
                document = _document(answer)
        except urllib.error.HTTPError as error:
            with error:
                raise BadInput(f"{self.url}: refused: {_reason(error)}") from error
        except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
            reason = getattr(error, "reason", error)
            raise BadInput(f"{self.url}: no sidecar answers: {getattr(reason, 'strerror', None) or reason}") from error
        if not isinstance(document, dict):
            raise BadInput(f"{self.url}: no sidecar answers: the answer is not a JSON object")
        return document

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """For a block that uses an answer: what is missing in it, or of another kind, is a BadInput."""
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise BadInput(f"{self.url}: the answer is not one of a sidecar of this version: {one_line(error)[:80]}") from error


def _with(path: str, **asked: int | None) -> str:
    """A path with the values that are given."""
    given = "&".join(f"{name}={value}" for name, value in asked.items() if value is not None)
    return f"{path}?{given}" if given else path


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer with an error status."""

    def redirect_request(self, *_: object) -> None:
        return None


def running_sidecar(runtime_dir: Path) -> str | None:
    """Return the URL of the sidecar that holds its role in a folder of this user; None when there is none. Raises nothing."""
    address = _address(runtime_dir)
    return address["url"] if address else None


def _address(runtime_dir: Path) -> dict[str, Any] | None:
    """The content of the address file of a running sidecar of this user, with a `url` that is text."""
    try:
        check_runtime_dir(runtime_dir)
        if not role_is_held(runtime_dir, "sidecar"):
            return None
        content = read_regular_file(runtime_dir / ADDRESS_NAME, LARGEST_BYTES)
        document = json.loads(content.data)
        url, pid = document["url"], document.get("pid")
    except Exception:  # whatever the file holds
        return None
    # A sidecar that has just started may not have replaced the address of one that was killed.
    ours = content.owner == os.geteuid() and (pid is None or role_holder(runtime_dir, "sidecar") in (0, pid))
    return document if isinstance(url, str) and ours else None


def heartbeat_age_s(runtime_dir: Path) -> float:
    """Return how long ago the loop of the sidecar in a folder last ran, on the wall clock. Asks the files alone, no server.

    Raises OSError with a reason when no sidecar runs there.
    """
    check_runtime_dir(runtime_dir)
    if not role_is_held(runtime_dir, "sidecar"):
        raise FileNotFoundError(errno.ENOENT, "no sidecar runs there", str(runtime_dir))
    status = os.lstat(runtime_dir / HEARTBEAT_NAME)
    return abs(time.time() - status.st_mtime)  # a heartbeat after now: the clock was set back, and the next one is right again


def own_token(path: Path) -> str | None:
    """Return the token in a file that only this user can use; None when there is none. Raises nothing."""
    try:
        content = read_regular_file(path, LARGEST_BYTES)
        token = content.data.decode().strip()
    except (OSError, ValueError):
        return None
    return token if is_token(token) and content.owner == os.geteuid() and not content.mode & 0o077 else None


def is_token(text: str) -> bool:
    """Whether it can be sent: printable ASCII characters on one line. Of others the HTTP library says what they are."""
    return text.isascii() and text.isprintable() and text != ""


def token_from(path: Path, name: str) -> str:
    """Return the token in a file that the user named. Raises BadInput, beginning with `name`."""
    try:
        token = read_token(path, LARGEST_BYTES).decode().strip()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or ""
        raise BadInput(f"{name}: '{path}': {reason if 'must' in reason else 'cannot be read'}") from error
    if not is_token(token):
        raise BadInput(f"{name}: '{path}': must contain a token of printable ASCII characters on one line")
    return token


def _document(answer: IO[bytes]) -> Any:
    """Raises ValueError, RecursionError, OSError or HTTPException for anything but JSON within bounds."""
    data = answer.read(LARGEST_ANSWER + 1)
    if len(data) > LARGEST_ANSWER:
        raise ValueError(f"the answer is longer than {LARGEST_ANSWER} bytes")
    return _printable(json.loads(data))


def _printable(value: Any) -> Any:
    """A JSON value with `?` for every character that a terminal could obey."""
    if isinstance(value, str):
        return value if value.isprintable() else "".join(c if c.isprintable() else "?" for c in value)
    if isinstance(value, dict):
        return {_printable(key): _printable(inner) for key, inner in value.items()}
    return [_printable(inner) for inner in value] if isinstance(value, list) else value


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        return str(_document(error)["error"])[:LONGEST_REASON]
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, RecursionError):
        return f"status {error.code}"
