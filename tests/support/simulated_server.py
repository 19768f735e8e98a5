"""A small simulated decode loop in virtual time for tests of the controller: a known staircase and a known acceptance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from adaptive_spec.config.settings import ControllerSettings
from adaptive_spec.control.controller import Controller
from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.domain.policy import Granularity
from adaptive_spec.domain.step_record import UNKNOWN_CONFIDENCE, StepFlag, StepRecord
from adaptive_spec.engine_side.planner import Planner

Curve = Callable[[int], float]


def staircase(tile: int = 32, base_s: float = 0.010, step_s: float = 0.006, slope_s: float = 2e-6) -> Curve:
    return lambda tokens: base_s + step_s * ((tokens - 1) // tile) + slope_s * tokens


def engine_info(granularity: Granularity, max_batch: int = 64, holds_batch: bool = False, max_k: int = 7) -> EngineInfo:
    return EngineInfo("simulated", "toy", "none", 1, 3, tuple(range(max_k + 1)), max_batch, granularity, holds_batch, 1)


@dataclass
class SimulatedServer:
    """One engine with its planner, driven by a controller; time is virtual.

    observe_only: it runs none of the policies, its own K throughout. confidences_known: otherwise all are UNKNOWN_CONFIDENCE.
    """

    info: EngineInfo
    curve: Curve
    accept: float = 0.75
    slope: float = 1.0
    bias: float = 0.0
    batch_size: int = 8
    noise: float = 0.02
    spike_rate: float = 0.0
    latency_scale: float = 1.0
    draft_s: float = 0.0005
    context: int = 600
    seed: int = 0
    observe_only: bool = False
    confidences_known: bool = True
    settings: ControllerSettings = field(default_factory=ControllerSettings)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.controller = Controller(self.settings, self.info)
        self.planner = Planner(self.info.launch_k, self.info.max_k, self.info.allowed_mask())
        self.now_s = 0.0
        self.steps = 0
        self.records: list[StepRecord] = []
        self._publish(self.controller.tick(self.now_s))

    def _publish(self, policy: object) -> None:
        if policy is not None and not self.observe_only:
            self.planner.adopt(policy)  # type: ignore[arg-type]  # a Policy, as the controller returns it

    def run(self, steps: int) -> float:
        """Run some decode steps; returns goodput in tokens/s over them."""
        tokens, start_s = 0, self.now_s
        for _ in range(steps):
            record = self.step()
            tokens += record.output_tokens
            self.controller_sees(record)
        return tokens / (self.now_s - start_s)

    def controller_sees(self, record: StepRecord) -> None:
        self._publish(self.controller.observe(record, self.now_s))
        if self.controller.refit_due(self.now_s):
            self._publish(self.controller.refit(self.now_s))

    def step(self) -> StepRecord:
        b = self.batch_size
        if self.info.holds_batch and self.planner.held_batch_size:
            b = self.planner.held_batch_size
        kv = b * self.context
        k = self.planner.draft_length(b, kv)
        q = np.clip(self.rng.beta(self.accept * 4, (1 - self.accept) * 4, (b, k)), 1e-5, 1 - 1e-5)
        p = 1 / (1 + np.exp(-(np.log(q / (1 - q)) - self.bias) / self.slope))
        confidences = np.clip(p, 1e-6, 1.0).astype(np.float32)
        if not self.confidences_known:
            confidences[:] = UNKNOWN_CONFIDENCE
        verify_len = (
            self.planner.verify_lengths(confidences) if self.info.granularity is Granularity.REQUEST else np.full(b, k, np.uint8)
        )
        hit = (self.rng.random((b, k)) < q) & (np.arange(k) < verify_len[:, None])
        accept_len = np.cumprod(hit, axis=1).sum(1).astype(np.uint8)
        num_tokens = int(verify_len.sum()) + b
        factor = self.latency_scale * float(np.exp(self.rng.normal(0.0, self.noise)))
        if self.rng.random() < self.spike_rate:
            factor *= 5.0
        verify_s, draft_s = self.curve(num_tokens) * factor, self.draft_s * k * factor
        step_s = verify_s + draft_s + 0.0005
        self.now_s += step_s
        self.steps += 1
        flags = int(StepFlag.TRIAL) if self.planner.in_trial else int(StepFlag.LIMITED) if self.planner.limited else 0
        return StepRecord(
            self.steps, int(self.now_s * 1e9), kv, self.planner.version, num_tokens, num_tokens, b, k, flags, draft_s, verify_s,
            0.0,            step_s, confidences, verify_len, accept_len, np.arange(b, dtype=np.uint32),
        )  # fmt: skip

    def let_act(self) -> None:
        """From now on it runs policies, first the one on the page."""
        self.observe_only = False
        self._publish(self.controller.latest_policy)

    def static_goodput(self, k: int, batch_size: int | None = None) -> float:
        """Exact expected goodput of a fixed K without noise (batch granularity)."""
        b = batch_size or self.batch_size
        expected = b * sum(self.accept**j for j in range(k + 1))
        return expected / ((self.curve(b * (k + 1)) + self.draft_s * k) * self.latency_scale + 0.0005)

    def best_static(self, batch_size: int | None = None) -> int:
        return max(range(self.info.max_k + 1), key=lambda k: self.static_goodput(k, batch_size))
