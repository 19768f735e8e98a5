"""Adaptive K against every fixed K, in one run: the same prompts, in alternating blocks, on the same loaded weights.

A block is a list of prompts and a concurrency. Every arm decodes it to the end, one arm after the other. The first arm changes
with each block, so that background load affects all arms alike. Greedy decoding is lossless, so every arm outputs the same
tokens: goodput = output tokens / decode seconds differs by time alone. A differing output is a defect and sets
`lossless` to False. Decode time excludes prefills for all arms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from adaptive_spec.engines.embedded.decoder import Decoder, StepOutcome
from adaptive_spec.engines.embedded.load import PromptSource
from adaptive_spec.engines.embedded.models import MAX_BATCH, Models
from adaptive_spec.engines.embedded.requests import PrefixCache, Request
from adaptive_spec.engines.embedded.step_tap import FixedK

ADAPTIVE = "adaptive"


@dataclass
class Arm:
    """One way of choosing K, with its own decoder. Totals are over completed blocks."""

    name: str
    decoder: Decoder
    output_tokens: int = 0
    decode_s: float = 0.0

    @property
    def goodput_tokens_per_s(self) -> float:
        return self.output_tokens / self.decode_s if self.decode_s > 0.0 else 0.0


@dataclass(frozen=True)
class BlockResult:
    """One block of one arm: output tokens, decode seconds, and the requests in the order of the prompts."""

    output_tokens: int
    decode_s: float
    requests: list[Request]

    @property
    def outputs(self) -> list[bytes]:
        return [bytes(request.output) for request in self.requests]


def fixed_arms(models: Models, prefixes: PrefixCache, fixed_k: Sequence[int], max_batch: int = MAX_BATCH) -> list[Arm]:
    """Arms `static-K` for each K, each with its own decoder; weights and prefix cache are shared."""
    return [
        Arm(f"static-{k}", Decoder(models.target, models.draft, FixedK(k), max_batch, max(fixed_k), prefixes)) for k in fixed_k
    ]


def run_block(
    decoder: Decoder, source: PromptSource, kind: str, prompts: Sequence[bytes], concurrency: int,
    on_step: Callable[[Decoder, StepOutcome], bool],
) -> BlockResult | None:  # fmt: skip
    """Decode the prompts to their ends; None when on_step returned False (stop now). The decoder must be idle before."""
    requests = [source.request(kind, prompt) for prompt in prompts]
    for request in requests:
        decoder.submit(request)
    tokens, seconds = decoder.output_tokens, decoder.decode_s
    while not decoder.idle:
        outcome = decoder.step(concurrency, most=concurrency)  # a larger held batch would make the block easier
        if outcome is not None and not on_step(decoder, outcome):
            return None
    decoder.finished.clear()
    return BlockResult(decoder.output_tokens - tokens, decoder.decode_s - seconds, requests)


class Comparison:
    """Blocks run so far. lossless: False once the outputs of two arms differed. last_requests: of one arm, last block."""

    def __init__(self, arms: Sequence[Arm], source: PromptSource, requests_per_slot: int = 2, least_requests: int = 8) -> None:
        self.arms = list(arms)
        self.blocks = 0
        self.lossless = True
        self.last_requests: list[Request] = []
        self._source = source
        self._requests_per_slot, self._least = requests_per_slot, least_requests

    def run_block(self, kind: str, concurrency: int, on_step: Callable[[Decoder, StepOutcome], bool]) -> bool:
        """Run one block on every arm; False when it was stopped, and then it is not counted for any arm."""
        count = max(self._least, concurrency * self._requests_per_slot)
        prompts = [self._source.prompt(kind) for _ in range(count)]
        first = self.blocks % len(self.arms)
        results: list[tuple[Arm, BlockResult]] = []
        for arm in self.arms[first:] + self.arms[:first]:
            result = run_block(arm.decoder, self._source, kind, prompts, concurrency, on_step)
            if result is None:
                return False
            results.append((arm, result))
        for arm, result in results:
            arm.output_tokens += result.output_tokens
            arm.decode_s += result.decode_s
            self.lossless &= result.outputs == results[0][1].outputs
        self.last_requests = results[-1][1].requests
        self.blocks += 1
        return True

    def goodput(self) -> dict[str, float]:
        """Output tokens per decode second of every arm."""
        return {arm.name: arm.goodput_tokens_per_s for arm in self.arms}
