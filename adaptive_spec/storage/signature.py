"""Signatures of profiles: HMAC-SHA256 with a key that the fleet shares, in the comment of the zip file.

What is signed is the name of the object and the archive with an empty comment, so a profile cannot be dated anew under another
name. Whoever reads without a key, and every version before, reads a signed archive as any other.
"""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from adaptive_spec import regular_file
from adaptive_spec.errors import BadInput

SHORTEST_KEY = 32
"""Bytes: as long as the hash. `openssl rand -hex 32` makes 64 characters."""
LONGEST_KEY_FILE = 4096
_EMPTY = b"\0\0"
_MARK = b"hmac-sha256:"
_COMMENT_BYTES = len(_MARK) + 2 * hashlib.sha256().digest_size


class SignatureError(ValueError):
    """A profile without a signature, or with one of another key, another name or other content."""


def read_key(path: Path) -> bytes:
    """Read the key: the text of the file without white space around it. Raises BadInput."""
    field = f"profile_store_key_file: '{path}'"
    try:
        key = regular_file.read_key(path, LONGEST_KEY_FILE).strip()
    except OSError as error:
        wanted = "" if "must" in (error.strerror or "") else "; must be a readable file"
        raise BadInput(f"{field}: {error.strerror}{wanted}") from error
    if len(key) < SHORTEST_KEY:
        raise BadInput(f"{field}: must hold a key of at least {SHORTEST_KEY} characters")
    return key


def signed(archive: bytes, name: str, key: bytes) -> bytes:
    """Return the archive with its signature. archive: a zip file without a comment."""
    return archive[:-2] + _COMMENT_BYTES.to_bytes(2, "little") + _MARK + _mac(archive, name, key)


def check_signature(data: bytes, name: str, key: bytes) -> None:
    """Raise SignatureError when `data` is not what `signed` made of an archive with this name and key."""
    comment = data[-_COMMENT_BYTES:]
    if len(data) <= _COMMENT_BYTES + 2 or not comment.startswith(_MARK):
        raise SignatureError("it is not signed; profile_store_key_file is set")
    archive = data[: -_COMMENT_BYTES - 2] + _EMPTY
    if not hmac.compare_digest(comment[len(_MARK) :], _mac(archive, name, key)):
        raise SignatureError("its signature is wrong: it is of another key, or was changed or renamed")


def _mac(archive: bytes, name: str, key: bytes) -> bytes:
    return hmac.digest(key, name.encode() + b"\0" + archive, "sha256").hex().encode()
