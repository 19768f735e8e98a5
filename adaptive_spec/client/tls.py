"""What a client of the sidecar trusts, and shows, over https."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from adaptive_spec.errors import BadInput
from adaptive_spec.regular_file import read_regular_file

LARGEST_BYTES = 1 << 20


@dataclass(frozen=True)
class ClientTls:
    """ca: file of certificates to trust; None: those of the system. cert, key: of the client; key None: it is in cert.

    pinned: certificate file of a sidecar of this user, trusted without looking at its names, where no ca is given.
    """

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    pinned: Path | None = None

    def context(self) -> ssl.SSLContext:
        """Raises BadInput for a file that cannot be used."""
        if self.key is not None and self.cert is None:
            raise BadInput("--key: needs --cert, which is not given")
        context = ssl.create_default_context()
        try:
            if self.ca is not None:
                option, path = "--ca", self.ca
                context = ssl.create_default_context(cadata=_text(path))
            elif self.pinned is not None:
                option, path = "certfile of the sidecar", self.pinned
                context = ssl.create_default_context(cadata=_first_certificate(_text(path)))
                context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
                context.check_hostname = False
            if self.cert is not None:
                option, path = "--cert", self.cert
                for file in (self.cert, *([self.key] if self.key else [])):
                    _text(file)
                context.load_cert_chain(self.cert, self.key, password=lambda: b"")
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or "not a text file"
            raise BadInput(f"{option}: '{path}': must be a PEM file: {str(reason).lower().replace('_', ' ')}") from error
        return context


def _text(path: Path) -> str:
    return read_regular_file(path, LARGEST_BYTES, follow_links=True).data.decode()


def _first_certificate(text: str) -> str:
    """The certificate of the server itself: what follows it in the file are authorities, which sign for others too."""
    end = "-----END CERTIFICATE-----"
    return text[max(text.find("-----BEGIN CERTIFICATE-----"), 0) : text.find(end) + len(end)]
