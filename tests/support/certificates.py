"""Authorities and certificates for tests, as files."""

from __future__ import annotations

from pathlib import Path

import trustme


class Authority:
    """An authority of its own; its certificate is in the file `ca`."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name, self._authority = folder, name, trustme.CA()
        self.ca = folder / f"{name}.pem"
        self._authority.cert_pem.write_to_path(self.ca)

    def issue(self, file: str, *names: str) -> Path:
        """Write a new certificate for these names and its key to one file, replaced whole; returns its path."""
        issued = self._authority.issue_cert(*names)
        path, temporary = self._folder / file, self._folder / f".{file}"
        temporary.touch(0o600)
        temporary.write_bytes(issued.private_key_pem.bytes() + b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        temporary.replace(path)
        return path
