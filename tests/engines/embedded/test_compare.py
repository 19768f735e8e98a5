from typing import Any

import numpy as np
import pytest

from adaptive_spec.domain.arrays import Ints
from adaptive_spec.engines.embedded.compare import Arm, Comparison, fixed_arms, run_block
from adaptive_spec.engines.embedded.decoder import Decoder, StepOutcome
from adaptive_spec.engines.embedded.load import PromptSource
from adaptive_spec.engines.embedded.models import Models
from adaptive_spec.engines.embedded.quantised import ExactModel, FloatModel
from adaptive_spec.engines.embedded.requests import PrefixCache
from adaptive_spec.engines.embedded.step_tap import FixedK
from tests.engines.embedded.scripted_tap import RandomTap

PROMPTS = {"code": [bytes(np.random.default_rng(i).integers(1, 256, size=20).astype(np.uint8)) for i in range(7)]}


class Holding(FixedK):
    held_batch_size = 6


def source() -> PromptSource:
    return PromptSource(PROMPTS, 3, max_new_tokens=12)


def go_on(_decoder: Decoder, _outcome: StepOutcome) -> bool:
    return True


@pytest.fixture
def arms(target: ExactModel, draft: FloatModel) -> list[Arm]:
    models = Models(target, draft, "test")
    random = Arm("adaptive", Decoder(target, draft, RandomTap(1), prefixes=PrefixCache()))
    return [random, *fixed_arms(models, PrefixCache(), range(8))]


def test_every_arm_outputs_the_same_tokens(arms: list[Arm]) -> None:
    comparison = Comparison(arms, source())
    for concurrency in (1, 5, 2):
        assert comparison.run_block("code", concurrency, go_on)
    assert comparison.blocks == 3
    assert comparison.lossless
    assert len({arm.output_tokens for arm in arms}) == 1
    assert comparison.goodput() == {arm.name: arm.output_tokens / arm.decode_s for arm in arms}
    assert list(comparison.goodput()) == ["adaptive", *(f"static-{k}" for k in range(8))]
    assert all(arm.decoder.idle and not arm.decoder.finished for arm in arms)


def test_the_order_of_the_arms_rotates(arms: list[Arm]) -> None:
    comparison = Comparison(arms[1:4], source())
    first: list[Decoder] = []
    for _ in range(4):
        seen: list[Decoder] = []

        def note(decoder: Decoder, _outcome: StepOutcome, seen: list[Decoder] = seen) -> bool:
            seen.append(decoder)
            return True

        comparison.run_block("code", 2, note)
        first.append(seen[0])
    assert first == [arms[1].decoder, arms[2].decoder, arms[3].decoder, arms[1].decoder]


def test_a_stopped_block_counts_for_no_arm(arms: list[Arm]) -> None:
    steps = iter(range(40))
    comparison = Comparison(arms, source())
    assert not comparison.run_block("code", 2, lambda _decoder, _outcome: next(steps) < 30)
    assert comparison.blocks == 0
    assert all(arm.output_tokens == 0 for arm in arms)


def test_a_differing_output_is_seen(target: ExactModel, draft: FloatModel, arms: list[Arm]) -> None:
    class Wrong(Decoder):
        def _verify(self, *arguments: Any) -> tuple[Ints, Ints]:
            accept_len, bonus = super()._verify(*arguments)
            return accept_len, np.where(bonus == 5, 6, 5)

    comparison = Comparison([arms[1], Arm("wrong", Wrong(target, draft, RandomTap(1)))], source())
    comparison.run_block("code", 2, go_on)
    assert not comparison.lossless


def test_a_block_holds_the_concurrency(arms: list[Arm]) -> None:
    sizes: list[int] = []

    def note(_decoder: Decoder, outcome: StepOutcome) -> bool:
        sizes.append(outcome.batch_size)
        return True

    result = run_block(arms[3].decoder, source(), "code", PROMPTS["code"], 4, note)
    assert result is not None
    assert max(sizes) == 4
    # Not even a trial of the policy gets more: that would be an easier block than the others'.
    arms[0].decoder.tap = Holding(7)
    sizes.clear()
    run_block(arms[0].decoder, source(), "code", PROMPTS["code"], 4, note)
    assert max(sizes) == 4
    assert result.output_tokens == sum(map(len, result.outputs)) > 0
    assert result.decode_s > 0
