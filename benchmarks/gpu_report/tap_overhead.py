"""What the tap costs a decode step: paired steps with and without it, in alternating order."""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.domain.policy import Granularity
from adaptive_spec.engine_side.tap import EngineTap
from benchmarks.gpu_report.timing import Timer


class TapCost(NamedTuple):
    """Medians over the pairs: seconds of a step with and without the tap, and of the calls of the tap alone."""

    with_tap_s: float
    without_s: float
    calls_s: float


def tap_cost(timer: Timer, folder: Path, batch_size: int, k: int, pairs: int) -> TapCost:
    """Time `pairs` pairs of a verify forward of `batch_size` requests with K = k. folder: of the ring, made by the tap."""
    info = EngineInfo("gpu-report", "shapes", "device", 1, k, tuple(range(k + 1)), batch_size, Granularity.BATCH, False, 1)
    tap = EngineTap.open(folder, info)
    confidences = np.full((batch_size, k), 0.8, np.float32)
    lengths, ids, tokens = np.full(batch_size, k, np.uint8), np.arange(batch_size, dtype=np.uint32), batch_size * (k + 1)

    def step(with_tap: bool) -> tuple[float, float]:
        begun_s = time.perf_counter()
        calls_s = 0.0
        if with_tap:
            tap.begin_step(batch_size, 1024 * batch_size, time.monotonic_ns())
            calls_s = time.perf_counter() - begun_s
        seconds = timer.seconds(tokens)
        if with_tap:
            forwarded_s = time.perf_counter()
            tap.end_step(time.monotonic_ns(), tokens, tokens, 1e-3, seconds, 0.0, seconds, confidences, lengths, lengths, ids)
            calls_s += time.perf_counter() - forwarded_s
        return time.perf_counter() - begun_s, calls_s

    found = []
    for pair in range(pairs):
        results = {order: step(order) for order in ((True, False) if pair % 2 else (False, True))}
        found.append((results[True][0], results[False][0], results[True][1]))
    if tap.counters.write_failures:
        raise RuntimeError(f"the tap did not write: {tap.counters}")
    tap.close()
    return TapCost(*np.median(found, axis=0).tolist())
