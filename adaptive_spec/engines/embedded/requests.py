"""A request to the embedded engine, and the KV of prompts already seen."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Request:
    """One request. max_new_tokens: at least 1. temperature: 0 is greedy. output grows as it is decoded."""

    request_id: int
    prompt: bytes
    max_new_tokens: int
    temperature: float = 0.0
    kind: str = ""
    output: bytearray = field(default_factory=bytearray)
    ended: bool = False
    """True after the end-of-text token, or max_new_tokens."""


class PrefixCache:
    """KV of whole prompts, for prompts that are repeated. Evicts the least recently used. max_bytes: size limit."""

    def __init__(self, max_bytes: int = 96 << 20) -> None:
        self.max_bytes = max_bytes
        self._bytes = 0
        self._entries: OrderedDict[tuple[str, bytes], Tensor] = OrderedDict()

    def get(self, model: str, prompt: bytes) -> Tensor | None:
        key = (model, prompt)
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def put(self, model: str, prompt: bytes, saved: Tensor) -> None:
        old = self._entries.pop((model, prompt), None)
        self._bytes -= old.nbytes if old is not None else 0
        self._entries[model, prompt] = saved
        self._bytes += saved.nbytes
        while self._bytes > self.max_bytes:
            self._bytes -= self._entries.popitem(last=False)[1].nbytes
