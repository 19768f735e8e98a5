"""What is said to the operator instead of a traceback."""

from __future__ import annotations


class BadInput(Exception):  # noqa: N818 - it names what happened; callers print it and exit 2
    """Something given from outside is not allowed. The message is one line naming the field, its value and what is allowed."""
