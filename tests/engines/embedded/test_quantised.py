from dataclasses import fields

import numpy as np
import pytest
import torch

from adaptive_spec.engines.embedded.kv_cache import KVCache, PackedRows
from adaptive_spec.engines.embedded.network import ByteDecoder
from adaptive_spec.engines.embedded.quantised import ExactModel, FloatModel
from adaptive_spec.engines.embedded.weights import quantise_model, random_weights
from tests.engines.embedded.conftest import SHAPE

TEXT = np.random.default_rng(0).integers(0, 256, size=(7, 120))


def run(
    model: ExactModel | FloatModel, cache: KVCache, slots: list[int], starts: list[int], counts: list[int], dense: bool = False
) -> torch.Tensor:
    """Forward counts[i] tokens of text slots[i] from starts[i] on, all in one batch."""
    where = np.repeat(slots, counts)
    positions = np.concatenate([np.arange(start, start + count) for start, count in zip(starts, counts, strict=True)])
    return model.forward(cache, torch.from_numpy(TEXT[where, positions]), PackedRows.of(cache, where, positions), dense=dense)


@pytest.mark.parametrize("kernel", ["auto", "dense"])
def test_a_request_gets_the_same_bits_alone_and_in_a_ragged_batch(kernel: str) -> None:
    model = ExactModel(SHAPE, random_weights(SHAPE, seed=1), kernel=kernel)
    alone, together = model.new_cache(1), model.new_cache(7)
    whole = {slot: run(model, model.new_cache(7), [slot], [0], [120]) for slot in range(7)}
    contexts = [3, 40, 100, 64, 31, 77, 1]
    run(model, together, list(range(7)), [0] * 7, [c // 2 for c in contexts])
    run(model, together, list(range(7)), [c // 2 for c in contexts], [c - c // 2 for c in contexts])
    lengths = [4, 1, 8, 2, 5, 3, 7]
    batch = run(model, together, list(range(7)), contexts, lengths)
    first = 0
    for slot, (context, length) in enumerate(zip(contexts, lengths, strict=True)):
        assert torch.equal(batch[first : first + length], whole[slot][context : context + length])
        first += length
    for position in range(100):  # one token at a time, in a cache of its own
        one = run(model, alone, [0], [position], [1])
        assert torch.equal(one[0], whole[0][position])


def test_the_dense_kernel_gives_the_same_bits() -> None:
    model = ExactModel(SHAPE, random_weights(SHAPE, seed=1))
    if not model.qnnpack:
        pytest.skip("this torch has no qnnpack")
    a, b = model.new_cache(2), model.new_cache(2)
    assert torch.equal(run(model, a, [0, 1], [0, 0], [30, 50]), run(model, b, [0, 1], [0, 0], [30, 50], dense=True))
    assert torch.equal(a.save(1, 50), b.save(1, 50))


def test_rejected_tokens_are_simply_overwritten(target: ExactModel) -> None:
    cache, clean = target.new_cache(2), target.new_cache(2)
    run(target, cache, [1], [0], [60])
    run(target, clean, [1], [0], [20])
    wrong = torch.randint(0, 256, (9,), generator=torch.Generator().manual_seed(1))
    target.forward(cache, wrong, PackedRows.of(cache, np.full(9, 1), np.arange(20, 29)))
    assert torch.equal(run(target, cache, [1], [20], [5]), run(target, clean, [1], [20], [5]))


def test_a_slot_can_be_moved_saved_and_restored(target: ExactModel) -> None:
    cache = target.new_cache(4)
    run(target, cache, [2], [0], [50])
    expected = run(target, cache, [2], [50], [3])
    cache.restore(0, cache.save(2, 50))
    cache.move(2, 3, 50)
    for slot in (0, 3):
        tokens = torch.from_numpy(TEXT[2, 50:53])
        got = target.forward(cache, tokens, PackedRows.of(cache, np.full(3, slot), np.arange(50, 53)))
        assert torch.equal(got, expected)


def test_both_forms_approximate_the_trained_network() -> None:
    torch.manual_seed(0)
    network = ByteDecoder(SHAPE)
    for name, parameter in network.named_parameters():
        with torch.no_grad():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else noise / parameter.shape[-1] ** 0.5)
    weights = quantise_model(SHAPE, network.state_dict())
    tokens = torch.from_numpy(TEXT[0])
    with torch.no_grad():
        expected = network(tokens[None])[0]
    exact, plain = ExactModel(SHAPE, weights), FloatModel(SHAPE, weights)
    for model, tolerance in ((exact, 0.05), (plain, 0.03)):
        logits = run(model, model.new_cache(1), [0], [0], [120])
        assert (logits - expected).std() < tolerance * expected.std()


def test_a_cache_needs_whole_context_blocks(target: ExactModel) -> None:
    with pytest.raises(ValueError, match="max_context: must be a multiple of 32, got 100"):
        KVCache(SHAPE, 1, 100, torch.device("cpu"))


def test_the_following_rows_are_laid_out_like_any_others(target: ExactModel) -> None:
    cache = target.new_cache(5)
    at = PackedRows.of(cache, np.arange(1, 4), np.array([30, 7, 61]))
    for step in range(1, 6):
        at = at.following(cache)
        wanted = PackedRows.of(cache, np.arange(1, 4), np.array([30, 7, 61]) + step)
        for field in fields(PackedRows):
            got, expected = getattr(at, field.name), getattr(wanted, field.name)
            assert torch.equal(got, expected) if isinstance(got, torch.Tensor) else got == expected
    with pytest.raises(ValueError, match="3 rows of 2 requests"):
        PackedRows.of(cache, np.array([0, 0, 1]), np.array([4, 5, 9])).following(cache)
