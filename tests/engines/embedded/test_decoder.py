import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from adaptive_spec.domain.step_record import StepFlag
from adaptive_spec.engines.embedded.decoder import END_OF_TEXT, Decoder
from adaptive_spec.engines.embedded.kv_cache import PackedRows
from adaptive_spec.engines.embedded.lossless import greedy_alone
from adaptive_spec.engines.embedded.quantised import ExactModel, FloatModel
from adaptive_spec.engines.embedded.requests import PrefixCache, Request
from adaptive_spec.engines.embedded.shape import ModelShape
from adaptive_spec.engines.embedded.step_tap import FixedK
from adaptive_spec.engines.embedded.weights import random_weights
from tests.engines.embedded.scripted_tap import RandomTap, RecordingTap
from tests.engines.embedded.test_acceptance_rules import chi_square


def requests(count: int = 20, seed: int = 1, most: int = 40) -> list[Request]:
    random = np.random.default_rng(seed)
    sizes = random.integers(1, most, size=(count, 2))
    prompts = [bytes(random.integers(1, 256, size=size).astype(np.uint8)) for size in sizes[:, 0]]
    return [Request(i, prompt, int(size)) for i, (prompt, size) in enumerate(zip(prompts, sizes[:, 1], strict=True), start=1)]


def serve(decoder: Decoder, work: Sequence[Request], concurrency: int) -> dict[int, bytes]:
    for request in work:
        decoder.submit(dataclasses.replace(request, output=bytearray()))
    while not decoder.idle:
        decoder.step(concurrency)
    return {request.request_id: bytes(request.output) for request in decoder.finished}


@pytest.fixture(scope="module")
def expected(target: ExactModel) -> dict[int, bytes]:
    """What the target alone outputs, one request and one token at a time, without the decoder."""
    return {r.request_id: greedy_alone(target, r.prompt, r.max_new_tokens)[0] for r in requests()}


@pytest.mark.parametrize("k", range(8))
def test_greedy_output_is_the_targets_own_for_every_k(
    target: ExactModel, draft: FloatModel, expected: dict[int, bytes], k: int
) -> None:
    tap = RecordingTap(k)
    decoder = Decoder(target, draft, tap)
    assert serve(decoder, requests(), 6) == expected
    accepted, verified = (sum(int(getattr(r, name).sum()) for r in tap.records) for name in ("accept_len", "verify_len"))
    assert (accepted, verified) == (0, 0) if k == 0 else 0 < accepted < verified  # both outcomes were exercised


@pytest.mark.parametrize("seed", range(4))
def test_no_plan_changes_the_output_or_loses_a_request(
    target: ExactModel, draft: FloatModel, expected: dict[int, bytes], seed: int
) -> None:
    """Random K, verify lengths, held batches, prompts met before."""
    prefixes = PrefixCache()
    for _ in range(2):
        tap = RandomTap(seed)
        decoder = Decoder(target, draft, tap, prefixes=prefixes)
        assert serve(decoder, requests(), 5) == expected
        assert {r.batch_size for r in tap.records} > {1, 5, 8}
        assert decoder.running == decoder.parked == 0


def test_records_tell_what_was_output(target: ExactModel, draft: FloatModel, expected: dict[int, bytes]) -> None:
    tap = RandomTap(9)
    decoder = Decoder(target, draft, tap)
    serve(decoder, requests(), 7)
    assert [r.invalid_reason() for r in tap.records] == [None] * decoder.steps
    assert sum(r.output_tokens for r in tap.records) == decoder.output_tokens == sum(map(len, expected.values()))
    assert all(r.num_tokens == int(r.verify_len.sum()) + r.batch_size == r.padded_tokens for r in tap.records)
    assert all(r.step_s >= r.draft_s + r.draft_extend_s + r.verify_s for r in tap.records)
    assert all((r.draft_s == r.draft_extend_s == 0.0) == (r.k == 0) for r in tap.records)
    assert sum(r.step_s for r in tap.records) == pytest.approx(decoder.decode_s)


