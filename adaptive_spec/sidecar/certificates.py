"""TLS of the HTTP server: the certificate, its key, and the authority of the clients, read again when a file changes."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path

from adaptive_spec.errors import BadInput
from adaptive_spec.regular_file import read_key, read_regular_file

LARGEST_BYTES = 1 << 20
"""Of a file. A bundle of all public authorities has some 250 kB."""

log = logging.getLogger(__name__)


class Certificates:
    """Makes the context of new connections. keyfile None: the key is in certfile. client_ca None: clients need no certificate."""

    def __init__(self, certfile: Path, keyfile: Path | None, client_ca: Path | None) -> None:
        """Raises BadInput for a file that cannot be used."""
        self.certfile, self._keyfile, self._client_ca = certfile, keyfile, client_ca
        self._seen = self._state()
        self.context = self._load()

    def follow(self) -> None:
        """Use the files' new content when one has changed. What cannot be used is logged, and the context stays."""
        if (state := self._state()) == self._seen:
            return
        self._seen = state
        try:
            self.context = self._load()
        except BadInput as error:
            log.error("TLS: the certificate in use stays: %s", error)
        else:
            log.info("TLS: the certificate was read again from %s", self.certfile)

    def _files(self) -> list[tuple[str, Path]]:
        named = (("certfile", self.certfile), ("keyfile", self._keyfile), ("client_ca", self._client_ca))
        return [(field, path) for field, path in named if path is not None]

    def _state(self) -> list[tuple[int, int, int] | None]:
        """What changes with the content: a mounted Secret is a link that is pointed elsewhere."""
        found: list[tuple[int, int, int] | None] = []
        for _, path in self._files():
            try:
                status = path.stat()
                found.append((status.st_ino, status.st_mtime_ns, status.st_size))
            except OSError:
                found.append(None)
        return found

    def _load(self) -> ssl.SSLContext:
        for field, path in self._files():
            try:
                if path == (self._keyfile or self.certfile):
                    read_key(path, LARGEST_BYTES)
                else:
                    read_regular_file(path, LARGEST_BYTES, follow_links=True)
            except OSError as error:
                reason = error.strerror or ""
                words = f"holds a key: {reason}" if "must" in reason else f"{reason}; must be a readable file"
                raise BadInput(f"{field}: '{path}': {words}") from error
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION
        context.set_alpn_protocols(["http/1.1"])
        field, path = "certfile", self.certfile
        try:
            # A password is never asked for: the library would wait for a terminal.
            context.load_cert_chain(self.certfile, self._keyfile, password=lambda: b"")
            if self._client_ca is not None:
                field, path = "client_ca", self._client_ca
                context.load_verify_locations(self._client_ca)
                context.verify_mode = ssl.CERT_REQUIRED
        except (OSError, ValueError) as error:
            wanted = "certificates as PEM" if field == "client_ca" else "a certificate as PEM, with its key, without a password"
            reason = getattr(error, "reason", None) or "cannot be used"
            raise BadInput(f"{field}: '{path}': must be {wanted}: {str(reason).lower().replace('_', ' ')}") from error
        return context
