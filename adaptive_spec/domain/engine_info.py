"""EngineInfo: model, hardware, and the K that an engine can run."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass

import numpy as np

from adaptive_spec.domain.allowed import AllowedFrom, allowed_at, ranges
from adaptive_spec.domain.arrays import Bools
from adaptive_spec.domain.policy import Granularity


@dataclass(frozen=True)
class EngineInfo:
    """Identity and capabilities of one engine.

    name: "embedded", "sglang", ... model, gpu, tp: part of the profile's name and of the metric labels. launch_k: K it was
    started with. candidates: the K it can run, ascending (SGLang: the captured runtime states). max_batch: most requests in a
    step. granularity: whether verify lengths may differ in a step. holds_batch: it can keep the batch at the size that a trial
    asks for. pid: process id. allowed_from: from this batch size on, these K: (batch size, K ascending), ascending batch sizes,
    the first entry at 1; () means every candidate at every batch size. The launch K is allowed at every batch size.
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

    @property
    def max_k(self) -> int:
        return self.candidates[-1]

    @property
    def profile_name(self) -> str:
        """Folder name `{model}_{gpu}_tp{N}`; characters other than letters, digits, '.' and '-' become '-'."""
        return "_".join([_file_name(self.model), _file_name(self.gpu), f"tp{self.tp}"])

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
            allowed_from = tuple((int(batch_size), tuple(ks)) for batch_size, ks in fields.get("allowed_from", ()))
            info = cls(**{**fields, **converted, "allowed_from": allowed_from})
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"engine information is damaged: {error}") from error
        if not info.candidates or list(info.candidates) != sorted(set(info.candidates)) or info.candidates[0] < 0:
            raise ValueError(f"candidates: must be ascending draft lengths of at least 0, got {list(info.candidates)}")
        sizes = [batch_size for batch_size, _ in info.allowed_from]
        if sizes and (sizes[0] != 1 or sizes != sorted(set(sizes))):
            raise ValueError(f"allowed_from: must have ascending batch sizes from 1 on, got {sizes}")
        for batch_size, ks in info.allowed_from:
            if not ks or list(ks) != sorted(set(ks)) or not {*ks} <= {*info.candidates, info.launch_k}:
                raise ValueError(f"allowed_from: batch size {batch_size}: must be ascending K of candidates, got {list(ks)}")
        return info


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "-", text).strip("-.") or "unknown"
