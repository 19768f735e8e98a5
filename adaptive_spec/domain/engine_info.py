"""EngineInfo: model, hardware, and the K that an engine can run."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass

from adaptive_spec.domain.policy import Granularity


@dataclass(frozen=True)
class EngineInfo:
    """Identity and capabilities of one engine.

    name: "embedded", "sglang", ... model, gpu, tp: part of the profile's name and of the metric labels. launch_k: K it was
    started with. candidates: the K it can run, ascending (SGLang: the captured runtime states). max_batch: most requests in a
    step. granularity: whether verify lengths may differ in a step. holds_batch: it can keep the batch at the size that a trial
    asks for. pid: process id.
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

    @property
    def max_k(self) -> int:
        return self.candidates[-1]

    @property
    def profile_name(self) -> str:
        """Folder name `{model}_{gpu}_tp{N}`; characters other than letters, digits, '.' and '-' become '-'."""
        return "_".join([_file_name(self.model), _file_name(self.gpu), f"tp{self.tp}"])

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> EngineInfo:
        """Raise ValueError when a field is missing, unknown or of the wrong kind."""
        try:
            fields = json.loads(data)
            info = cls(**{**fields, "candidates": tuple(fields["candidates"]), "granularity": Granularity(fields["granularity"])})
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"engine information is damaged: {error}") from error
        if not info.candidates or list(info.candidates) != sorted(set(info.candidates)) or info.candidates[0] < 0:
            raise ValueError(f"candidates: must be ascending draft lengths of at least 0, got {list(info.candidates)}")
        return info


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "-", text).strip("-.") or "unknown"