def test_a_request_that_ends_inside_a_step_counts_what_it_output(target: ExactModel, draft: FloatModel) -> None:
    prompt = b"abc"
    text, _ = greedy_alone(target, prompt, 40)
    end = text[12]
    # The same target, with the byte it outputs 13th renamed to the end of text.
    swapped = torch.arange(256)
    swapped[end], swapped[END_OF_TEXT] = END_OF_TEXT, end
    weights = random_weights(target.shape, seed=1)
    for name in ("embedding", "head.weight", "head.scale"):
        weights[name] = weights[name][swapped]
    renamed, drafting = ExactModel(target.shape, weights), FloatModel(target.shape, weights)
    first = text.index(end)
    tap = RecordingTap(7)
    decoder = Decoder(renamed, drafting, tap)
    output = serve(decoder, [Request(1, bytes(swapped.tolist()[b] for b in prompt), 40)], 1)[1]
    assert len(output) == first + 1
    assert output[-1] == END_OF_TEXT
    assert decoder.finished[0].ended
    assert sum(r.output_tokens for r in tap.records) == len(output)
    cut = [r for r in tap.records if r.flags & StepFlag.CENSORED]
    assert cut == tap.records[-1:]  # this draft is the target itself: all eight tokens were accepted, the last step was cut


def test_the_end_by_length_censors_nothing(target: ExactModel, draft: FloatModel) -> None:
    tap = RecordingTap(7)
    output = serve(Decoder(target, draft, tap), [Request(1, b"hello", 13)], 1)[1]
    assert len(output) == 13
    assert END_OF_TEXT not in output
    assert not any(r.flags & StepFlag.CENSORED for r in tap.records)


def test_the_draft_does_nothing_at_k_zero_and_catches_up_later(target: ExactModel, draft: FloatModel) -> None:
    class Late(RecordingTap):
        def begin_step(self, batch_size: int, kv_tokens: int, now_ns: int) -> int:
            self.k = 4 if len(self.records) >= 15 else 0
            return super().begin_step(batch_size, kv_tokens, now_ns)

    work = requests(4, seed=2, most=200)
    for request in work:
        request.max_new_tokens = 60
    late = Late(0)
    outputs = serve(Decoder(target, draft, late), work, 4)
    caught_up = late.records[15]
    assert (caught_up.batch_size, caught_up.k) == (4, 4)
    assert [i for i, r in enumerate(late.records) if r.flags & StepFlag.DISTURBED] == [15]
    # It proposes what it proposes for a prompt that ends at the same place.
    for request, confidences in zip(work, caught_up.confidences, strict=True):
        fresh = RecordingTap(4)
        serve(Decoder(target, draft, fresh), [Request(1, request.prompt + outputs[request.request_id][:15], 9)], 1)
        np.testing.assert_allclose(confidences, fresh.records[0].confidences[0], rtol=1e-4)


