"""Taps that do what a test says, and remember what the decoder reported."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from adaptive_spec.domain.step_record import StepRecord
from adaptive_spec.engines.embedded.step_tap import FixedK


class RecordingTap(FixedK):
    """Static K; `records` holds a StepRecord of every step, as a ring would."""

    def __init__(self, k: int) -> None:
        super().__init__(k)
        self.records: list[StepRecord] = []
        self._begun = (0, 0)

    def begin_step(self, batch_size: int, kv_tokens: int, now_ns: int) -> int:
        self._begun = (batch_size, kv_tokens)
        return self.k

    def end_step(
        self, now_ns: int, num_tokens: int, padded_tokens: int, draft_s: float, verify_s: float, draft_extend_s: float,
        step_s: float, confidences: NDArray[np.float32], verify_len: NDArray[np.uint8], accept_len: NDArray[np.uint8],
        request_ids: NDArray[np.uint32], flags: int = 0,
    ) -> None:  # fmt: skip
        batch_size, kv_tokens = self._begun
        self.records.append(StepRecord(
            len(self.records) + 1, now_ns, kv_tokens, 0, num_tokens, padded_tokens, batch_size, confidences.shape[1], flags,
            draft_s, verify_s, draft_extend_s, step_s, confidences, verify_len, accept_len, request_ids,
        ))  # fmt: skip


class RandomTap(RecordingTap):
    """Any K, any verify lengths, now and then a held batch: whatever a policy could do."""

    def __init__(self, seed: int, max_k: int = 7) -> None:
        super().__init__(0)
        self._random = np.random.default_rng(seed)
        self._max_k = max_k

    def begin_step(self, batch_size: int, kv_tokens: int, now_ns: int) -> int:
        self.k = int(self._random.integers(0, self._max_k + 1)) if self._random.random() < 0.7 else 0
        self.held_batch_size = int(self._random.integers(1, 9)) if self._random.random() < 0.3 else 0
        return super().begin_step(batch_size, kv_tokens, now_ns)

    def verify_lengths(self, confidences: NDArray[np.float32]) -> NDArray[np.uint8]:
        rows, k = confidences.shape
        chosen: NDArray[np.uint8] = self._random.integers(0, k + 1, size=rows).astype(np.uint8)
        return chosen
