"""The Triton kernels of `max_probability`: maximum and sum of exponentials of each split of the vocabulary, then of each row.

    partial     m = max l, s = sum(exp(l - m))                     one program per row and split
    combine     M = max m, S = sum(s exp(m - M)), result 1 / S     one program per row

S >= 1 wherever there is a softmax, the largest logit's own term being exp(0). A NaN or +inf makes S NaN and a row of -inf makes
it 0: neither is >= 1, and the result is UNKNOWN_CONFIDENCE.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaptive_spec.domain.step_record import UNKNOWN_CONFIDENCE

BLOCK = 4096
"""Logits per split: 16 in each of 256 threads, and 38 programs for one row of 152 000."""
WARPS = 8


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no types
def _partial(logits, maxima, sums, vocabulary, splits, row_stride, column_stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803  # as above
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = split * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(
        logits + row * row_stride + at.to(tl.int64) * column_stride, mask=at < vocabulary, other=float("-inf")
    ).to(tl.float32)  # fmt: skip
    m = tl.max(x, axis=0)
    # exp(-inf - -inf) would be NaN where a split is masked as a whole.
    s = tl.sum(tl.exp(x - tl.where(m == float("-inf"), 0.0, m)), axis=0)
    tl.store(maxima + row * splits + split, m)
    tl.store(sums + row * splits + split, s)


@triton.jit  # type: ignore[untyped-decorator]  # as above
def _combine(maxima, sums, result, splits, unknown, SPLITS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803  # as above
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    m = tl.load(maxima + row * splits + split, mask=split < splits, other=float("-inf"))
    s = tl.load(sums + row * splits + split, mask=split < splits, other=0.0)
    largest = tl.max(m, axis=0)
    total = tl.sum(s * tl.exp(m - tl.where(largest == float("-inf"), 0.0, largest)), axis=0)
    known = total >= 1.0
    tl.store(result + row, tl.where(known, 1.0 / tl.where(known, total, 1.0), unknown))


def split_max_probability(logits: Tensor, block: int = BLOCK) -> Tensor:
    """See `max_probability`: logits [rows, V], any strides -> float32 [rows]. block: logits per split, a power of two."""
    rows, vocabulary = logits.shape
    splits = triton.cdiv(vocabulary, block)
    maxima, sums = torch.empty((2, rows, splits), dtype=torch.float32, device=logits.device)
    result = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        _partial[rows, splits](
            logits, maxima, sums, vocabulary, splits, logits.stride(0), logits.stride(1), BLOCK=block, num_warps=WARPS
        )
        _combine[(rows,)](maxima, sums, result, splits, UNKNOWN_CONFIDENCE, SPLITS=triton.next_power_of_2(splits), num_warps=1)
    return result
