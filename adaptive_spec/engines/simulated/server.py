"""The simulated server: one policy, one scenario, one seed, in virtual time."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from adaptive_spec.domain.allowed import runnable_table
from adaptive_spec.domain.arrays import Floats
from adaptive_spec.domain.step_record import StepFlag, StepRecord
from adaptive_spec.engines.simulated.decider import Decider
from adaptive_spec.engines.simulated.load_path import LoadPath, SlowSpells
from adaptive_spec.engines.simulated.plans import Costs, best_ragged, expected_tokens
from adaptive_spec.engines.simulated.requests import Requests
from adaptive_spec.engines.simulated.results import Phase, Run
from adaptive_spec.engines.simulated.scenario import Scenario

NOISE_AHEAD = 4096
PATH, DRAFTS, NOISE, SPELLS = 11, 12, 13, 14
"""Names of random streams."""
NO_SCORES = np.zeros((0, 0), dtype=np.float32)


class SimulatedServer:
    """Decode steps in virtual time. Load path, arrivals, drafts, acceptance and noise have separate random streams.

    time_s: simulated seconds. q: true conditional acceptance [b, max_k] of the coming step (request granularity).
    costs, requests: the true state, for the oracle. k_switches: changes of K. limited_steps: steps whose K was not the one asked
    for, because it is not allowed at their batch size.
    """

    def __init__(self, scenario: Scenario, seed: int) -> None:
        path, drafts, noise = (np.random.default_rng([seed, stream]) for stream in (PATH, DRAFTS, NOISE))
        self.scenario, self.ragged = scenario, scenario.ragged
        self.costs = Costs(scenario)
        self.requests = Requests(scenario.file, scenario.max_batch, seed)
        self.q: Floats = np.zeros((0, scenario.max_k))
        self.time_s = 0.0
        self.steps = 0
        self._path = LoadPath(scenario.file.timeline, scenario.file.duration_s, path)
        self._spells = SlowSpells(scenario.file.latency.noise, np.random.default_rng([seed, SPELLS]))
        self._drafts, self._noise_rng = drafts, noise
        self._noise: list[float] = []
        self._entry = self._event = 0
        self._allowed_mask = scenario.allowed_mask()
        self._runnable = runnable_table(self._allowed_mask)
        self.last_k: int | None = None
        """K of the step before, None before the first."""
        self.k_switches = self.limited_steps = 0
        self._switch_s, self._limited = 0.0, False
        self._next_s = 0.0
        self.phases: list[Phase] = []

    def run(self, decider: Decider, until_s: float | None = None, each: Callable[[float], None] | None = None) -> Run:
        """Serve until `until_s` (default: the scenario's duration). each: called every 1024 steps with the simulated time."""
        end_s = self.scenario.file.duration_s if until_s is None else until_s
        step = self._ragged_step if self.ragged else self._batch_step
        while self.time_s < end_s:
            if self.time_s >= self._next_s:
                self._pass_events()
            running = self._path.at(self.time_s)
            if running != self.requests.count:
                self.requests.resize(running)
            phase = self.phases[-1]
            self.steps += 1
            phase.steps += 1
            begun_s = self.time_s
            phase.tokens += step(decider, phase)
            phase.seconds += self.time_s - begun_s
            if each is not None and self.steps % 1024 == 0:
                each(self.time_s)
        # An event during the last step begins a phase without steps: every policy has the same phases.
        for at_s in self.scenario.phase_starts:
            if self.time_s >= at_s < end_s:
                self._begin_phase(at_s)
        tokens = sum(phase.tokens for phase in self.phases)
        return Run(
            tokens, self.time_s, self.steps, decider.swaps, tuple(self.phases), decider.probe_share, decider.failures,
            self.k_switches, self.limited_steps,
        )  # fmt: skip

    def _batch_step(self, decider: Decider, phase: Phase) -> int:
        """One K for all."""
        requests, b = self.requests, self.requests.count
        kv = requests.context_tokens
        decider.expect(requests.ids[:b])
        k = self._run(decider.draft_length(b, kv), b)
        step_ms = self.costs.batch_step_ms(b, kv)
        expected = expected_tokens(requests.survival[:b])
        phase.expect(float(expected[k]), float(step_ms[k]) * 1e-3 + self._switch_s)
        if phase.good_after is None:
            goodput = expected / step_ms
            phase.compare(float(goodput[k]), float(goodput[self._allowed_mask[b]].max()))
        accepted = (requests.luck()[:, None] < requests.survival[:b, :k]).sum(axis=1)
        confidences = NO_SCORES
        if decider.reads_scores:
            confidences = requests.confidences(requests.draw_after(k, accepted, self._drafts))
        tokens = int(accepted.sum()) + b
        noise = self._next_noise() * self._spells.factor(self.time_s)
        scale = self.costs.scale * noise * 1e-3
        step_s = float(step_ms[k]) * noise * 1e-3 + self._switch_s
        self.time_s += step_s
        if decider.reads_records:
            verify_len = np.full(b, k, dtype=np.uint8)
            padded = int(self.costs.padded[b]) * (k + 1)
            verify_s = (float(self.costs.verify_ms[b, k]) + self.costs.context_ms_per_token * kv) * scale
            decider.observe(self._record(decider, kv, b * (k + 1), padded, k, verify_s, scale, step_s, confidences, verify_len,
                                         accepted))  # fmt: skip
        requests.generate(accepted + 1)
        return tokens

    def _ragged_step(self, decider: Decider, phase: Phase) -> int:
        """verify_len may differ."""
        requests, b = self.requests, self.requests.count
        kv = requests.context_tokens
        compared = phase.good_after is None
        drawn = decider.reads_scores or compared
        if drawn:
            self.q = requests.draw(self._drafts)
        k = self._run(decider.draft_length(b, kv), b)
        confidences, verify_len = NO_SCORES, None
        if decider.reads_scores:
            confidences = requests.confidences(self.q[:, :k])
            verify_len = decider.verify_lengths(confidences) if k else None
        survival = np.cumprod(self.q[:, :k], axis=1) if drawn else requests.survival[:b, :k]
        accepted = (requests.luck()[:, None] < survival).sum(axis=1)
        num_tokens = b * (k + 1)
        if verify_len is not None:
            np.minimum(accepted, verify_len, out=accepted)
            num_tokens = b + int(verify_len.sum())
        step_ms = self.costs.ragged_step_ms(k, num_tokens, kv)
        if verify_len is not None:
            survival = survival[np.arange(k) < verify_len[:, None]]
        expected = b + float(survival.sum())
        phase.expect(expected, step_ms * 1e-3 + self._switch_s)
        if compared:
            phase.compare(expected / step_ms, best_ragged(self.q, self.costs, kv, self.scenario.allowed_k(b))[2])
        tokens = int(accepted.sum()) + b
        noise = self._next_noise() * self._spells.factor(self.time_s)
        scale = self.costs.scale * noise * 1e-3
        step_s = step_ms * noise * 1e-3 + self._switch_s
        self.time_s += step_s
        if decider.reads_records:
            if verify_len is None:
                verify_len = np.full(b, k, dtype=np.uint8)
            padded = int(self.costs.padded[num_tokens])
            verify_s = (float(self.costs.verify_ms[num_tokens]) + self.costs.context_ms_per_token * kv) * scale
            decider.observe(self._record(decider, kv, num_tokens, padded, k, verify_s, scale, step_s, confidences, verify_len,
                                         accepted))  # fmt: skip
        requests.generate(accepted + 1)
        return tokens

    def _record(
        self, decider: Decider, kv: int, num_tokens: int, padded: int, k: int, verify_s: float, scale: float, step_s: float,
        confidences: NDArray[np.float32], verify_len: NDArray[np.uint8], accepted: NDArray[np.int64],
    ) -> StepRecord:  # fmt: skip
        """The record an engine would write: draft, verify with its context share, and the overhead as the rest of the step."""
        b = len(verify_len)
        flags = decider.flags
        if self._limited:
            flags = flags & ~int(StepFlag.TRIAL) | int(StepFlag.LIMITED)
        return StepRecord(
            self.steps, int(self.time_s * 1e9), kv, decider.version, num_tokens, padded, b, k, flags,
            float(self.costs.draft_ms[k]) * scale, verify_s, 0.0, step_s, confidences, verify_len, accepted.astype(np.uint8),
            self.requests.ids[:b].copy(),
        )  # fmt: skip

    def _run(self, asked: int, batch_size: int) -> int:
        """K that runs where `asked` is wanted; note what a change of K costs and whether it is not as asked."""
        k = int(self._runnable[batch_size, asked])
        self._limited = k != asked
        self.limited_steps += self._limited
        switched = self.last_k not in (None, k)
        self.k_switches += switched
        self._switch_s = self.scenario.file.latency.k_switch_ms * self.costs.scale * 1e-3 if switched else 0.0
        self.last_k = k
        return k

    def _next_noise(self) -> float:
        if not self._noise:
            noise = self.scenario.file.latency.noise
            factors = np.exp(noise.sigma * self._noise_rng.standard_normal(NOISE_AHEAD) - 0.5 * noise.sigma**2)
            spikes = self._noise_rng.random(NOISE_AHEAD) < noise.spike_rate
            factors[spikes] *= noise.spike_factor
            self._noise = factors.tolist()
        return self._noise.pop()

    def _pass_events(self) -> None:
        """Apply all due timeline entries and drift events; each begins a phase."""
        timeline, scenario = self.scenario.file.timeline, self.scenario
        while self._entry < len(timeline) and timeline[self._entry].at_s <= self.time_s:
            self._begin_phase(timeline[self._entry].at_s)
            self.requests.mix(timeline[self._entry].mix)
            self._entry += 1
        while self._event < len(scenario.drift) and scenario.drift[self._event].at_s <= self.time_s:
            event, curve = scenario.drift[self._event], scenario.curves[self._event]
            self._begin_phase(event.at_s)
            if event.latency_scale is not None:
                self.costs.scale = event.latency_scale
            if curve is not None:
                self.costs.use(curve)
            if event.class_name is not None:
                self.requests.change(event)
            self._event += 1
        self._next_s = min(
            timeline[self._entry].at_s if self._entry < len(timeline) else math.inf,
            scenario.drift[self._event].at_s if self._event < len(scenario.drift) else math.inf,
        )

    def _begin_phase(self, at_s: float) -> None:
        if not any(phase.at_s == at_s for phase in self.phases):
            self.phases.append(Phase(at_s))
            self.phases.sort(key=lambda phase: phase.at_s)
