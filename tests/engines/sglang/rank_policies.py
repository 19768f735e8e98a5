"""A stand-in for the sidecar's end of the page, that publishes all the time: `python -m ...rank_policies DIR SEED [acting]`."""

from __future__ import annotations

import random
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.domain.policy import Granularity, Mode, Policy, Trial
from adaptive_spec.domain.survival import GRID_POINTS, SurvivalMap
from adaptive_spec.engine_side.tap import PAGE_NAME
from adaptive_spec.wire.policy_page import PolicyPage, payload_bytes

CANDIDATES = (0, 1, 3, 5)
MAX_BATCH, MAX_K = 16, 5


def rank_info() -> EngineInfo:
    return EngineInfo("sglang", "m", "cpu", 4, 3, CANDIDATES, MAX_BATCH, Granularity.BATCH, False, 0)


def random_policy(version: int, dice: random.Random) -> Policy:
    """Any table, now and then with trials, now and then not acting."""
    table = np.array([[dice.choice(CANDIDATES)] for _ in range(MAX_BATCH + 1)], np.uint8)
    trials = tuple(Trial(0, dice.choice(CANDIDATES), 0, dice.randint(1, 3)) for _ in range(dice.randint(0, 2)))
    acting = dice.random() < 0.95
    return Policy(
        version, Mode.ACTIVE if acting else Mode.SHADOW, acting, Granularity.BATCH, MAX_K, table, np.zeros(0, np.float32),
        np.zeros((MAX_K + 1, MAX_BATCH + 1), np.float32), np.ones(MAX_BATCH * (MAX_K + 1) + 1, np.float32), 0.0,
        SurvivalMap(np.full((MAX_K, GRID_POINTS), 0.5, np.float32), True), True, trials,
    )  # fmt: skip


def main(runtime_dir: Path, seed: int, acting: bool) -> None:
    dice = random.Random(seed)
    with PolicyPage.create_or_open(runtime_dir / PAGE_NAME, payload_bytes(MAX_BATCH, MAX_K)) as page:
        while True:
            policy = random_policy(page.last_version + 1, dice)
            page.publish(replace(policy, acting=True) if acting else policy)
            page.heartbeat(time.monotonic_ns())
            time.sleep(dice.random() * 0.004)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), "acting" in sys.argv)
