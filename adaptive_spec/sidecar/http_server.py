"""The sidecar's HTTP server: accepts connections and bounds their number. `http_routes` has what is answered.

One thread with an event loop serves all clients; an answer takes milliseconds, and every wait for a client has a deadline
(`http_connection`). When there are too many connections, the one that has waited longest without a request is closed: a client
that sends its request is served, however many idle ones others hold.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import resource
import socket
import threading
import traceback
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import h11

from adaptive_spec.sidecar.allowed_hosts import AllowedHosts
from adaptive_spec.sidecar.certificates import Certificates
from adaptive_spec.sidecar.http_connection import HEADER_S, LINGER_S, READ_BYTES, HttpConnection
from adaptive_spec.sidecar.http_routes import Routes
from adaptive_spec.sidecar.listening import listening_socket
from adaptive_spec.sidecar.view import CurrentView

MAX_CONNECTIONS = 256
"""Each takes some 60 KiB at most, with TLS some 350 KiB, of which asyncio's buffer is 256: 90 MiB in all."""
MAX_PER_CLIENT = 128
"""Of one IPv4 address or one IPv6 /64. Half of all, since a proxy or a node of Kubernetes may stand for many clients."""
BACKLOG = 512
PAUSE_S = 0.05
CLOSE_S = 5.0
FOLLOW_S = 5.0
"""Between two looks at whether the certificate has changed."""

log = logging.getLogger(__name__)


@dataclass
class _Client:
    network: str
    connection: HttpConnection
    task: asyncio.Task[None]


class WebServer:
    """Serves the current view on host:port (port 0: a free one) in its own thread.

    token: required by POST /control. allowed_hosts: names that requests may give beside the usual ones (`AllowedHosts`).
    certificates: of the server, which then speaks https. Raises BadInput when the address cannot be bound.
    """

    def __init__(
        self, current_view: CurrentView, host: str, port: int, token: str, allowed_hosts: Iterable[str] = (),
        certificates: Certificates | None = None,
    ) -> None:  # fmt: skip
        self._listening = listening_socket(host, port, "port")
        address, self.port = self._listening.getsockname()[:2]
        self._routes = Routes(current_view, token, AllowedHosts(host, address, allowed_hosts))
        self.commands = self._routes.commands
        self._certificates = certificates
        self.url = f"{'https' if certificates else 'http'}://{f'[{host}]' if ':' in host else host}:{self.port}"
        self._clients: list[_Client] = []
        # Files of the sidecar itself need descriptors too.
        self._most = min(MAX_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        self._loop = asyncio.new_event_loop()
        self._accepting = self._loop.create_task(self._accept())
        self._following = self._loop.create_task(self._follow_certificates())
        self._thread = threading.Thread(target=self._serve, name="http", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the server and release the port."""
        with contextlib.suppress(RuntimeError):  # closed before
            self._loop.call_soon_threadsafe(self._accepting.cancel)
        self._thread.join(CLOSE_S)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            with contextlib.suppress(asyncio.CancelledError):
                self._loop.run_until_complete(self._accepting)
            tasks = [self._following, *(client.task for client in self._clients)]
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self._loop.run_until_complete(asyncio.sleep(0))  # sockets are closed one turn after their connections
        finally:
            self._listening.close()
            self._loop.close()

    async def _accept(self) -> None:
        self._listening.setblocking(False)
        self._listening.listen(BACKLOG)
        while True:
            # sock_accept does not wait while connections are there: each that was accepted is read from before many more come.
            await asyncio.sleep(0)
            try:
                accepted, address = await self._loop.sock_accept(self._listening)
            except OSError as error:  # most likely no file descriptor is left
                log.error("HTTP: a connection cannot be accepted: %s", error.strerror)
                self._close_one(self._clients)
                await asyncio.sleep(PAUSE_S)
                continue
            self._make_room(network := network_of(address[0]))
            connection = HttpConnection(self._routes.answer)
            client = _Client(network, connection, self._loop.create_task(self._connect(accepted, connection)))
            self._clients.append(client)
            client.task.add_done_callback(lambda _, client=client, accepted=accepted: self._ended(client, accepted))  # type: ignore[misc]

    async def _connect(self, accepted: socket.socket, connection: HttpConnection) -> None:
        reader = asyncio.StreamReader(limit=READ_BYTES)
        protocol = asyncio.StreamReaderProtocol(reader)
        try:
            transport, _ = await self._loop.connect_accepted_socket(lambda: protocol, accepted, **self._tls())
            await connection.run(reader, asyncio.StreamWriter(transport, protocol, reader, self._loop))
        except (OSError, TimeoutError, h11.ProtocolError, asyncio.CancelledError) as error:
            # It has gone, did not speak TLS, or did not read. asyncio keeps the error, and its frames the connection: a cycle of
            # references with hundreds of kilobytes, which the garbage collector finds too late.
            traceback.clear_frames(error.__traceback__)
            error.__traceback__ = None

    def _tls(self) -> dict[str, Any]:
        if self._certificates is None:
            return {}
        return {"ssl": self._certificates.context, "ssl_handshake_timeout": HEADER_S, "ssl_shutdown_timeout": LINGER_S}

    async def _follow_certificates(self) -> None:
        while self._certificates is not None:
            await asyncio.sleep(FOLLOW_S)
            self._certificates.follow()

    def _ended(self, client: _Client, accepted: socket.socket) -> None:
        if client in self._clients:
            self._clients.remove(client)
        accepted.close()  # of a task that ended before its first turn
        if not client.task.cancelled() and (error := client.task.exception()) is not None:
            log.error("HTTP: a connection failed: %s: %s", type(error).__name__, str(error)[:200])

    def _make_room(self, network: str) -> None:
        """Close connections until a client of this network may have one more."""
        own = [client for client in self._clients if client.network == network]
        if len(own) >= MAX_PER_CLIENT:
            self._close_one(own)
        elif len(self._clients) >= self._most:
            counts = Counter(client.network for client in self._clients)
            most = max(counts.values())
            self._close_one([client for client in self._clients if counts[client.network] == most])

    def _close_one(self, clients: list[_Client]) -> None:
        """Close the connection that has waited longest for a request; where none waits, the one that takes longest."""
        if clients:
            client = min(clients, key=lambda client: (not client.connection.waiting, client.connection.since_s))
            self._clients.remove(client)
            client.task.cancel()


def network_of(address: str) -> str:
    """Return what is one client: an IPv4 address, or the /64 of an IPv6 address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        return str(ip.ipv4_mapped) if ip.ipv4_mapped else str(ipaddress.ip_network((ip, 64), strict=False))
    return str(ip)
