"""EngineInfo: model, hardware, and the K that an engine can run."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from adaptive_spec.domain.allowed import LARGEST_K, AllowedFrom, allowed_at, ranges
from adaptive_spec.domain.arrays import Bools
from adaptive_spec.domain.policy import Granularity

LARGEST_BATCH = 4096
LARGEST_TP = 4096
LARGEST_PID = 2**31 - 1
LONGEST_ENGINE = 32
LONGEST_TEXT = 200
"""Characters of a model's or a GPU's name, or of a value of the fingerprint."""
LONGEST_KEY = 40
MOST_FIELDS = 32
LONGEST_FOLDER_PART = 80
"""Characters of a name in a folder's name, which may have 255 bytes with all its parts."""
DIGEST_DIGITS = 8


@dataclass(frozen=True)
class EngineInfo:
    """Identity and capabilities of one engine.

    name: "embedded", "sglang", ... model, gpu, tp: part of the profile's name and of the metric labels. launch_k: K it was
    started with. candidates: the K it can run, ascending (SGLang: the captured runtime states). max_batch: most requests in a
    step. granularity: whether verify lengths may differ in a step. holds_batch: it can keep the batch at the size that a trial
    asks for. pid: process id. allowed_from: from this batch size on, these K: (batch size, K ascending), ascending batch sizes,
    the first entry at 1; () means every candidate at every batch size. The launch K is allowed at every batch size.
    fingerprint: (name, value), ascending, of all else that decides step times and acceptance: configuration of target and draft,
    quantisation, ..., see `fingerprint_of`. Models that were learnt with another fingerprint are not this engine's.
    """

    name: str
    model: str
    gpu: str
    tp: int
    launch_k: int
    candidates: tuple[int, ...]
    max_batch: int
    granularity: Granularity
    holds_batch: bool
    pid: int
    allowed_from: AllowedFrom = ()
    fingerprint: tuple[tuple[str, str], ...] = ()

    @property
    def digest(self) -> int:
        """1..2^64-1, of all fields but pid: the same for the same engine after a restart."""
        fields = {**asdict(self), "pid": 0}
        return int.from_bytes(hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).digest()[:8], "little") or 1

    @property
    def max_k(self) -> int:
        return self.candidates[-1]

    @property
    def profile_name(self) -> str:
        """Folder name `{model}_{gpu}_tp{N}`; characters other than letters, digits, '.' and '-' become '-'.

        `_` and the first digits of a hash follow where that alone could be another engine's name: with a fingerprint, and
        where the model's name was changed.
        """
        if not self.fingerprint and _file_name(self.model) == self.model:
            return self.readable_name
        whole = json.dumps([self.name, self.model, self.gpu, self.tp, self.fingerprint]).encode()
        return f"{self.readable_name}_{hashlib.sha256(whole).hexdigest()[:DIGEST_DIGITS]}"

    @property
    def readable_name(self) -> str:
        """`{model}_{gpu}_tp{N}`, which several engines may share."""
        return f"{_file_name(self.model)}_{_file_name(self.gpu)}_tp{self.tp}"

    def checked(self) -> EngineInfo:
        """Return this. Raises ValueError (field, what is allowed, value) for a value of the wrong type or out of range."""
        _text("name", self.name, LONGEST_ENGINE)
        _text("model", self.model, LONGEST_TEXT)
        _text("gpu", self.gpu, LONGEST_TEXT)
        _whole("tp", self.tp, 1, LARGEST_TP)
        _whole("launch_k", self.launch_k, 0, LARGEST_K)
        _whole("max_batch", self.max_batch, 1, LARGEST_BATCH)
        _whole("pid", self.pid, 0, LARGEST_PID)
        if not isinstance(self.holds_batch, bool):
            raise ValueError(f"holds_batch: must be true or false, got {_shown(self.holds_batch)}")
        for k in self.candidates:
            _whole("candidates: K", k, 0, LARGEST_K)
        if not self.candidates or list(self.candidates) != sorted(set(self.candidates)):
            raise ValueError(f"candidates: must be ascending draft lengths of at least 0, got {_shown(list(self.candidates))}")
        for batch_size, ks in self.allowed_from:
            _whole("allowed_from: batch size", batch_size, 1, LARGEST_BATCH)
            for k in ks:
                _whole("allowed_from: K", k, 0, LARGEST_K)
            if not ks or list(ks) != sorted(set(ks)) or not {*ks} <= {*self.candidates, self.launch_k}:
                raise ValueError(
                    f"allowed_from: batch size {batch_size}: must be ascending K of candidates, got {_shown(list(ks))}"
                )
        sizes = [batch_size for batch_size, _ in self.allowed_from]
        if sizes and (sizes[0] != 1 or sizes != sorted(set(sizes))):
            raise ValueError(f"allowed_from: must have ascending batch sizes from 1 on, got {_shown(sizes)}")
        if len(self.fingerprint) > MOST_FIELDS:
            raise ValueError(f"fingerprint: must have at most {MOST_FIELDS} fields, got {len(self.fingerprint)}")
        for name, value in self.fingerprint:
            _text("fingerprint: name", name, LONGEST_KEY)
            _text(f"fingerprint: {name}", value, LONGEST_TEXT)
        return self

    def allowed_k(self, batch_size: int) -> tuple[int, ...]:
        """K that the engine runs at a batch size, ascending; among them the launch K."""
        if not self.allowed_from:
            return self.candidates
        return tuple(sorted({*allowed_at(self.allowed_from, batch_size), self.launch_k}))

    def allowed_mask(self) -> Bools:
        """[max_batch + 1, max_k + 1], whether the engine runs K (column) at a batch size (row). Row 0 is row 1."""
        mask = np.zeros((self.max_batch + 1, self.max_k + 1), np.bool_)
        for batch_size in range(self.max_batch + 1):
            mask[batch_size, self._table_k(batch_size)] = True
        return mask

    def allowed_ranges(self) -> AllowedFrom:
        """`allowed_mask` as a policy carries it: with the launch K in every entry, () when every K 0..max_k is allowed."""
        if not self.allowed_from and len(self.candidates) == self.max_k + 1:
            return ()
        return ranges([self._table_k(batch_size) for batch_size in range(1, self.max_batch + 1)])

    def _table_k(self, batch_size: int) -> tuple[int, ...]:
        """`allowed_k` without a launch K above max_k."""
        return tuple(k for k in self.allowed_k(max(batch_size, 1)) if k <= self.max_k) or (self.max_k,)

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> EngineInfo:
        """Raise ValueError when a field is missing, unknown or of the wrong kind."""
        try:
            fields = json.loads(data)
            converted = {"candidates": tuple(fields["candidates"]), "granularity": Granularity(fields["granularity"])}
            converted["allowed_from"] = tuple((batch_size, tuple(ks)) for batch_size, ks in fields.get("allowed_from", ()))
            converted["fingerprint"] = tuple((name, value) for name, value in fields.get("fingerprint", ()))
            info = cls(**{**fields, **converted})
        except Exception as error:  # what JSON can hold: no dict, a number too long, nesting too deep
            raise ValueError(f"engine information is damaged: {_shown(error)}") from error
        return info.checked()


