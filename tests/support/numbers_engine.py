"""A synthetic engine: decode steps with a known staircase and known acceptance, written through the real tap."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np

from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.domain.policy import Granularity
from adaptive_spec.engine_side.tap import EngineTap

TILE = 6


def engine_info(model: str = "numbers", max_batch: int = 8, pid: int | None = None) -> EngineInfo:
    return EngineInfo(
        "test", model, "cpu", 1, 2, (0, 1, 2, 3, 4), max_batch, Granularity.REQUEST, True, os.getpid() if pid is None else pid
    )


def verify_s(tokens: int) -> float:
    """Jumps by half a millisecond behind every sixth token."""
    return 1e-3 + 0.5e-3 * ((tokens - 1) // TILE)


class NumbersEngine:
    """Runs steps as fast as they are asked for; its times are numbers, nothing waits for them."""

    def __init__(
        self, runtime_dir: Path, info: EngineInfo | None = None, seed: int = 0, max_age_s: float = 30.0, slots: int = 1024,
        tap: type[EngineTap] = EngineTap,
    ) -> None:  # fmt: skip
        self.info = info or engine_info()
        self.tap = tap.open(runtime_dir, self.info, max_age_s, slots)
        self.rng = np.random.default_rng(seed)
        self.steps = self.output_tokens = self.verified_tokens = self.accepted_tokens = 0

    def step(self, batch_size: int = 2) -> int:
        """Do one step; returns its K."""
        b = self.tap.held_batch_size or batch_size
        k = self.tap.begin_step(b, 100 * b, time.monotonic_ns())
        quality = self.rng.beta(6, 2, (b, k))
        confidences = np.clip(quality, 1e-3, 1.0).astype(np.float32)
        verify_len = self.tap.verify_lengths(confidences)
        hit = (self.rng.random((b, k)) < quality) & (np.arange(k) < verify_len[:, None])
        accept_len = np.cumprod(hit, axis=1).sum(axis=1).astype(np.uint8)
        tokens = int(verify_len.sum()) + b
        draft_s, verify = 0.2e-3 * k, verify_s(tokens) * float(self.rng.lognormal(0.0, 0.01))
        self.tap.end_step(
            time.monotonic_ns(), tokens, tokens, draft_s, verify, 0.0, draft_s + verify + 0.1e-3,
            confidences, verify_len, accept_len, np.arange(b, dtype=np.uint32),
        )  # fmt: skip
        self.steps += 1
        self.output_tokens += int(accept_len.sum()) + b
        self.verified_tokens += int(verify_len.sum())
        self.accepted_tokens += int(accept_len.sum())
        return k

    def run(self, seconds: float, batch_size: int = 2, pause_s: float = 0.001) -> None:
        """Step for a while."""
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            self.step(batch_size)
            time.sleep(pause_s)

    def close(self) -> None:
        self.tap.close()
