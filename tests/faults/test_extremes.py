"""Records of extremes, and impossible ones, through ring, parser and models: 20,000 in CI, ten million at night."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adaptive_spec.config.settings import ControllerSettings
from adaptive_spec.control.controller import Controller
from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.domain.policy import Granularity
from adaptive_spec.domain.step_record import StepRecord
from adaptive_spec.wire.ring import RingReader, RingWriter
from tests.support.extreme_records import assert_publishable, assert_snapshot_finite, extreme_record

CI, NIGHTLY = 20_000, 10_000_000
MADE = 1000
"""Records made at once; each is written REPEATS times, in another order each time: making one takes longer than learning it."""
REPEATS = 5
EXTREME, IMPOSSIBLE = 0.3, 0.02
STEP_S = 1e-4
"""Of the controller's clock: a refit every 5,000 records."""
TIMES = ("draft_s", "verify_s", "draft_extend_s", "step_s")
LARGEST_STATE = 4 << 20
"""Bytes of a checkpoint's arrays: the state is bounded, whatever came before."""
IMPOSSIBLE_VALUES: tuple[dict[str, Any], ...] = (
    {"step_s": math.nan}, {"step_s": 0.0}, {"step_s": math.inf}, {"verify_s": -1.0}, {"verify_s": 1e30}, {"draft_s": math.nan},
    {"num_tokens": 0}, {"batch_size": (1 << 32) - 1}, {"padded_tokens": (1 << 32) - 1}, {"kv_tokens": (1 << 64) - 1},
    {"step": (1 << 64) - 1}, {"time_ns": (1 << 64) - 1}, {"policy_version": 1 << 63},
)  # fmt: skip


@pytest.mark.parametrize("granularity", list(Granularity))
@pytest.mark.parametrize("count", [CI, pytest.param(NIGHTLY, marks=pytest.mark.nightly)])
def test_records_of_extremes(tmp_path: Path, count: int, granularity: Granularity) -> None:
    info = EngineInfo("t", "m", "g", 1, 4, (0, 1, 2, 3, 4), 8, granularity, False, 1).checked()
    writer = RingWriter.create(tmp_path / "ring", info, slots=MADE)
    reader = RingReader.open(tmp_path / "ring")
    controller, rng = Controller(ControllerSettings(), info), np.random.default_rng(3)
    impossible, now_s, slowest_s, begun_s = 0, 0.0, 0.0, time.monotonic()
    while writer.written < count // len(Granularity):
        made = [_record(rng, info) for _ in range(MADE)]
        for _ in range(REPEATS):
            for number in rng.permutation(MADE):
                writer.write(made[number])
            impossible += sum(record.invalid_reason() is not None for record in made)
            for record in reader.poll():
                now_s += STEP_S
                assert_publishable(controller.observe(record, now_s), info)
            if controller.refit_due(now_s):  # as a session does: once for all records that it finds
                before_s = time.thread_time()  # on a busy machine another program's time is in the wall clock's
                policy = controller.refit(now_s)
                slowest_s = max(slowest_s, time.thread_time() - before_s)
                assert_publishable(policy, info)
                assert_snapshot_finite(controller.snapshot(now_s))
    state = sum(array.nbytes for array in controller.state().values())
    assert (writer.failed, reader.lost, reader.torn) == (0, 0, 0)
    assert reader.invalid == impossible > 0
    assert controller.counters.observations == writer.written - impossible
    assert state < LARGEST_STATE
    again = Controller(ControllerSettings(), info)
    again.restore(controller.state())
    assert_publishable(again.refit(now_s), info)
    print(
        f"{granularity}: {writer.written:,} records, {impossible:,} impossible ones dropped, {state / 1e3:.0f} KB of state, "
        f"slowest refit {1e3 * slowest_s:.1f} ms of processor time, {time.monotonic() - begun_s:.0f} s"
    )


def _slot_s(seconds: float) -> float:
    """Seconds as a slot holds them, never rounded down: the shortest time would become one that is too short."""
    found = np.float32(seconds)
    return float(found if found >= seconds else np.nextafter(found, np.float32(np.inf)))


def _record(rng: np.random.Generator, info: EngineInfo) -> StepRecord:
    record = extreme_record(rng, info, EXTREME)
    times: dict[str, Any] = {name: _slot_s(getattr(record, name)) for name in TIMES}
    record = replace(record, **times)
    if rng.random() < IMPOSSIBLE:
        return replace(record, **IMPOSSIBLE_VALUES[int(rng.integers(len(IMPOSSIBLE_VALUES)))])
    return record
