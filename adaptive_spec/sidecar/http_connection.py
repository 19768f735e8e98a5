"""One HTTP connection: h11 reads and writes the messages, a deadline ends every wait.

Nothing of a client is kept beyond a header of at most MAX_HEADER_BYTES and a body of the length that a route allows; an answer is
written in pieces, so that a client that does not read holds one piece.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from http import HTTPStatus

import h11

from adaptive_spec.sidecar.http_message import SECURITY_HEADERS, Answer, RefusedError, Request

HEADER_S = 5.0
"""For the header of a request, from its first byte, and from the connection for the first one. Clients send it in one packet."""
BODY_S = 5.0
WRITE_S = 10.0
"""For a client to take an answer. /metrics has some 50 kB: 40 kbit/s are enough."""
KEEP_ALIVE_S = 75.0
"""Between two requests. Longer than Prometheus' default interval of 60 s, so that its connection is used again."""
LINGER_S = 1.0
MAX_HEADER_BYTES = 16_384
READ_BYTES = 8_192
WRITE_BYTES = 16_384
LINGER_BYTES = 262_144

Handler = Callable[[Request], Awaitable[Answer]]

log = logging.getLogger(__name__)


class HttpConnection:
    """Serves the requests of one client, one after the other.

    handler: answers a request; may raise RefusedError. waiting: no whole request was received that is not answered yet.
    since_s: of the present state, on the event loop's clock.
    """

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._parser = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEADER_BYTES)
        self.waiting = True
        self.since_s = asyncio.get_running_loop().time()

    async def run(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve until the connection ends. Closes it.

        Raises OSError, TimeoutError or h11.ProtocolError when the client has gone or does not read.
        """
        self._reader, self._writer = reader, writer
        writer.transport.set_write_buffer_limits(high=WRITE_BYTES)
        try:
            first = True
            while (request := await self._next_request(first)) is not None:
                self._enter(waiting=False)
                more = await self._serve(request)
                self._enter(waiting=True)
                if not more:
                    break
                first = False
                await asyncio.sleep(0)  # nothing above need have waited: one with many requests in a packet lets others in
            if self._parser.their_state is not h11.MUST_CLOSE and self._parser.their_state is not h11.DONE:
                await self._linger()
            else:
                await self._finish()
        finally:
            writer.transport.abort()
            del self._reader, self._writer

    def _enter(self, *, waiting: bool) -> None:
        self.waiting, self.since_s = waiting, asyncio.get_running_loop().time()

    async def _next_request(self, first: bool) -> h11.Request | None:
        """Return the next request; None when there is none or it was refused."""
        begun = first or bool(self._parser.trailing_data[0])
        received = bool(self._parser.trailing_data[0])
        try:
            async with asyncio.timeout(HEADER_S if begun else KEEP_ALIVE_S) as deadline:
                while (event := self._parser.next_event()) is h11.NEED_DATA:
                    self._parser.receive_data(data := await self._reader.read(READ_BYTES))
                    received |= bool(data)
                    if not begun:
                        begun = True
                        deadline.reschedule(asyncio.get_running_loop().time() + HEADER_S)
        except TimeoutError:
            if received:
                await self._send(RefusedError(408, f"the header must be complete within {HEADER_S:g} s").answer, closing=True)
            return None
        except h11.RemoteProtocolError as error:
            if received:
                status = error.error_status_hint if error.error_status_hint < 500 else 400
                await self._send(RefusedError(status, f"not an HTTP request: {str(error)[:200]}").answer, closing=True)
            return None
        return event if isinstance(event, h11.Request) else None

    async def _serve(self, event: h11.Request) -> bool:
        """Answer one request; returns whether the connection can take another one."""
        try:
            answer = await self._handler(self._request(event))
        except RefusedError as refused:
            answer = refused.answer
        except h11.RemoteProtocolError:
            answer = RefusedError(400, "the body is not as its header says").answer
        except Exception as error:  # a fault of ours: no client may see more of it, and no other one suffers
            log.error("HTTP: a request failed: %s: %s", type(error).__name__, str(error)[:200])
            answer = RefusedError(500, "internal error, see the log").answer
        if self._parser.their_state is h11.SEND_BODY:  # the end of a request without a body, or a body that no one asked for
            with contextlib.suppress(h11.RemoteProtocolError):
                self._parser.next_event()
        await self._send(answer, closing=self._parser.their_state is not h11.DONE, head=event.method == b"HEAD")
        if self._parser.our_state is not h11.DONE or self._parser.their_state is not h11.DONE:
            return False
        self._parser.start_next_cycle()
        return True

    def _request(self, event: h11.Request) -> Request:
        """Raises RefusedError for a target that is not a path, and for bodies of an unknown length."""
        if event.http_version not in (b"1.0", b"1.1"):  # h11 takes others, without a Host
            raise RefusedError(505, "the version must be HTTP/1.1 or HTTP/1.0")
        headers: dict[str, str] = {}
        for raw_name, raw_value in event.headers:
            name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
        if "transfer-encoding" in headers:
            # Every body here is a few bytes long; two ways to state a length are how requests are smuggled past a proxy.
            both = "content-length" in headers
            raise RefusedError(400 if both else 411, "Transfer-Encoding: not taken, send Content-Length")
        path, _, query = event.target.decode("ascii").partition("?")
        if not path.startswith("/"):
            raise RefusedError(400, "the target of a request must begin with /")

        async def read_body(limit: int) -> bytes:
            return await self._body(headers.get("content-length"), limit)

        return Request(event.method.decode("ascii"), path, query, headers, read_body)

    async def _body(self, length: str | None, limit: int) -> bytes:
        if length is None:
            raise RefusedError(411, "Content-Length: is missing")
        if int(length) > limit:
            raise RefusedError(413, f"body: must be at most {limit} bytes")
        if self._parser.they_are_waiting_for_100_continue:
            go_on = h11.InformationalResponse(status_code=100, reason=b"Continue", headers=[])
            self._writer.write(self._parser.send(go_on) or b"")
        body = b""
        try:
            async with asyncio.timeout(BODY_S):
                while not isinstance(event := self._parser.next_event(), h11.EndOfMessage):
                    if isinstance(event, h11.Data):
                        body += event.data
                    else:
                        self._parser.receive_data(await self._reader.read(READ_BYTES))
        except TimeoutError as error:
            raise RefusedError(408, f"the body must be complete within {BODY_S:g} s") from error
        return body

    async def _send(self, answer: Answer, *, closing: bool, head: bool = False) -> None:
        """Send an answer. closing: it is the last one. Raises OSError; TimeoutError when the client does not take it in time."""
        headers = [
            ("Date", formatdate(usegmt=True)),
            ("Content-Type", answer.content_type),
            ("Content-Length", str(len(answer.body))),
            *SECURITY_HEADERS,
            *answer.headers,
            *([("Connection", "close")] if closing else []),
        ]
        async with asyncio.timeout(WRITE_S):
            reason = HTTPStatus(answer.status).phrase.encode()
            piece = self._parser.send(h11.Response(status_code=answer.status, reason=reason, headers=headers)) or b""
            for start in range(0, 0 if head else len(answer.body), WRITE_BYTES):
                piece += self._parser.send(h11.Data(data=answer.body[start : start + WRITE_BYTES])) or b""
                self._writer.write(piece)
                await self._writer.drain()
                piece = b""
            self._writer.write(piece + (self._parser.send(h11.EndOfMessage()) or b""))
            await self._writer.drain()

    async def _linger(self) -> None:
        """Let the client read the last answer: a socket closed with unread data in it would take the answer back."""
        async with asyncio.timeout(LINGER_S):
            await self._writer.drain()
            if self._writer.can_write_eof():
                self._writer.write_eof()
            left = LINGER_BYTES
            while left > 0 and (data := await self._reader.read(READ_BYTES)):
                left -= len(data)
        await self._finish()

    async def _finish(self) -> None:
        """Send what is still to be sent, and the end."""
        async with asyncio.timeout(LINGER_S):
            self._writer.close()
            await self._writer.wait_closed()
