"""The interface between decoder and tap, and a tap with a fixed K."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class StepTap(Protocol):
    """The part of `adaptive_spec.engine_side.tap.EngineTap` the decoder uses; see there for units and shapes."""

    @property
    def held_batch_size(self) -> int:
        """Batch size to hold, 0 for any."""
        ...

    def begin_step(self, batch_size: int, kv_tokens: int, now_ns: int) -> int:
        """Return K of the coming step."""
        ...

    def verify_lengths(self, confidences: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Return verify_len [b] for confidences [b, k]."""
        ...

    def end_step(
        self, now_ns: int, num_tokens: int, padded_tokens: int, draft_s: float, verify_s: float, draft_extend_s: float,
        step_s: float, confidences: NDArray[np.float32], verify_len: NDArray[np.uint8], accept_len: NDArray[np.uint8],
        request_ids: NDArray[np.uint32], flags: int = 0,
    ) -> None:  # fmt: skip
        """Take the record of the step."""
        ...


class FixedK:
    """Static speculative decoding: always K draft tokens, all of them verified, nothing recorded. k: 0 or more."""

    held_batch_size = 0

    def __init__(self, k: int) -> None:
        self.k = k

    def begin_step(self, batch_size: int, kv_tokens: int, now_ns: int) -> int:
        return self.k

    def verify_lengths(self, confidences: NDArray[np.float32]) -> NDArray[np.uint8]:
        rows, k = confidences.shape
        return np.full(rows, k, dtype=np.uint8)

    def end_step(
        self, now_ns: int, num_tokens: int, padded_tokens: int, draft_s: float, verify_s: float, draft_extend_s: float,
        step_s: float, confidences: NDArray[np.float32], verify_len: NDArray[np.uint8], accept_len: NDArray[np.uint8],
        request_ids: NDArray[np.uint32], flags: int = 0,
    ) -> None:  # fmt: skip
        pass
