"""The control arm measures the gain over the launch K, not over a forecast of it."""

from __future__ import annotations

import dataclasses

import pytest

from adaptive_spec.config.settings import ControllerSettings, PolicySettings
from adaptive_spec.control.control_arm import MIN_BLOCKS, STEPS, ControlArm
from adaptive_spec.domain.policy import Granularity
from adaptive_spec.domain.step_record import StepFlag
from tests.support.simulated_server import SimulatedServer, engine_info, staircase

RECORD = SimulatedServer(engine_info(Granularity.BATCH), staircase()).step()


def steps(arm: ControlArm, count: int, seconds: float, version: int = 1, k: int = 5, flags: int = 0, batch_size: int = 8) -> None:
    record = dataclasses.replace(
        RECORD, policy_version=version, k=k, flags=flags, step_s=seconds, batch_size=batch_size, accept_len=RECORD.accept_len * 0
    )
    for _ in range(count):
        arm.observe(record)


def block(arm: ControlArm, ours_s: float, launch_s: float, batch_size: int = 8) -> None:
    arm.begin(2)
    steps(arm, STEPS, ours_s)
    steps(arm, 1, 9.0, 2, 3, int(StepFlag.TRIAL), batch_size)  # the change of K, left out
    steps(arm, STEPS, launch_s, 2, 3, int(StepFlag.TRIAL), batch_size)


def test_the_gain_and_its_error_are_those_of_the_blocks() -> None:
    arm = ControlArm(0.01, 3)
    for i in range(MIN_BLOCKS):
        assert arm.gain() is None
        block(arm, 0.010 + 0.001 * (i % 2), 0.0126 + 0.001 * (i % 2))
    found = arm.gain()
    assert found is not None
    assert found[0] == pytest.approx(0.0131 / 0.0105 - 1.0)
    assert 0.0 < found[1] < 0.01


def test_a_block_of_two_batch_sizes_is_left_out_and_a_share_of_0_never_asks() -> None:
    arm = ControlArm(0.01, 3)
    for _ in range(2 * MIN_BLOCKS):
        block(arm, 0.010, 0.012, batch_size=9)
    assert arm.gain() is None
    for share, due in ((0.01, True), (0.0, False)):
        arm = ControlArm(share, 3)
        steps(arm, 500, 0.01)
        assert arm.due is due


def test_it_measures_the_true_gain_within_its_error_and_its_share() -> None:
    settings = ControllerSettings(policy=PolicySettings(control_share=0.05, probe_budget=0.05))
    info = dataclasses.replace(engine_info(Granularity.BATCH, holds_batch=True), launch_k=1)
    s = SimulatedServer(info, staircase(), settings=settings, batch_size=3)
    while s.controller.mode == "sweep" and s.steps < 2000:
        s.run(5)
    s.run(200)
    trials = 0
    for _ in range(3000):
        record = s.step()
        trials += record.k == 1 and bool(record.flags & StepFlag.TRIAL)
        s.controller_sees(record)
    snapshot = s.controller.snapshot(s.now_s)
    truth = s.static_goodput(s.best_static()) / s.static_goodput(1) - 1.0
    assert snapshot.measured_gain is not None
    assert snapshot.measured_gain_error is not None
    assert abs(snapshot.measured_gain - truth) < 4.0 * snapshot.measured_gain_error + 0.02
    assert snapshot.measured_gain_error < 0.2
    assert 0 < trials <= 0.06 * 3000
    off = SimulatedServer(info, staircase(), settings=ControllerSettings(policy=PolicySettings(control_share=0.0)), batch_size=3)
    while off.controller.mode == "sweep" and off.steps < 2000:
        off.run(5)
    off.run(300)
    assert off.controller.snapshot(off.now_s).measured_gain_error is None, "an estimate, and said to be one"
