"""Reads the two CSV files of `adaptive-spec fit`.

An error is one line: file, line, field, what is allowed, value. Lines that begin with '#' are comments; empty lines are allowed
before the header and at the end of the file only.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from adaptive_spec.domain.arrays import Floats, Ints
from adaptive_spec.errors import BadInput
from adaptive_spec.regular_file import read_regular_file

MAX_NUM_TOKENS = 65_536
LEAST_MS, MOST_MS = 1e-6, 3.6e6
"""A nanosecond to an hour: the squares of such times can be summed."""
LARGEST_BYTES = 64 << 20
"""Some 4 million rows, which take about 1 GB of memory and 10 s to read."""
LONGEST_NUMBER = 40
"""Characters. Python takes quadratic time for long whole numbers."""
Value = TypeVar("Value")


class LatencySamples(NamedTuple):
    """num_tokens: int64 [n], 1..MAX_NUM_TOKENS. latency_s: float64 [n], 1e-9..3600."""

    num_tokens: Ints
    latency_s: Floats


class CalibrationPairs(NamedTuple):
    """cumulative_score: float64 [n] in (0, 1]. accepted: uint8 [n], 0 or 1."""

    cumulative_score: Floats
    accepted: NDArray[np.uint8]


def read_latency(path: Path) -> LatencySamples:
    """Read `num_tokens,latency_ms`. Raises BadInput."""
    tokens: list[int] = []
    latency_ms: list[float] = []
    for at, (count, latency) in _rows(path, ("num_tokens", "latency_ms")):
        tokens.append(
            _value(at, "num_tokens", count, int, lambda n: 1 <= n <= MAX_NUM_TOKENS, f"a whole number in 1..{MAX_NUM_TOKENS}")
        )
        latency_ms.append(
            _value(
                at, "latency_ms", latency, float, lambda ms: LEAST_MS <= ms <= MOST_MS, f"a number in {LEAST_MS:g}..{MOST_MS:g}"
            )
        )
    return LatencySamples(np.array(tokens, np.int64), np.array(latency_ms) / 1e3)


def read_calibration(path: Path) -> CalibrationPairs:
    """Read `cumulative_score,accepted`. Raises BadInput."""
    scores: list[float] = []
    accepted: list[int] = []
    for at, (score, outcome) in _rows(path, ("cumulative_score", "accepted")):
        scores.append(_value(at, "cumulative_score", score, float, lambda p: 0.0 < p <= 1.0, "a number in (0, 1]"))
        accepted.append(_value(at, "accepted", outcome, int, lambda bit: bit in (0, 1), "0 or 1"))
    return CalibrationPairs(np.array(scores), np.array(accepted, np.uint8))


def _rows(path: Path, header: tuple[str, str]) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield (file and line, fields) of each data row. Raises BadInput."""
    try:
        text = read_regular_file(path, LARGEST_BYTES, follow_links=True).data.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise BadInput(f"{path}: cannot be read: {reason}") from error
    lines = text.splitlines()
    while lines and not lines[-1].strip():
        lines.pop()
    wanted, rows = ",".join(header), 0
    seen_header = False
    for number, line in enumerate(lines, start=1):
        at = f"{path}: line {number}"
        if line.startswith("#") or (not seen_header and not line.strip()):
            continue
        try:
            fields = [field.strip() for field in next(csv.reader([line], strict=True), [])]
        except csv.Error as error:
            raise BadInput(f"{at}: {error}, got {line[:60]!r}") from error
        if not seen_header:
            if fields != list(header):
                raise BadInput(f"{at}: header: must be {wanted}, got {line[:60]!r}")
            seen_header = True
            continue
        if len(fields) != 2:
            raise BadInput(f"{at}: must be two fields, {wanted}, got {line[:60]!r}")
        rows += 1
        yield at, (fields[0], fields[1])
    if not seen_header:
        raise BadInput(f"{path}: file is empty; must begin with the header {wanted}")
    if not rows:
        raise BadInput(f"{path}: no rows; must have at least one under the header {wanted}")


def _value(at: str, field: str, text: str, kind: Callable[[str], Value], allowed: Callable[[Value], bool], words: str) -> Value:
    try:
        value = kind(text) if len(text) <= LONGEST_NUMBER and text.isascii() and "_" not in text else None
    except ValueError:
        value = None
    if value is None or not allowed(value):
        raise BadInput(f"{at}: {field}: must be {words}, got {text[:40]!r}")
    return value
