"""Opening a TCP port: for the sidecar's HTTP server, and to check beforehand that a port is free."""

from __future__ import annotations

import socket

from adaptive_spec.errors import BadInput, one_line


def listening_socket(host: str, port: int, field: str) -> socket.socket:
    """Return a socket that listens on the first address of host; port 0 takes a free one.

    field: the name the user knows the port by, such as "--port". Raises BadInput when the address cannot be bound.
    """
    listening = None
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that cannot be encoded for the name service
        if listening:
            listening.close()
        raise BadInput(f"{field}: {port} on host {host!r}: {getattr(error, 'strerror', None) or one_line(error)}") from error
    return listening


def check_port(host: str, port: int, field: str = "--port") -> None:
    """Raise BadInput unless the port can be bound now."""
    listening_socket(host, port, field).close()
