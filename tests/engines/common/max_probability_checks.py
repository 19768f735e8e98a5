"""The kernels of `max_probability` in Triton's interpreter, on the CPU: run by test_max_probability in a process of its own."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_spec.engines.common.max_probability import UNKNOWN, plain_max_probability
from adaptive_spec.engines.common.max_probability_kernel import BLOCK, split_max_probability

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAN, INF = float("nan"), float("inf")


def exact(logits: torch.Tensor) -> torch.Tensor:
    """The definition, in float64; UNKNOWN where softmax gives no number."""
    return torch.nan_to_num(torch.softmax(logits.double(), dim=-1).amax(dim=-1), nan=UNKNOWN)


def check(logits: torch.Tensor, block: int) -> torch.Tensor:
    """Kernel and operators against the definition; the logits stay what they were."""
    before = logits.clone()
    with np.errstate(invalid="ignore"), warnings.catch_warnings():
        # The interpreter computes inf - inf and the maximum of NaN with numpy.
        warnings.filterwarnings("ignore", "All-NaN slice encountered", RuntimeWarning)
        found = split_max_probability(logits, block)
    assert (found.dtype, found.shape) == (torch.float32, (len(logits),))
    assert ((found == UNKNOWN) | ((found > 0.0) & (found <= 1.0))).all()
    torch.testing.assert_close(found.double(), exact(logits), rtol=2e-5, atol=0.0)
    # PyTorch's softmax on a CPU adds 150 000 terms less carefully.
    torch.testing.assert_close(plain_max_probability(logits).double(), exact(logits), rtol=1e-4, atol=0.0)
    assert torch.equal(logits.nan_to_num(), before.nan_to_num())
    return found


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 3),
    vocabulary=st.integers(1, 700),
    splits=st.integers(1, 4),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from((0.0, 1e-3, 1.0, 10.0, 1e4)),
    shift=st.sampled_from((0.0, 30_000.0, -30_000.0)),
    masked=st.sampled_from((0.0, 0.3, 0.99)),
    seed=st.integers(0, 1 << 16),
)
def test_any_shape_and_type(
    rows: int, vocabulary: int, splits: int, dtype: torch.dtype, scale: float, shift: float, masked: float, seed: int
) -> None:
    """Among them vocabularies that are no multiple of the block, splits without a logit that counts, equal logits."""
    torch.manual_seed(seed)
    logits = torch.randn(rows, vocabulary).mul_(scale).add_(shift).clamp_(-60_000.0, 60_000.0).to(dtype)
    logits[torch.rand(rows, vocabulary) < masked] = -INF
    check(logits, 1 << max(-(-vocabulary // splits) - 1, 0).bit_length())


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 1 << 16), where=st.integers(0, 299), bad=st.sampled_from((NAN, INF)), block=st.sampled_from((128, 512))
)
def test_a_row_without_a_softmax_is_unknown_and_no_other(seed: int, where: int, bad: float, block: int) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(4, 300)
    logits[1, where] = bad
    logits[2] = -INF
    found = check(logits, block)
    assert (found == UNKNOWN).tolist() == [False, True, True, False]


@pytest.mark.parametrize("bad", [NAN, INF])
def test_rows_of_nothing_else_are_unknown(bad: float) -> None:
    assert check(torch.full((2, 100), bad), 64).tolist() == [UNKNOWN, UNKNOWN]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_and_columns_that_are_not_contiguous(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    whole = torch.randn(4, 999).to(dtype)
    for part in (whole[::2], whole[:, 100:611], whole[:, ::3], whole.T[:3], whole[1:2, 1:].expand(3, -1)):
        check(part, 512)


def test_extremes() -> None:
    logits = torch.full((4, 1000), -1e30)
    logits[0, 7] = 3e38
    logits[1, 7] = logits[1, 999] = 0.0
    logits[3, :] = -3e38
    assert check(logits, 512).tolist() == pytest.approx([1.0, 0.5, 1e-3, 1e-3])
    assert check(torch.full((1, 65_504 // 16), 65_504.0).half(), 256).item() == pytest.approx(16 / 65_504)
    assert check(torch.tensor([[-INF, -5.0, -INF]]), 1).tolist() == [1.0]


@pytest.mark.parametrize("vocabulary", [32_000, 128_256, 151_936])
def test_vocabularies_of_real_models(vocabulary: int) -> None:
    torch.manual_seed(2)
    check((5.0 * torch.randn(1, vocabulary)).bfloat16(), BLOCK)
