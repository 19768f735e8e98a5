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

log = logging.getLogger("sglang.adaptive_spec")


def max_probability(logits: Tensor) -> Tensor:
    """Logits [..., V], V >= 1, of any float type and strides -> float32 [...] in (0, 1]; `UNKNOWN` where there is no softmax.

    May be called while a CUDA graph is captured: it never waits for the device, and what it allocates has the same size for the
    same shape. A kernel that was not compiled before the capture is not compiled within it; PyTorch's operators are captured.
    """
    rows = logits.reshape(-1, logits.shape[-1])
    found = _by_kernel.of(rows) if rows.is_cuda else None
    return (plain_max_probability(rows) if found is None else found).reshape(logits.shape[:-1])


def plain_max_probability(rows: Tensor) -> Tensor:
    """The same for logits [rows, V] by PyTorch's operators."""
    import torch

    if rows.is_cuda:
        values = rows.float()
        probability = (values.amax(dim=-1) - torch.logsumexp(values, dim=-1)).exp()
    else:
        step = max(torch.get_num_threads(), GROUP_ELEMENTS // rows.shape[-1])
        groups = [torch.softmax(group, dim=-1, dtype=torch.float32).amax(dim=-1) for group in torch.split(rows, step)]
        probability = groups[0] if len(groups) == 1 else torch.cat(groups)
    # NaN > 0 is false. No rounding brings a probability to 0: it is at least 1 / V.
    return torch.where(probability > 0.0, probability, UNKNOWN)


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
            from adaptive_spec.engines.sglang.max_probability_kernel import split_max_probability

            with torch.cuda.device(rows.device):
                found = split_max_probability(rows)
        except Exception as error:
            self._failed = True
            log.warning("adaptive-spec: no Triton kernel for confidences, PyTorch is used: %s", error)
            return None
        self._compiled.add(kind)
        return found


_by_kernel = _Kernel()
