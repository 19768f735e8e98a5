"""What a route of the HTTP server is given and what it returns."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

SECURITY_HEADERS = (
    ("Cache-Control", "no-store"),
    (
        "Content-Security-Policy",
        "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'",
    ),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Referrer-Policy", "no-referrer"),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
)
"""Sent with every answer, errors too. No Strict-Transport-Security: it would hold for all ports of the host."""


@dataclass(frozen=True)
class Request:
    """One request. path, query: of the target, not decoded. headers: by name in lower case, Latin-1; repeated ones are joined by
    commas. read_body: returns the body, at most so many bytes; raises RefusedError.
    """

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    read_body: Callable[[int], Awaitable[bytes]]


@dataclass(frozen=True)
class Answer:
    """One answer. headers: beside the length, the date and SECURITY_HEADERS, which every answer has."""

    status: int
    body: bytes
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = field(default=())


class RefusedError(Exception):
    """A request that is answered with an error. reason: in the answer, one line."""

    def __init__(self, status: int, reason: str, headers: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(reason)
        self.answer = Answer(status, to_json({"error": reason}), headers=headers)


def to_json(document: Mapping[str, Any]) -> bytes:
    """Return JSON. NaN and infinities, which JSON does not have, become null; numpy numbers plain ones."""
    return json.dumps(_finite(document), allow_nan=False).encode()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not abs(value) < float("inf") else value
