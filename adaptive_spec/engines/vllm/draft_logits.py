"""Draft confidences, which vLLM does not keep for greedy drafts: the largest softmax probability of the draft's logits.

Sampled drafts (`draft_sample_method: probabilistic`, for requests with a temperature) are not seen: their confidence would be the
drawn token's, and cutting drafts by that would change the distribution of the output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adaptive_spec.engines.common.host_probabilities import each_max_probability
from adaptive_spec.engines.common.max_probability import GROUP_ELEMENTS, max_probability
from adaptive_spec.engines.common.pinned_ring import PinnedRing
from adaptive_spec.engines.common.steps_in_flight import Confidences, KnownConfidences
from adaptive_spec.wire.slot import MAX_BATCH_LIMIT, MAX_K_LIMIT

HELD_ELEMENTS = GROUP_ELEMENTS // 8
"""Logits of a draft position up to which those of all positions are kept, on a CPU, and looked at together."""


class DraftLogits:
    """Collects the confidences of one drafting. device: where the draft model runs."""

    def __init__(self, device: torch.device) -> None:
        self._ring = PinnedRing(MAX_BATCH_LIMIT, MAX_K_LIMIT, _pinned, torch.cuda.Event) if device.type == "cuda" else None
        self._logits: list[Tensor] = []
        self._probabilities: list[Tensor] = []
        self.listening = False

    @property
    def seeing(self) -> bool:
        """Whether logits of the present drafting were seen."""
        return bool(self._logits or self._probabilities)

    def listen(self) -> None:
        """A drafting begins."""
        self._logits, self._probabilities, self.listening = [], [], True

    def unseen(self, proposer: Any) -> bool:
        """Whether a proposer chooses its token without logits over the target's whole vocabulary."""
        return bool(proposer.use_local_argmax_reduction) or bool(proposer.use_heterogeneous_vocab)

    def look(self, logits: Tensor) -> None:
        """logits: [b, V] of one draft position, or [b * K, V] of all, request by request."""
        if self._ring is None and logits.numel() <= HELD_ELEMENTS:
            self._logits.append(logits)
        else:
            self._probabilities.append(max_probability(logits))

    def take(self, rows: int) -> Confidences | None:
        """The drafting has ended: confidences [rows, K], None where none were seen or they do not fit."""
        seen = self._logits or self._probabilities
        by_logits, self.listening = bool(self._logits), False
        self._logits, self._probabilities = [], []
        positions = len(seen)
        if not seen or rows == 0 or any(len(one) != len(seen[0]) for one in seen):
            return None
        if len(seen[0]) != rows and (positions > 1 or len(seen[0]) % rows):
            return None
        if by_logits:
            return KnownConfidences(each_max_probability(seen).reshape(rows, -1))
        values = torch.stack(seen, dim=1).reshape(rows, -1)
        return self._ring.send(values) if self._ring is not None else KnownConfidences(values.float().numpy())


def _pinned(rows: int, columns: int) -> Tensor:
    return torch.empty((rows, columns), dtype=torch.float32, pin_memory=True)
