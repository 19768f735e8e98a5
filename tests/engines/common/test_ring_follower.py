from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np

from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.domain.policy import Granularity
from adaptive_spec.domain.step_record import StepFlag
from adaptive_spec.engine_side.tap import RING_NAME
from adaptive_spec.engines.common.ring_follower import RingFollower
from adaptive_spec.wire.ring import RingWriter

PATIENCE_S = 60.0


def _write(ring: RingWriter, step: int, k: int, flags: int = 0) -> None:
    lengths = np.full(2, k, np.uint8)
    ring.write_fields(
        step, step, 100, 1, 2 * (k + 1), 2 * (k + 1), 2, k, flags, 1e-3, 5e-3, 1e-3, 8e-3, np.full((2, k), 0.5, np.float32),
        lengths, np.zeros(2, np.uint8), np.arange(2, dtype=np.uint32),
    )  # fmt: skip


def _wait_for(follower: RingFollower, steps: int) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while follower.steps < steps:
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def test_steps_are_counted_by_arm_and_the_figures_are_json(tmp_path: Path) -> None:
    info = EngineInfo("e", "m", "g", 1, 3, (1, 3, 5), 8, Granularity.BATCH, False, os.getpid())
    ring = RingWriter.create(tmp_path / RING_NAME, info)
    follower = RingFollower(tmp_path, ["easy"])
    follower.start()
    for arm, ks, flags in (("", (3, 1), 0), ("adaptive", (5, 5, 3), 0), ("own", (3, 3), int(StepFlag.FALLBACK))):
        follower.arm = arm
        written = follower.steps
        for step, k in enumerate(ks, written + 1):
            _write(ring, step, k, flags)
        _wait_for(follower, written + len(ks))
    _write(ring, 8, 1, int(StepFlag.LIMITED))
    follower.stop()
    figures = follower.figures()
    assert json.loads(json.dumps(figures)) == figures
    assert (figures["decode_steps"], figures["k_switches"], figures["steps_not_as_asked"]) == (8, 4, 1)
    assert figures["arms"] == {
        "adaptive": {"steps": 3, "trials": 0, "k_switches": 2, "by_k": {"3": 1, "5": 2}},
        "own": {"steps": 3, "trials": 0, "k_switches": 1, "by_k": {"1": 1, "3": 2}},
    }