def test_the_batch_is_held_and_parked_requests_come_back(
    target: ExactModel, draft: FloatModel, expected: dict[int, bytes]
) -> None:
    class Holding(RecordingTap):
        @property
        def held_batch_size(self) -> int:  # type: ignore[override]  # a property in place of the attribute
            return (0, 2, 9, 1)[len(self.records) // 4 % 4]

    tap = Holding(2)
    decoder = Decoder(target, draft, tap, max_batch=10)
    assert serve(decoder, requests(), 6) == expected
    held = [(0, 2, 9, 1)[i // 4 % 4] for i in range(len(tap.records))]
    assert [r.batch_size for r in tap.records[:16]] == [6 if h == 0 else h for h in held[:12]] + [1] * 4
    assert all(r.batch_size <= h for r, h in zip(tap.records, held, strict=True) if h)


def test_sampled_output_has_the_targets_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first three tokens of a tiny model, against its exact distribution by enumeration, whatever the tap asks for."""
    shape = ModelShape(width=32, layers=1, heads=2, kv_heads=1, hidden=32)
    weights, other = random_weights(shape, seed=3), random_weights(shape, seed=4)
    for tensors in (weights, other):
        tensors["head.scale"] = tensors["head.scale"] * 0.5  # flatter distributions, more outcomes
    target, draft = ExactModel(shape, weights), FloatModel(shape, other)
    for model in (target, draft):
        leave_four_bytes(model, monkeypatch)
    exact = joint_distribution(target, b"\x02\x03", 3, temperature=0.7)
    counts = np.zeros_like(exact)
    decoder = Decoder(target, draft, RandomTap(5, max_k=3), max_batch=16, seed=6)
    draws = 1000
    work = [Request(i, b"\x02\x03", 3, temperature=0.7) for i in range(draws)]
    for output in serve(decoder, work, 16).values():
        # Byte 0 ends the text; what would have followed is summed out below.
        counts[tuple(output) + (0,) * (3 - len(output))] += 1
    for first in range(4):
        for second in range(4):
            if first == 0 or second == 0:
                exact[first, second] = [exact[first, second].sum(), 0, 0, 0]
        if first == 0:
            exact[0] = [[exact[0].sum(), 0, 0, 0], [0] * 4, [0] * 4, [0] * 4]
    likely = exact * draws >= 5
    assert counts[exact == 0].sum() == 0
    rest_seen, rest_expected = counts[~likely].sum(), exact[~likely].sum() * draws
    observed, wanted = np.append(counts[likely], rest_seen), np.append(exact[likely] * draws, rest_expected)
    freedom = len(wanted) - 1
    assert freedom > 10
    assert chi_square(observed[wanted > 0], wanted[wanted > 0]) < freedom + 4 * (2 * freedom) ** 0.5


def leave_four_bytes(model: ExactModel | FloatModel, patch: pytest.MonkeyPatch) -> None:
    """Make the logits of bytes 4..255 so low that they never occur: outcomes can be enumerated."""
    forward = model.forward

    def masked(*arguments: Any, **options: Any) -> torch.Tensor:
        logits = forward(*arguments, **options)
        return torch.cat((logits[:, :4], torch.full_like(logits[:, 4:], -1e9)), dim=1)

    patch.setattr(model, "forward", masked)


def joint_distribution(target: ExactModel, prompt: bytes, length: int, temperature: float) -> NDArray[np.float64]:
    joint = np.zeros((4,) * length)
    for outcome in np.ndindex(*joint.shape):
        cache = target.new_cache(1)
        tokens = np.array([*prompt, *outcome[:-1]])
        at = PackedRows.of(cache, np.zeros_like(tokens), np.arange(len(tokens)))
        p = (target.forward(cache, torch.from_numpy(tokens), at).double() / temperature).softmax(-1).numpy()
        joint[outcome] = np.prod([p[len(prompt) - 1 + i, token] for i, token in enumerate(outcome)])
    return joint


def test_a_sampled_request_among_greedy_ones_leaves_them_alone(
    target: ExactModel, draft: FloatModel, expected: dict[int, bytes]
) -> None:
    work = requests()
    for request in work[::3]:
        request.temperature = 0.8
    tap = RandomTap(12)
    outputs = serve(Decoder(target, draft, tap), work, 6)
    greedy = {r.request_id for r in work if r.temperature == 0.0}
    assert {i: outputs[i] for i in greedy} == {i: expected[i] for i in greedy}
    assert len(outputs) == len(work)
    assert [r.invalid_reason() for r in tap.records if r.invalid_reason()] == []


@pytest.mark.parametrize(("prompt", "tokens"), [(b"", 5), (b"x", 0), (b"x" * 300, 20)])
def test_a_request_that_does_not_fit_is_refused(target: ExactModel, draft: FloatModel, prompt: bytes, tokens: int) -> None:
    with pytest.raises(ValueError, match="request 7"):
        Decoder(target, draft, FixedK(1)).submit(Request(7, prompt, tokens))


def test_a_batch_the_models_have_no_room_for_is_refused(target: ExactModel, draft: FloatModel) -> None:
    with pytest.raises(ValueError, match="max_batch 100"):
        Decoder(target, draft, FixedK(1), max_batch=100)
