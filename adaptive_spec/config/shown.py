"""Values in messages and logs: on one line, cut, and without the secrets that a URL may hold."""

from __future__ import annotations

import re
from urllib.parse import unquote

LARGEST_SHOWN = 120
"""Characters of a value that a message shows."""
HIDDEN = "***"
_SHORTEST_SECRET = 3
"""Parts of a URL shorter than this are not searched for in other texts: they would be found everywhere."""


def url_without_secrets(url: str) -> str:
    """Return a URL without user, password, query, fragment and parameters; each URL of a chain (`a::b`) for itself.

    Everything before the last `@` is left out: a password may hold `/`, `:` and `@`.
    """
    return "::".join(_one_url_without_secrets(part) for part in url.split("::"))


def _one_url_without_secrets(url: str) -> str:
    scheme, separator, rest = url.partition("://") if "://" in url else ("", "", url)
    path = re.split(r"[?#;]", rest, maxsplit=1)[0]
    return f"{scheme}{separator}{path.rpartition('@')[2]}"


def secrets_of(url: str) -> tuple[str, ...]:
    """Parts of a URL that must not be shown, longest first, also as they are when percent-decoded."""
    found = {url} if url_without_secrets(url) != url else set()
    for part in url.split("::"):
        rest = part.partition("://")[2] or part
        user = rest.rpartition("@")[0]
        query = re.split(r"[?#;]", rest, maxsplit=1)[1:]
        found |= {user, user.partition(":")[2], *query}
        for pair in re.split(r"[&;#?]", "".join(query)):
            found |= {pair, pair.partition("=")[2]}
    found |= {unquote(text) for text in found}
    return tuple(sorted((text for text in found if len(text) >= _SHORTEST_SECRET), key=lambda text: (-len(text), text)))


def hide(text: str, secrets: tuple[str, ...]) -> str:
    """Return the text with every secret in it replaced."""
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return text


def shown_value(value: object, *, is_url: bool = False) -> str:
    """Return a value from a configuration as a message shows it: on one line, cut, without the secrets of a URL.

    is_url: it is meant to be one. Other values are taken for one when they look like it.
    """
    text = value if isinstance(value, str) else repr(value)
    if is_url or any(mark in text for mark in ("@", "://", "::", "?")):
        text = url_without_secrets(text)
    return shortened(repr(text) if isinstance(value, str) else text)


def shown_key(key: object) -> str:
    """Return a key as a message shows it: as it is where it can be printed, on one line, cut."""
    text = str(key)
    return shortened(text if text.isprintable() and text else repr(text))


def shortened(text: str) -> str:
    """Return the text on one printable line, cut to LARGEST_SHOWN characters."""
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= LARGEST_SHOWN else f"{text[:LARGEST_SHOWN]}..."
