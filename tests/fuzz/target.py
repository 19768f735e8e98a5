"""What a fuzzing target is, and the bounds that hold for all of them."""

from __future__ import annotations

import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
LONGEST_MESSAGE = 2000
"""Characters of an error message; a path in it may have 1024."""
SHARED_MEMORY = Path("/dev/shm")


class Target(ABC):
    """One reader of foreign bytes, with its oracle.

    name: also the folder of its corpus. longest: bytes of an input. share: of the inputs asked for, where one takes long.
    """

    name: str
    longest: int = 4096
    share: float = 1.0

    @abstractmethod
    def seeds(self) -> Mapping[str, bytes]:
        """Inputs to begin with, by a file name: among them valid ones."""

    @abstractmethod
    def run(self, data: bytes) -> str:
        """Read one input. Returns "" for a valid value, else the documented error. Raises anything else for a fault."""

    def close(self) -> None:  # noqa: B027 - most targets hold nothing
        """Release what the target holds, with checks that are made once at the end. Raises AssertionError for a fault."""


class FileTarget(Target):
    """A target that reads a file, in a private folder in memory."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="adaptive-spec-fuzz-", dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None))
        self.path = self.folder / "input"

    def write(self, *parts: bytes) -> None:
        """Make the file anew, mode 0600, of these parts."""
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.writev(descriptor, parts)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def one_line_of(error: Exception) -> str:
    """Return the message of a documented error. Raises AssertionError unless it is one printable line, not too long."""
    message = str(error)
    assert message, repr(error)
    assert message.isprintable(), ascii(message)
    assert len(message) <= LONGEST_MESSAGE, message
    return message


def corpus_of(target: Target) -> dict[str, bytes]:
    """The kept inputs of a target, by file name."""
    folder = CORPUS / target.name
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*"))} if folder.is_dir() else {}
