"""Cost of the hot path: what the tap adds to a decode step, and what reading a record costs the sidecar, median and p99.

Times come from single calls between two readings of the clock; what an empty call takes (printed too) is in every figure.
"""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.domain.policy import Granularity, Mode, Policy
from adaptive_spec.domain.survival import GRID_POINTS, LOGIT_LIMIT, SurvivalMap
from adaptive_spec.engine_side.planner import Planner
from adaptive_spec.engine_side.tap import PAGE_NAME, EngineTap
from adaptive_spec.wire.policy_page import PolicyPage, PolicyPageReader, payload_bytes
from adaptive_spec.wire.ring import RingReader, RingWriter
from benchmarks.surroundings import folder_in_memory

BATCH, MAX_K, LARGE_BATCH = 64, 7, 256
POLL_RECORDS = 16
"""Records per poll: about what an engine writes between two polls of the sidecar."""


def quantiles(taken_ns: NDArray[np.float64]) -> dict[str, float]:
    """Median and 99th percentile of nanoseconds, in microseconds."""
    return {name: round(float(np.quantile(taken_ns, q)) / 1e3, 3) for name, q in (("p50_us", 0.5), ("p99_us", 0.99))}


def measure(call: Callable[[], object], calls: int) -> dict[str, float]:
    """Return median and 99th percentile of single calls, microseconds."""
    clock = time.perf_counter_ns
    taken = np.empty(calls)
    for _ in range(min(calls, 200)):
        call()
    gc.disable()
    try:
        for i in range(calls):
            begun = clock()
            call()
            taken[i] = clock() - begun
    finally:
        gc.enable()
    return quantiles(taken)


def policy_for(max_batch: int) -> Policy:
    """A ragged policy on a staircase of 64-token tiles, with a calibration that changes nothing."""
    tokens = np.arange(max_batch * (MAX_K + 1) + 1)
    staircase = (4e-3 + 1e-6 * tokens + 1.2e-3 * (np.maximum(tokens - 1, 0) // 64)).astype(np.float32)
    grid = np.linspace(-LOGIT_LIMIT, LOGIT_LIMIT, GRID_POINTS)
    table = np.tile((1.0 / (1.0 + np.exp(-grid))).astype(np.float32), (MAX_K, 1))
    return Policy(
        1, Mode.ACTIVE, True, Granularity.REQUEST, MAX_K, np.full((max_batch + 1, 4), MAX_K, np.uint8),
        np.array([1024, 4096, 16384], np.float32), np.full((MAX_K + 1, max_batch + 1), 1e-3, np.float32), staircase, 1e-9,
        SurvivalMap(table, True), False,
    )  # fmt: skip


def run(folder: Path, calls: int) -> dict[str, dict[str, float]]:
    """Measure everything with files in `folder`; returns {what: {p50_us, p99_us}}."""
    info = EngineInfo(
        "bench", "none", "none", 1, 4, tuple(range(MAX_K + 1)), LARGE_BATCH, Granularity.REQUEST, False, os.getpid()
    )
    rng = np.random.default_rng(1)
    confidences = rng.uniform(0.2, 1.0, (LARGE_BATCH, MAX_K)).astype(np.float32)
    rows = np.ascontiguousarray(confidences[:BATCH])
    lengths, ids = np.full(BATCH, MAX_K, np.uint8), np.arange(BATCH, dtype=np.uint32)
    policy = policy_for(LARGE_BATCH)
    results = {"an empty call": measure(lambda: None, calls)}

    writer = RingWriter.create(folder / "bench.ring", info)

    def write() -> None:
        writer.write_fields(
            1, 2, 90_000, 1, 512, 512, BATCH, MAX_K, 0, 1e-3, 5e-3, 1e-3, 8e-3, rows, lengths, lengths, ids
        )  # fmt: skip

    results[f"write one record, batch {BATCH}, K {MAX_K}"] = measure(write, calls)
    reader = RingReader.open(folder / "bench.ring", "newest")
    per_record = np.empty(max(calls // 50, 20))
    for i in range(len(per_record)):
        for _ in range(POLL_RECORDS):
            write()
        begun = time.perf_counter_ns()
        found = len(reader.poll())
        per_record[i] = (time.perf_counter_ns() - begun) / found
    results[f"poll, per record of {POLL_RECORDS}, batch {BATCH}, K {MAX_K}"] = quantiles(per_record)
    if writer.failed or reader.invalid or reader.lost or reader.torn:
        raise RuntimeError(f"{writer.failed} writes failed, {reader.invalid + reader.lost + reader.torn} records were not read")

    with PolicyPage.create_or_open(folder / PAGE_NAME, payload_bytes(LARGE_BATCH, MAX_K)) as page:
        now_ns = time.monotonic_ns()
        page.heartbeat(now_ns)
        page.publish(policy)
        page_reader = PolicyPageReader.open(folder / PAGE_NAME)
        results["read the policy page, nothing new"] = measure(lambda: page_reader.poll(now_ns), calls)
        results[f"read and check a new policy, batch {LARGE_BATCH}, K {MAX_K}"] = measure(
            lambda: PolicyPageReader.open(folder / PAGE_NAME).poll(now_ns), max(calls // 20, 20)
        )
        tap = EngineTap.open(folder, info)
        results["begin_step, nothing new"] = measure(lambda: tap.begin_step(BATCH, 90_000, now_ns), calls)
        if tap.counters.adoptions != 1 or tap.counters.fallback_steps:
            raise RuntimeError(f"the policy was not followed: {tap.counters}")
        step = tap.begun
        results[f"end_step, batch {BATCH}, K {MAX_K}"] = measure(
            lambda: tap.end_step(now_ns, 512, 512, 1e-3, 5e-3, 1e-3, 8e-3, rows, lengths, lengths, ids, begun=step), calls
        )

    planner = Planner(4, MAX_K)
    planner.adopt(policy)
    planner.draft_length(LARGE_BATCH, 90_000)
    for batch in (8, BATCH, LARGE_BATCH):
        part = np.ascontiguousarray(confidences[:batch])
        results[f"planner.verify_lengths, batch {batch}, K {MAX_K}"] = measure(
            lambda part=part: planner.verify_lengths(part),  # type: ignore[misc]  # mypy infers no lambda with a default
            max(calls // 10, 20),
        )
    return results


@click.command()
@click.option("--calls", type=click.IntRange(100, 10_000_000), default=20_000, show_default=True, help="Calls measured each.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def main(calls: int, as_json: bool) -> None:
    """Measure the hot path: ring, policy page, tap, planner."""
    with folder_in_memory() as folder:
        results = run(folder, calls)
    if as_json:
        click.echo(json.dumps(results, indent=1))
        return
    click.echo(f"{'':52s} {'median':>10s} {'p99':>10s}")
    for what, figures in results.items():
        click.echo(f"{what:52s} {figures['p50_us']:7.2f} us {figures['p99_us']:7.2f} us")


if __name__ == "__main__":
    main()
