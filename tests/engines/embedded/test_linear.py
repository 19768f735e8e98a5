import numpy as np
import pytest
import torch

from adaptive_spec.engines.embedded.linear import MAX_IN_FEATURES, IntegerLinear, RowBuffer, qnnpack_available, quantise_weight

CPU = torch.device("cpu")
FORMS = [pytest.param(True, marks=pytest.mark.skipif(not qnnpack_available(), reason="this torch has no qnnpack")), False]


def linear_and_buffer(qnnpack: bool, width: int = 384, out: int = 640) -> tuple[IntegerLinear, RowBuffer]:
    weight, scale = quantise_weight(torch.randn(out, width, generator=torch.Generator().manual_seed(2)))
    return IntegerLinear(weight, scale, CPU, qnnpack), RowBuffer(width, 32, qnnpack, CPU)


@pytest.mark.parametrize("qnnpack", FORMS)
def test_a_row_does_not_depend_on_the_rows_beside_it(qnnpack: bool) -> None:
    linear, buffer = linear_and_buffer(qnnpack)
    random = torch.Generator().manual_seed(3)
    # Neighbours a thousand times larger would change the scale of a tensor-wide quantisation.
    x = torch.randn(19, 384, generator=random) * torch.logspace(-3, 3, 19)[:, None]
    together = linear(buffer.quantise(x)[0]).clone()
    for rows in (slice(0, 1), slice(4, 9), slice(7, 19)):
        assert torch.equal(linear(buffer.quantise(x[rows])[0]), together[rows])


@pytest.mark.parametrize("qnnpack", FORMS)
def test_the_result_is_the_exact_integer_sum(qnnpack: bool) -> None:
    weight = torch.from_numpy(np.random.default_rng(4).integers(-127, 128, size=(8, 1024)).astype(np.int8))
    weight[0], weight[1] = 127, -127
    scale = torch.rand(8, generator=torch.Generator().manual_seed(5)) + 0.5
    linear, buffer = IntegerLinear(weight, scale, CPU, qnnpack), RowBuffer(1024, 4, qnnpack, CPU)
    rows, q, step = buffer.quantise(torch.stack((torch.ones(1024), torch.linspace(-2.0, 1.0, 1024))))
    assert q.abs().max() == 127
    torch.testing.assert_close(step[:, 0], torch.tensor([1.0, 2.0]) / 127)
    exact = q.to(torch.int64) @ weight.to(torch.int64).T
    assert int(exact.abs().max()) == 127 * 127 * 1024
    assert torch.equal(linear(rows), exact.float() * scale)


@pytest.mark.skipif(not qnnpack_available(), reason="this torch has no qnnpack")
def test_both_forms_give_the_same_bits() -> None:
    linear, buffer = linear_and_buffer(True)
    rows, _, _ = buffer.quantise(torch.randn(32, 384, generator=torch.Generator().manual_seed(6)))
    assert torch.equal(linear(rows), linear(rows, dense=True))


def test_it_approximates_the_float_linear() -> None:
    weight = torch.randn(640, 384, generator=torch.Generator().manual_seed(2))
    linear, buffer = linear_and_buffer(False)
    x = torch.randn(8, 384, generator=torch.Generator().manual_seed(7))
    rows, _, step = buffer.quantise(x)
    exact = x @ weight.T
    assert (linear(rows) * step - exact).std() < 0.02 * exact.std()


def test_a_width_that_would_not_be_exact_is_refused() -> None:
    weight, scale = quantise_weight(torch.randn(4, MAX_IN_FEATURES + 1))
    with pytest.raises(ValueError, match=r"in_features: must be in 1\.\.1040 for exact sums, got 1041"):
        IntegerLinear(weight, scale, CPU, False)
