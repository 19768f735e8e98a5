"""The probability of the most likely token of each row of logits, without writing the probabilities of the others.

    max softmax(l) = 1 / sum(exp(l - max l))

On a GPU a Triton kernel (`max_probability_kernel`) reads every logit once: the vocabulary is split over programs, so that one
row keeps many of them busy, and a second kernel combines the splits. Elsewhere, and where Triton cannot be used, PyTorch's own
operators. torch and triton are imported when the first logits arrive: the server has both, a sidecar neither.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from adaptive_spec.domain.step_record import UNKNOWN_CONFIDENCE

if TYPE_CHECKING:
    from torch import Tensor

UNKNOWN = UNKNOWN_CONFIDENCE
"""Result for a row that has no softmax: all logits -inf, one of them NaN or +inf."""
GROUP_ELEMENTS = 1 << 18
"""Logits a CPU thread handles at a time: their softmax (1 MiB) stays in the cache. Four times more or less costs the same, all
at once 2 to 4 times as much, most of it page faults (`make bench ARGS=confidences`)."""

log = logging.getLogger(__name__)


def max_probability(logits: Tensor) -> Tensor:
    """Logits [..., V], V >= 1, of any float type and strides -> float32 [...] in (0, 1]; `UNKNOWN` where there is no softmax.

    May be called while a CUDA graph is captured: it never waits for the device, and what it allocates has the same size for the
    same shape. A kernel that was not compiled before the capture is not compiled within it; PyTorch's operators are captured.
    """
    rows = logits if logits.dim() == 2 else logits.reshape(-1, logits.shape[-1])
    found = _by_kernel.of(rows) if rows.is_cuda else None
    if found is None:
        found = plain_max_probability(rows)
    return found if rows is logits else found.reshape(logits.shape[:-1])


def plain_max_probability(rows: Tensor) -> Tensor:
    """The same for logits [rows, V] by PyTorch's operators."""
    import torch

    step = max(torch.get_num_threads(), GROUP_ELEMENTS // rows.shape[-1])
    if rows.is_cuda:
        values = rows.float()
        probability = (values.amax(dim=-1) - torch.logsumexp(values, dim=-1)).exp()
    elif len(rows) <= step:  # every call of PyTorch counts for a single row
        probability = torch.softmax(rows.float(), dim=-1).amax(dim=-1)
    else:
        probability = _in_groups(rows, step)
    return probability.nan_to_num_(nan=UNKNOWN)


def _in_groups(rows: Tensor, step: int) -> Tensor:
    """The same for `step` rows at a time, NaN where unknown. One block of memory for all groups, or each would be faulted in."""
    import torch

    result = torch.empty(len(rows), dtype=torch.float32)
    softmax = torch.empty((step, rows.shape[-1]), dtype=torch.float32)
    values = None if rows.dtype == torch.float32 else torch.empty_like(softmax)
    for begin in range(0, len(rows), step):
        group = rows[begin : begin + step]
        n = len(group)
        if values is not None:
            group = values[:n].copy_(group)
        torch.amax(torch.softmax(group, dim=-1, out=softmax[:n]), dim=-1, out=result[begin : begin + n])
    return result


class _Kernel:
    """The Triton kernel while it works. A failure is logged once, and PyTorch's operators take its place for good."""

    def __init__(self) -> None:
        self._failed = False
        self._compiled: set[tuple[object, ...]] = set()

    def of(self, rows: Tensor) -> Tensor | None:
        """The result for logits [rows, V] on a GPU; None where PyTorch's operators are to be used."""
        if self._failed:
            return None
        import torch

        # What Triton compiles a kernel for.
        kind = (
            rows.device, rows.dtype, rows.shape[1], rows.stride(0) % 16 == 0, rows.stride(0) == 1, rows.stride(1),
            rows.data_ptr() % 16 == 0,
        )  # fmt: skip
        if kind not in self._compiled and torch.cuda.is_current_stream_capturing():
            return None
        try:
            from adaptive_spec.engines.common.max_probability_kernel import split_max_probability

            with torch.cuda.device(rows.device):
                found = split_max_probability(rows)
        except Exception as error:
            self._failed = True
            log.warning("adaptive-spec: no Triton kernel for confidences, PyTorch is used: %s", error)
            return None
        self._compiled.add(kind)
        return found


_by_kernel = _Kernel()
