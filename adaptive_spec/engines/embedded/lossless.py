"""Checks that speculative output equals the target's: greedy outputs against the target alone, one token at a time.

On an exact target every byte must be equal. A target whose arithmetic depends on the batch may first differ where its two
best logits are closer than TIE_TOLERANCE. That is a tie and counted separately; the outputs after it are not compared.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from adaptive_spec.engines.embedded.decoder import END_OF_TEXT
from adaptive_spec.engines.embedded.kv_cache import PackedRows
from adaptive_spec.engines.embedded.quantised import ExactModel
from adaptive_spec.engines.embedded.requests import Request

TIE_TOLERANCE = 1e-3
"""Logits closer than this are a tie on devices whose kernels may round differently."""


@dataclass
class LosslessCheck:
    """Counts of checked greedy requests: equal ones, ties (see the module) and those that differ.

    exact: whether the target's arithmetic is exact; then a tie counts as a difference. tie_tolerance: in logits.
    """

    exact: bool = True
    tie_tolerance: float = TIE_TOLERANCE
    equal: int = 0
    ties: int = 0
    different: int = 0

    @property
    def checked(self) -> int:
        return self.equal + self.ties + self.different

    @property
    def lossless(self) -> bool:
        return self.different == 0

    def check(self, target: ExactModel, request: Request) -> bool:
        """Compare an ended greedy request with the target alone; return whether it passed."""
        expected, gaps = greedy_alone(target, request.prompt, request.max_new_tokens)
        output = bytes(request.output)
        if output == expected:
            self.equal += 1
            return True
        first = next((i for i, (a, b) in enumerate(zip(output, expected, strict=False)) if a != b), None)
        if first is not None and not self.exact and gaps[first] < self.tie_tolerance:
            self.ties += 1
            return True
        self.different += 1
        return False


def greedy_alone(target: ExactModel, prompt: bytes, max_new_tokens: int) -> tuple[bytes, list[float]]:
    """Decode greedily with the target alone. Returns the output and, for each token, its lead over the second best logit."""
    cache = target.new_cache(1)
    context = list(prompt)
    output: list[int] = []
    gaps: list[float] = []
    fresh = 0
    while len(output) < max_new_tokens and (not output or output[-1] != END_OF_TEXT):
        tokens = np.array(context[fresh : fresh + target.max_rows], dtype=np.int64)
        positions = np.arange(fresh, fresh + len(tokens))
        fresh += len(tokens)
        at = PackedRows.of(cache, np.zeros_like(tokens), positions)
        last = torch.tensor([len(tokens) - 1], device=target.device)
        logits = target.forward(cache, torch.from_numpy(tokens).to(target.device), at, last)
        if fresh < len(context):
            continue
        best = logits[0].topk(2)
        gaps.append(float(best.values[0] - best.values[1]))
        output.append(int(logits[0].argmax()))
        context.append(output[-1])
    return bytes(output), gaps
