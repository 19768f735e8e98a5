"""Draft confidences, which vLLM does not keep for greedy drafts: the largest softmax probability of the draft's logits.

Sampled drafts (`draft_sample_method: probabilistic`, for requests with a temperature) are not seen: their confidence would be the
drawn token's, and cutting drafts by that would change the distribution of the output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adaptive_spec.engines.common.max_probability import max_probability
from adaptive_spec.engines.common.pinned_ring import PinnedRing
from adaptive_spec.engines.common.steps_in_flight import Confidences, KnownConfidences
from adaptive_spec.wire.slot import MAX_BATCH_LIMIT, MAX_K_LIMIT


class DraftLogits:
    """Collects the confidences of one drafting. device: where the draft model runs."""

    def __init__(self, device: torch.device) -> None:
        self._ring = PinnedRing(MAX_BATCH_LIMIT, MAX_K_LIMIT, _pinned, torch.cuda.Event) if device.type == "cuda" else None
        self._seen: list[Tensor] = []
        self.listening = False

    def listen(self) -> None:
        """A drafting begins."""
        self._seen, self.listening = [], True

    def unseen(self, proposer: Any) -> bool:
        """Whether a proposer chooses its token without logits over the target's whole vocabulary."""
        return bool(proposer.use_local_argmax_reduction) or bool(proposer.use_heterogeneous_vocab)

    def look(self, logits: Tensor) -> None:
        """logits: [b, V] of one draft position, or [b * K, V] of all, request by request."""
        self._seen.append(max_probability(logits))

    def take(self, rows: int) -> Confidences | None:
        """The drafting has ended: confidences [rows, K], None where none were seen or they do not fit."""
        seen, self._seen, self.listening = self._seen, [], False
        if not seen or rows == 0:
            return None
        if len(seen) == 1 and seen[0].numel() % rows == 0:
            values = seen[0].reshape(rows, -1)
        elif all(one.numel() == rows for one in seen):
            values = torch.stack([one.reshape(-1) for one in seen], dim=1)
        else:
            return None
        return self._ring.send(values) if self._ring is not None else KnownConfidences(values.float().numpy())


def _pinned(rows: int, columns: int) -> Tensor:
    return torch.empty((rows, columns), dtype=torch.float32, pin_memory=True)
