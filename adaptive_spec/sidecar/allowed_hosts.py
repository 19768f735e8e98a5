"""Which `Host` a request may name.

A page of a stranger can have its own name resolve to this machine (DNS rebinding), and the browser then takes what the sidecar
answers for that page's own. The name in `Host` gives it away: it is none of the sidecar's. An address cannot be made to resolve
elsewhere, so where the sidecar listens beyond loopback every address is taken, and Prometheus can scrape a pod by its IP.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable

_HOST = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]{2,45})\]|(?P<name>[A-Za-z0-9._-]{1,253}))(?::[0-9]{1,5})?")


class AllowedHosts:
    """listening: setting `host`. address: the IP address it was bound to. names: setting `allowed_hosts`."""

    def __init__(self, listening: str, address: str, names: Iterable[str]) -> None:
        own = socket.gethostname()
        self._names = {_plain(name) for name in ("localhost", listening, own, own.partition(".")[0], *names)} - {""}
        self._any_address = not _is_loopback(address)

    def allow(self, header: str) -> bool:
        """Whether the sidecar answers to this value of `Host`, with or without a port."""
        match = _HOST.fullmatch(header)
        if match is None:
            return False
        host = _plain(match["v6"] or match["name"])
        return host in self._names or _is_loopback(host) or (self._any_address and _is_address(host))


def _plain(name: str) -> str:
    return name.lower().removesuffix(".")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    return _is_address(host) and ipaddress.ip_address(host).is_loopback
