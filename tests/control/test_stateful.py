"""The controller as a state machine: any order of records, refits, failures, commands and restarts."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from adaptive_spec.config.settings import ControllerSettings
from adaptive_spec.control.controller import Controller
from adaptive_spec.control.counters import MAX_EVENTS
from adaptive_spec.control.modes import effective_mode
from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.domain.policy import Granularity, Policy
from adaptive_spec.domain.step_record import StepRecord
from adaptive_spec.wire.policy_payload import check_policy

INFO = EngineInfo("t", "m", "g", 1, 1, (0, 1, 2, 4), 6, Granularity.BATCH, False, 1, ((1, (0, 1, 2, 4)), (4, (0, 1)))).checked()
SETTINGS = ControllerSettings()


class ControllerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.controller = Controller(SETTINGS, INFO)
        self.now_s, self.step, self.version = 0.0, 0, 0
        self.rng = np.random.default_rng(0)

    def take(self, policy: Policy | None) -> None:
        """What the engine gets: executable, newer than the one before, and only allowed K for every batch size."""
        if policy is None:
            return
        check_policy(policy)
        assert policy.version > self.version, "versions rise"
        self.version = policy.version
        assert len(policy.k_table) == INFO.max_batch + 1, "the table is total"
        assert all(int(k) in INFO.allowed_k(b) for b in range(1, INFO.max_batch + 1) for k in policy.k_table[b])
        assert policy.mode is self.controller.mode
        self.controller.published()

    @rule(batch_size=st.integers(1, 6), steps=st.integers(1, 20), slow=st.sampled_from([1.0, 1.0, 3.0]))
    def run(self, batch_size: int, steps: int, slow: float) -> None:
        for _ in range(steps):
            policy = self.controller.latest_policy
            b, self.step, self.now_s = batch_size, self.step + 1, self.now_s + 0.02
            k = int(policy.k_table[b, 0]) if policy is not None else INFO.launch_k
            verify_len = np.full(b, k, np.uint8)
            accept_len = self.rng.integers(0, k + 1, b).astype(np.uint8)
            verify_s = slow * (1e-3 + 1e-4 * b * (k + 1))
            record = StepRecord(
                self.step, self.step, 100 * b, self.version, b * (k + 1), b * (k + 1), b, k, 0, 1e-4 * k, verify_s, 0.0,
                verify_s + 2e-4 * k, self.rng.random((b, k)).astype(np.float32), verify_len, accept_len,
                np.arange(b, dtype=np.uint32),
            )  # fmt: skip
            assert record.invalid_reason() is None
            self.take(self.controller.observe(record, self.now_s))

    @rule(wait_s=st.sampled_from([0.0, 0.5, 60.0]))
    def refit(self, wait_s: float) -> None:
        self.now_s += wait_s
        self.take(self.controller.refit(self.now_s))

    @rule()
    def tick(self) -> None:
        self.take(self.controller.tick(self.now_s))

    @rule(name=st.sampled_from(["active", "shadow", "pause", "resume", "unpin", "refit", "resweep"]))
    def command(self, name: str) -> None:
        self.take(self.controller.command(name, self.now_s))

    @rule(k=st.sampled_from(INFO.candidates))
    def pin(self, k: int) -> None:
        self.take(self.controller.command("pin", self.now_s, k))

    @rule(times=st.integers(1, 12))
    def fail(self, times: int) -> None:
        for _ in range(times):
            self.take(self.controller.record_failed(self.now_s))
        self.take(self.controller.fail("a test", self.now_s))

    @rule(times=st.sampled_from([1, 12]))
    def fail_to_publish(self, times: int) -> None:
        for _ in range(times):
            self.take(self.controller.publication_failed(self.now_s))

    @rule()
    def restart(self) -> None:
        request, counted = self.controller.request, self.controller.counters.records
        again = Controller(SETTINGS, INFO)
        again.restore(self.controller.state())
        assert again.request == request
        assert again.counters.records == counted
        self.controller = again

    @invariant()
    def mode_follows_from_request_and_health(self) -> None:
        controller = self.controller
        assert controller.mode is effective_mode(controller.request, controller.health)
        assert controller.snapshot(self.now_s).policy_version >= self.version

    @invariant()
    def memory_is_bounded(self) -> None:
        controller = self.controller
        assert len(controller.counters.events) <= MAX_EVENTS
        assert len(controller.snapshot(self.now_s).k_by_batch_size) <= INFO.max_batch
        assert len(controller.models.padding.seen) <= INFO.max_batch
        assert controller.models.acceptance.waiting_steps <= self.step


ControllerMachine.TestCase.settings = settings(
    max_examples=15, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestController = ControllerMachine.TestCase