def fingerprint_of(fields: Mapping[str, object]) -> tuple[tuple[str, str], ...]:
    """Return the fingerprint with these fields: values as text, within the limits, those that are None or empty left out."""
    texts = {name[:LONGEST_KEY]: shortened(value) for name, value in fields.items() if value is not None and str(value)}
    return tuple(sorted(texts.items()))[:MOST_FIELDS]


def hash_of(value: object) -> str:
    """Return 16 hexadecimal digits that stand for a value: JSON, or text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def shortened(value: object, longest: int = LONGEST_TEXT) -> str:
    """Return text within the limit, of printable characters; what is cut or replaced is told apart by a hash at the end."""
    text = str(value)
    shown = "".join(c if c.isprintable() else "?" for c in text)
    if shown == text and len(text) <= longest:
        return text
    return f"{shown[: longest - 17]}-{hash_of(text)}"


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "-", text)[:LONGEST_FOLDER_PART].strip("-.") or "unknown"


def _text(field: str, value: object, longest: int) -> None:
    if not isinstance(value, str) or not 1 <= len(value) <= longest or not value.isprintable():
        raise ValueError(f"{field}: must be printable text of 1..{longest} characters, got {_shown(value)}")


def _whole(field: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{field}: must be a whole number in {low}..{high}, got {_shown(value)}")


def _shown(value: object) -> str:
    """A value in a message: one line, not too long. repr of a whole number with more than 4300 digits raises."""
    try:
        text = str(value) if isinstance(value, Exception) else repr(value)
    except ValueError:
        text = f"a {type(value).__name__} that is too long"
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= 100 else f"{text[:100]}..."
