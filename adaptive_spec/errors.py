"""The error of bad input, and how any error is written on one line."""

from __future__ import annotations


class BadInput(Exception):  # noqa: N818 - it names what happened; callers print it and exit 2
    """A value from outside is not allowed. The message is one line and begins with the field.

    A value: what is allowed, then the value ("port: must be at most 65535, got 99999"). A file: its name, then what is wrong with
    it ("TRACE: 'x.trace': no such file").
    """


def one_line(error: BaseException) -> str:
    """Return the message of an error on one line; the name of its type when it has no message."""
    return " ".join(str(error).split()) or type(error).__name__
