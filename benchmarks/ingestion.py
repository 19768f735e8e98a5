"""How fast the sidecar learns: records of batch 64 and K 7 through the real ring into the controller, on one core.

A pair is one verified draft token: (cumulative score, accepted). The time is all that the sidecar does with a record:
copying it out of the ring, decoding, checking, learning times and acceptance. Refits come by the clock and not by the record
(every 0.5 s, here of an engine whose steps take 25 ms), so what is left with them is told apart.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path

import click
import numpy as np

from adaptive_spec.config.settings import ControllerSettings
from adaptive_spec.control.controller import Controller
from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.domain.policy import Granularity
from adaptive_spec.domain.step_record import StepRecord
from adaptive_spec.wire.ring import RingReader, RingWriter

BATCH, MAX_K = 64, 7
STEP_S = 0.025
CHUNK = 512
WANTED_PAIRS_PER_S = 1_000_000


def made_records(count: int, seed: int = 0) -> list[StepRecord]:
    """Steps whose acceptance follows the confidences, on a staircase of 64-token tiles; verify lengths vary."""
    rng = np.random.default_rng(seed)
    records = []
    for step in range(count):
        quality = rng.beta(6, 2, (BATCH, MAX_K))
        verify_len = rng.integers(MAX_K - 2, MAX_K + 1, BATCH).astype(np.uint8)
        hit = (rng.random((BATCH, MAX_K)) < quality) & (np.arange(MAX_K) < verify_len[:, None])
        accept_len = np.cumprod(hit, axis=1).sum(axis=1).astype(np.uint8)
        tokens = int(verify_len.sum()) + BATCH
        verify_s = (0.012 + 0.002 * (tokens // 64)) * float(rng.lognormal(0.0, 0.02))
        record = StepRecord(
            step, 0, 60_000, 0, tokens, tokens, BATCH, MAX_K, 0, 0.005, verify_s, 0.001, verify_s + 0.007,
            quality.astype(np.float32), verify_len, accept_len, np.arange(BATCH, dtype=np.uint32),
        )  # fmt: skip
        records.append(record)
    return records


def engine_info() -> EngineInfo:
    """An engine of batch 64 and K up to 7."""
    return EngineInfo("bench", "none", "none", 1, 4, tuple(range(MAX_K + 1)), BATCH, Granularity.REQUEST, False, os.getpid())


def run(folder: Path, chunks: int) -> dict[str, float]:
    """Learn `chunks` times 512 records; returns pairs and records per second of processor time."""
    info = engine_info()
    writer = RingWriter.create(folder / "bench.ring", info)
    records = made_records(CHUNK)
    pairs_of_chunk = sum(int(record.verify_len.sum()) for record in records)
    controller = Controller(ControllerSettings(mode="shadow"), info)
    reader = RingReader.open(folder / "bench.ring")
    learning_s = refit_s = now_s = 0.0
    for chunk in range(chunks + 1):
        for record in records:
            writer.write(record)
        if chunk == 1:  # the first chunk warms up: caches, imports, first fits
            learning_s = refit_s = 0.0
        begun = time.process_time()
        for record in reader.poll(CHUNK):
            now_s += STEP_S
            controller.observe(record, now_s)
            if controller.refit_due(now_s):
                controller.models.learn_acceptance()  # a refit would begin with it, and it belongs to the learning
                before = time.process_time()
                controller.refit(now_s)
                refit_s += time.process_time() - before
        learning_s += time.process_time() - begun
    if reader.lost or reader.torn or reader.invalid or controller.snapshot(now_s).observations != CHUNK * (chunks + 1):
        raise RuntimeError("not every record was learnt")
    return {
        "pairs_per_s": chunks * pairs_of_chunk / (learning_s - refit_s),
        "records_per_s": chunks * CHUNK / (learning_s - refit_s),
        "pairs_per_s_with_refits": chunks * pairs_of_chunk / learning_s,
        "wanted_pairs_per_s": WANTED_PAIRS_PER_S,
    }


@click.command()
@click.option("--chunks", type=click.IntRange(1, 10_000), default=20, show_default=True, help="Times 512 records.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(chunks: int, as_json: bool) -> None:
    """Measure ingestion."""
    with tempfile.TemporaryDirectory() as folder:
        figures = run(Path(folder), chunks)
    if as_json:
        click.echo(json.dumps(figures, indent=1))
        return
    what = "(score, accepted) pairs learnt per second"
    click.echo(f"{what:52s} {figures['pairs_per_s']:12,.0f}  wanted >= {WANTED_PAIRS_PER_S:,}")
    click.echo(f"{'the same, refits included':52s} {figures['pairs_per_s_with_refits']:12,.0f}")
    click.echo(f"{'records per second, batch 64, K 7':52s} {figures['records_per_s']:12,.0f}")


if __name__ == "__main__":
    main()
