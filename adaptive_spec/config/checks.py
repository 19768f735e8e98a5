"""Checks of single values that a range cannot state: paths, host names, URLs. Each raises ValueError: `must ...`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator

LONGEST_PATH = 1024
"""Bytes. Linux allows 4096 for a path; names of files below the folder need some of that."""
LONGEST_URL = 2048
_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*\.?")
_IPV6 = re.compile(r"[0-9A-Fa-f:.]{2,45}(?:%[A-Za-z0-9_.-]{1,32})?")


def file_path(path: Path) -> Path:
    """A path of printable characters of at most LONGEST_PATH bytes."""
    text = str(path)
    if not text.isprintable():
        raise ValueError("must be a path of printable characters")
    if len(text.encode()) > LONGEST_PATH or any(len(part.encode()) > 255 for part in path.parts):
        raise ValueError(f"must be at most {LONGEST_PATH} bytes long, 255 a name")
    return path


def folder_path(path: Path) -> Path:
    """As file_path, and not the root."""
    if os.path.abspath(file_path(path)).strip("/") == "":
        raise ValueError("must be a folder below /")
    return path


def host_name(host: str) -> str:
    """A host name or an IP address that can be bound."""
    if not ((len(host) <= 253 and _HOST_NAME.fullmatch(host)) or (":" in host and _IPV6.fullmatch(host))):
        raise ValueError("must be a host name or an IP address")
    return host


def store_url(url: str) -> str:
    """Printable characters without spaces; whether fsspec takes it is found out when the store is opened."""
    if not url.isprintable() or " " in url:
        raise ValueError("must be a URL of printable characters, as file:///mnt/profiles or s3://bucket/profiles")
    if len(url) > LONGEST_URL:
        raise ValueError(f"must be at most {LONGEST_URL} characters long")
    return url


def web_url(url: str) -> str:
    """http or https, with a host, without user, password, query and fragment."""
    wanted = "must be like https://HOST:PORT/PREFIX, without user, password and query"
    if not url.isprintable() or " " in url or len(url) > LONGEST_URL:
        raise ValueError(wanted)
    try:
        parts = urlsplit(url)
        right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        host_name(parts.hostname or "")
    except ValueError as error:
        raise ValueError(wanted) from error
    if not right or "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(wanted)
    return url


def not_empty(value: object) -> object:
    """An empty text would be the current folder."""
    if value == "":
        raise ValueError("must be not empty")
    return value


FilePath = Annotated[Path, BeforeValidator(not_empty), AfterValidator(file_path)]
FolderPath = Annotated[Path, BeforeValidator(not_empty), AfterValidator(folder_path)]
HostName = Annotated[str, AfterValidator(host_name)]
StoreUrl = Annotated[str, AfterValidator(store_url)]
WebUrl = Annotated[str, AfterValidator(web_url)]
