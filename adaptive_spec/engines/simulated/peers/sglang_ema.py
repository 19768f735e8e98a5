"""SGLang 0.5.23's own adaptive policy: the class itself where sglang is installed, otherwise a stand-in of its rule.

The rule (sglang/srt/speculative/adaptive_spec_params.py, version 0.5.23, read and described here, not copied). Batch sizes
are routed to slots, the one with the largest key not above the batch size after padding to a graph. A slot has candidate K
and an exponential mean of accept_len (weight 0.2 for the newest step), begun at K - 1. Every 5 steps after the first 10:

    K = 0                                   -> the next larger candidate, to measure whether drafting pays again
    mean <= next smaller K - 0.5 + down     -> that one (0.5 + down if it is 0), again and again
    else mean > K - 0.5 + up                -> the next larger one, again and again

It does not know cost: with high acceptance K rises even where the longer step costs more than it gains.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from adaptive_spec.domain.step_record import StepRecord
from adaptive_spec.engines.simulated.decider import PlainDecider
from adaptive_spec.engines.simulated.scenario import LAUNCH_K, Scenario

DEFAULT_CONFIG: dict[str, dict[str, Any]] = {
    "1": {"candidate_steps": [1, 3, 5, 7], "up_hysteresis": 0.0, "down_hysteresis": -0.25},
    "8": {"candidate_steps": [0, 1, 3], "up_hysteresis": 0.0, "down_hysteresis": 0.0},
    "32": {"candidate_steps": [0, 1], "up_hysteresis": 0.0, "down_hysteresis": 0.0},
    "64": {"candidate_steps": [0], "up_hysteresis": 0.0, "down_hysteresis": 0.0},
}
"""Candidates and hysteresis by batch size as SGLang 0.5.23 ships them."""


class AdaptiveParams(Protocol):
    """The methods used of SGLang's class; the stand-in has them too."""

    def set_cuda_graph_bs(self, cuda_graph_bs: list[int] | None) -> None: ...

    def get_steps_for_batch(self, batch_size: int) -> int: ...

    def on_verify_complete(self, num_correct_drafts_per_req: list[int], batch_size: int) -> int | None: ...


class Slot:
    """K for the batch sizes of one key."""

    WEIGHT = 0.2
    WARMUP_STEPS = 10
    INTERVAL_STEPS = 5

    def __init__(self, launch_k: int, candidates: Sequence[int], up: float, down: float) -> None:
        self.candidates = sorted(set(candidates))
        self._up, self._down = up, down
        self.k = launch_k if launch_k in self.candidates else self.candidates[len(self.candidates) // 2]
        self.mean = float(self.k - 1)
        self._steps = 0

    def learn(self, accepted: Sequence[int]) -> bool:
        """Count one step's accept_len per request; True when K changed."""
        if self.k > 0:
            self.mean += self.WEIGHT * (sum(accepted) / len(accepted) - self.mean)
        self._steps += 1
        since = self._steps - self.WARMUP_STEPS
        if since <= 0 or since % self.INTERVAL_STEPS:
            return False
        before, self.k = self.k, self._choice()
        return self.k != before

    def _choice(self) -> int:
        candidates, at = self.candidates, self.candidates.index(self.k)
        if self.k == 0:
            wanted = candidates[min(at + 1, len(candidates) - 1)]
            if wanted > 0 and self.mean < 0.0:
                self.mean = float(wanted - 1)
            return wanted
        lowest = at
        while lowest > 0 and self.mean <= max(candidates[lowest - 1] - 0.5, 0.5 if candidates[lowest - 1] == 0 else -1.0) + (
            self._down
        ):
            lowest -= 1
        if lowest < at:
            return candidates[lowest]
        while at < len(candidates) - 1 and self.mean > candidates[at] - 0.5 + self._up:
            at += 1
        return candidates[at]


class StandIn:
    """The rule above, with the methods of SGLang's class."""

    def __init__(self, launch_k: int, config: dict[str, dict[str, Any]]) -> None:
        self._keys = sorted(int(key) for key in config)
        self._slots = {
            int(key): Slot(launch_k, entry["candidate_steps"], entry["up_hysteresis"], entry["down_hysteresis"])
            for key, entry in config.items()
        }
        self._graphs: list[int] = []

    def set_cuda_graph_bs(self, cuda_graph_bs: list[int] | None) -> None:
        self._graphs = sorted(cuda_graph_bs or [])

    def get_steps_for_batch(self, batch_size: int) -> int:
        return self._slot(batch_size).k

    def on_verify_complete(self, num_correct_drafts_per_req: list[int], batch_size: int) -> int | None:
        slot = self._slot(batch_size)
        return slot.k if num_correct_drafts_per_req and slot.learn(num_correct_drafts_per_req) else None

    def _slot(self, batch_size: int) -> Slot:
        at = bisect_left(self._graphs, batch_size)
        padded = self._graphs[at] if at < len(self._graphs) else batch_size
        return self._slots[self._keys[max(bisect_right(self._keys, padded) - 1, 0)]]


def configuration(max_k: int, wide: bool) -> dict[str, dict[str, Any]]:
    """SGLang's default candidates up to max_k, or, wide, every K at every batch size."""
    every = list(range(max_k + 1))
    return {
        key: {**entry, "candidate_steps": every if wide else [k for k in entry["candidate_steps"] if k <= max_k]}
        for key, entry in DEFAULT_CONFIG.items()
    }


class SglangEma(PlainDecider):
    """The policy in the simulated server. origin: "sglang VERSION" or "stand-in: why"."""

    reads_records = True

    def __init__(self, scenario: Scenario, wide: bool) -> None:
        super().__init__()
        self._params, self.origin = build_params(scenario.max_k, wide)
        self._params.set_cuda_graph_bs(scenario.file.latency.graph_batch_sizes)

    def draft_length(self, batch_size: int, kv_tokens: int) -> int:
        return self._params.get_steps_for_batch(batch_size)

    def observe(self, record: StepRecord) -> None:
        if self._params.on_verify_complete(record.accept_len.tolist(), record.batch_size) is not None:
            self.swaps += 1


def build_params(max_k: int, wide: bool) -> tuple[AdaptiveParams, str]:
    """SGLang's class where it can be imported, else the stand-in; and which of the two it is."""
    config, launch_k = configuration(max_k, wide), min(LAUNCH_K, max_k)
    if importlib.util.find_spec("sglang") is None:
        return StandIn(launch_k, config), "stand-in of SGLang 0.5.23's rule: sglang is not installed"
    try:
        return _real(launch_k, config)
    except Exception as error:  # sglang without its GPU raises various exceptions
        return StandIn(launch_k, config), f"stand-in of SGLang 0.5.23's rule: sglang cannot be loaded ({type(error).__name__})"


def _real(launch_k: int, config: dict[str, dict[str, Any]]) -> tuple[AdaptiveParams, str]:
    from importlib.metadata import version

    from sglang.srt.speculative.adaptive_spec_params import AdaptiveSpeculativeParams

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config))
        return AdaptiveSpeculativeParams(launch_k, str(path)), f"sglang {version('sglang')}"
