"""The form of the addresses that a user gives with --url."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from adaptive_spec.errors import BadInput

LONGEST_URL = 2048
LONGEST_SHOWN = 120


def checked_url(url: str) -> str:
    """Return an address without a slash at its end.

    Raises BadInput unless it is http or https with a host, without user, password, query and fragment: secrets in them would be
    in every message.
    """
    try:
        parts = urlsplit(url)
        right = url.startswith(("http://", "https://")) and bool(parts.hostname) and parts.port != 0
    except ValueError:
        right = False
    if not right or any(mark in url for mark in "@?# ") or not url.isprintable() or len(url) > LONGEST_URL:
        raise BadInput(f"--url: must be like http://HOST:PORT, got {shown_url(url)!r}; without user, password and query")
    return url.rstrip("/")


def shown_url(url: str) -> str:
    """Return what a message may show of an address: no user, password, query or fragment, at most `LONGEST_SHOWN` characters."""
    return re.split("[?#]", url.rpartition("@")[2])[0][:LONGEST_SHOWN]
