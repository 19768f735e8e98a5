"""Reproducible traffic: real prompts of one kind at a time, at a concurrency that changes; the order follows from a seed."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from adaptive_spec.engines.embedded.requests import Request
from adaptive_spec.engines.embedded.text import KINDS

CONCURRENCIES = (1, 16, 2, 12, 3)
LEAST_NEW_TOKENS, MOST_NEW_TOKENS = 24, 104
"""Output lengths vary, so that requests end at different times: a batch that ends all at once would favour K = 0."""


@dataclass(frozen=True)
class Phase:
    """Traffic of one kind at one concurrency (requests at once) until `ends_s` seconds after the start."""

    kind: str
    concurrency: int
    ends_s: float


def phases(duration_s: float | None, concurrencies: Sequence[int], phase_s: float = 4.0, kind_s: float = 60.0) -> Iterator[Phase]:
    """Phases of `phase_s` seconds that cycle through the concurrencies without end.

    The kind changes half-way through duration_s; every kind_s seconds when there is no duration.
    """
    switch_s = duration_s / 2.0 if duration_s is not None else kind_s
    for index, concurrency in enumerate(itertools.cycle(concurrencies)):
        kind_index = int(index * phase_s / switch_s)
        if duration_s is not None:
            kind_index = min(kind_index, 1)
        yield Phase(KINDS[kind_index % len(KINDS)], concurrency, (index + 1) * phase_s)


class PromptSource:
    """Endless requests: prompts of each kind in a shuffled order that begins again when all were used.

    max_new_tokens: of every request; by default a length of its own for each prompt, LEAST_NEW_TOKENS..MOST_NEW_TOKENS.
    """

    def __init__(self, prompts: Mapping[str, Sequence[bytes]], seed: int, max_new_tokens: int | None = None) -> None:
        self._random = np.random.default_rng(seed)
        self._prompts = {kind: list(texts) for kind, texts in prompts.items()}
        self._left: dict[str, list[bytes]] = {kind: [] for kind in prompts}
        self._next_id = 1
        self.max_new_tokens = max_new_tokens

    def prompt(self, kind: str) -> bytes:
        if not self._left[kind]:
            order = self._random.permutation(len(self._prompts[kind]))
            self._left[kind] = [self._prompts[kind][i] for i in order]
        return self._left[kind].pop()

    def request(self, kind: str, prompt: bytes | None = None) -> Request:
        """The next request of a kind, greedy, with a new id. prompt: used instead of the next one."""
        text = prompt or self.prompt(kind)
        request = Request(self._next_id, text, self.max_new_tokens or _length_of(text), kind=kind)
        self._next_id += 1
        return request


def _length_of(prompt: bytes) -> int:
    """Tokens to generate, the same for a prompt on every arm of a comparison and on every machine."""
    return LEAST_NEW_TOKENS + zlib.crc32(prompt) % (MOST_NEW_TOKENS - LEAST_NEW_TOKENS + 1)
