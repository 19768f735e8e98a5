"""A decode loop with real times: the simulated server's requests and acceptance, the device's draft and verify forwards."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from adaptive_spec.engines.simulated.decider import Decider
from adaptive_spec.engines.simulated.results import Phase
from adaptive_spec.engines.simulated.scenario import Scenario
from adaptive_spec.engines.simulated.server import NO_SCORES, SimulatedServer
from benchmarks.gpu_report.timing import Timer


class TimedServer(SimulatedServer):
    """Acceptance is simulated from the scenario's recorded rates; every step time is measured on the device."""

    def __init__(self, scenario: Scenario, seed: int, verify: Timer, draft: Timer) -> None:
        super().__init__(scenario, seed)
        self._verify, self._draft = verify, draft

        self.tokens = 0

    def run_steps(self, decider: Decider, steps: int) -> None:
        """Run some decode steps; the whole run is one phase."""
        if not self.phases:
            self._pass_events()
        self.requests.resize(self._path.at(0.0))
        for _ in range(steps):
            self.steps += 1
            self.tokens += self._batch_step(decider, self.phases[-1])

    def _batch_step(self, decider: Decider, phase: Phase) -> int:
        requests, b = self.requests, self.requests.count
        kv = requests.context_tokens
        begun_s = time.perf_counter()
        decider.expect(requests.ids[:b])
        k = self._run(decider.draft_length(b, kv), b)
        decided_s = time.perf_counter() - begun_s
        draft_s = sum(self._draft.seconds(b) for _ in range(k))
        verify_s = self._verify.seconds(b * (k + 1))
        accepted = (requests.luck()[:, None] < requests.survival[:b, :k]).sum(axis=1)
        confidences = NO_SCORES
        if decider.reads_scores:
            confidences = requests.confidences(requests.draw_after(k, accepted, self._drafts))
        step_s = draft_s + verify_s + decided_s
        self.time_s += step_s
        phase.expect(float(accepted.sum()) + b, step_s)
        if decider.reads_records:
            verify_len = np.full(b, k, dtype=np.uint8)
            tokens = b * (k + 1)
            record = self._record(decider, kv, tokens, tokens, k, verify_s, 1.0, step_s, confidences, verify_len, accepted)
            record = replace(record, draft_s=draft_s)
            decider.observe(record)
        requests.generate(accepted + 1)
        return int(accepted.sum()) + b
