"""Linear layers in integer arithmetic, so that a row's result cannot depend on the rows beside it.

    y = acc * scale,   acc = sum_i q_i * w_i   with integers |q_i| <= 127, |w_i| <= 127

Both operands are integers and |acc| <= 127^2 * in_features < 2^24, so every partial sum is exact in int32 and in float32
alike: any kernel, any order of summation and any batch give the same bits. Two forms of the same arithmetic:

- qnnpack (CPU builds that have it): the int8 kernel works on micro-tiles of 4 rows, so latency is a staircase of 4 rows.
- dense (CUDA, other builds, long prefills): a float32 matrix product over the same integers.

`quantized::linear_dynamic` takes its activation scale from the whole tensor. Rows arrive already rounded to integers, and
two sentinel columns (+127 and -128, their weights zero) pin that scale to exactly 1 and the zero point to 128: nothing is
rounded twice, nothing saturates, and the kernel never repacks its weights.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's name for it

LEVELS = 127
"""Largest integer of a quantised row or weight."""
MAX_IN_FEATURES = (1 << 24) // (LEVELS * LEVELS)
"""Beyond this many inputs a float32 sum of products could be inexact (1040)."""
SENTINEL_COLUMNS = 8
"""Columns appended for qnnpack: +127, -128 and six zeros, which keep rows 8-aligned."""

_TINY = 1e-20


def qnnpack_available() -> bool:
    """Whether this build of torch can run int8 linears on qnnpack."""
    return "qnnpack" in torch.backends.quantized.supported_engines and hasattr(torch.ops.quantized, "linear_dynamic")


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round [out, in] float weights symmetrically, one scale per output: int8 [out, in] and float32 scale [out]."""
    scale = weight.abs().amax(dim=1).clamp_min(_TINY) / LEVELS
    return (weight / scale[:, None]).round().to(torch.int8), scale.float()


class RowBuffer:
    """Room for quantised rows of one width, sentinel columns included."""

    def __init__(self, width: int, max_rows: int, sentinels: bool, device: torch.device) -> None:
        # Constants live in tensors: a Python number in an in-place operation costs several times as much.
        self._per_level = torch.tensor(1.0 / LEVELS, device=device)
        self._tiny = torch.tensor(_TINY, device=device)
        self.data = torch.zeros(max_rows, width + (SENTINEL_COLUMNS if sentinels else 0), device=device)
        if sentinels:
            self.data[:, width] = LEVELS
            self.data[:, width + 1] = -(LEVELS + 1)
        self._views: list[tuple[Tensor, Tensor]] = [(self.data[:n], self.data[:n, :width]) for n in range(max_rows + 1)]

    def quantise(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Round x [n, width] row by row: x ~ q * step.

        Returns the whole buffer rows [n, width + sentinels] (overwritten by the next call), q [n, width] as a view of them,
        and step [n, 1].
        """
        rows, q = self._views[x.shape[0]]
        step = torch.addcmul(self._tiny, x.abs().amax(-1, keepdim=True), self._per_level)
        torch.div(x, step, out=q).round_()
        return rows, q, step


class IntegerLinear:
    """y [n, out] = (q @ weight.T) * scale, q as `RowBuffer.quantise` gives it.

    weight: int8 [out, in], in <= 1040. scale: float32 [out]. qnnpack: whether to hold the int8 form too. Raises ValueError
    on a width that would not be exact.
    """

    def __init__(self, weight: Tensor, scale: Tensor, device: torch.device, qnnpack: bool) -> None:
        if weight.shape[1] > MAX_IN_FEATURES:
            raise ValueError(f"in_features: must be in 1..{MAX_IN_FEATURES} for exact sums, got {weight.shape[1]}")
        self.width = weight.shape[1]
        self._scale = scale.float().to(device)
        self._dense = weight.float().to(device)
        self._packed = _pack(weight, self._scale) if qnnpack else None

    def __call__(self, rows: Tensor, dense: bool = False) -> Tensor:
        """Rows [n, in + sentinels] -> [n, out]; dense=True takes the float32 kernel, the result is the same."""
        if self._packed is not None and not dense:
            y: Tensor = torch.ops.quantized.linear_dynamic(rows, self._packed, False)
            return y
        return F.linear(rows[:, : self.width], self._dense).mul_(self._scale)


def _pack(weight: Tensor, scale: Tensor) -> torch.ScriptObject:
    padded = F.pad(weight, (0, SENTINEL_COLUMNS))
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "qnnpack"
    try:
        with warnings.catch_warnings():
            # torch deprecates its quantised dtypes; without them `qnnpack_available` returns False.
            warnings.simplefilter("ignore", UserWarning)
            zeros = torch.zeros(len(scale), dtype=torch.int64)
            quantised = torch._make_per_channel_quantized_tensor(padded, scale.double(), zeros, 0)
            packed: torch.ScriptObject = torch.ops.quantized.linear_prepack(quantised, None)
            return packed
    finally:
        torch.backends.quantized.engine = before
