"""Cost of the ranks' rendezvous per decode step: four processes, gloo on the loopback, nothing else in a step.

Four ranks on fewer cores take turns, so these are upper bounds: with a core for each rank a synchronisation is quicker.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import click
import numpy as np

from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.domain.policy import Granularity, Mode, Policy
from adaptive_spec.domain.survival import GRID_POINTS, SurvivalMap
from adaptive_spec.engine_side.tap import PAGE_NAME
from adaptive_spec.engines.sglang.ranks import RankedTap, Rendezvous, TorchGroup
from adaptive_spec.wire.policy_page import PolicyPage, payload_bytes

RANKS, MAX_BATCH, MAX_K = 4, 64, 7
INTERVALS = (1, 4, 16, 64)
STEPS = 4000


def _policy(version: int) -> Policy:
    return Policy(
        version, Mode.ACTIVE, True, Granularity.BATCH, MAX_K, np.full((MAX_BATCH + 1, 1), 3, np.uint8), np.zeros(0, np.float32),
        np.zeros((MAX_K + 1, MAX_BATCH + 1), np.float32), np.ones(MAX_BATCH * (MAX_K + 1) + 1, np.float32), 0.0,
        SurvivalMap(np.full((MAX_K, GRID_POINTS), 0.5, np.float32), True), True,
    )  # fmt: skip


def rank_process(rank: int, folder: str, interval: int, swap_every: int, results: multiprocessing.Queue[float]) -> None:
    """One rank: microseconds per begun step, put into `results` by rank 0. swap_every: steps between new policies, 0 for none."""
    import torch
    import torch.distributed as distributed

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/store", timedelta(seconds=60), RANKS, rank)
    info = EngineInfo("sglang", "m", "cpu", RANKS, 3, (0, 1, 3, 7), MAX_BATCH, Granularity.BATCH, False, os.getpid())
    rendezvous = Rendezvous(TorchGroup(distributed.group.WORLD, 0), rank, interval)
    page = PolicyPage.create_or_open(Path(folder) / PAGE_NAME, payload_bytes(MAX_BATCH, MAX_K)) if rank == 0 else None
    if page is not None:
        page.publish(_policy(1))
        page.heartbeat(time.monotonic_ns())
    distributed.barrier()
    tap = RankedTap(folder, info, None, rendezvous)
    dice = random.Random(0)
    begun_s = 0.0
    for step in range(200 + STEPS):
        if step == 200:
            distributed.barrier()
            begun_s = time.perf_counter()
        if page is not None and swap_every and step % swap_every == 0:
            page.publish(_policy(page.last_version + 1))
        tap.begin_step(dice.randint(1, MAX_BATCH), 1000, time.monotonic_ns())
    taken_s = time.perf_counter() - begun_s
    if rank == 0:
        results.put(1e6 * taken_s / STEPS)
    distributed.destroy_process_group()


def measure(interval: int, swap_every: int) -> float:
    """Microseconds per step."""
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[float] = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=rank_process, args=(rank, folder, interval, swap_every, results)) for rank in range(RANKS)
        ]
        for process in processes:
            process.start()
        found = results.get(timeout=120)
        for process in processes:
            process.join()
    return found


@click.command(help=__doc__)
def main() -> None:
    for interval in INTERVALS:
        click.echo(f"synchronisation every {interval:2d} steps: {measure(interval, 0):8.1f} us a step, no new policy")
    click.echo(f"synchronisation every 16 steps: {measure(16, 16):8.1f} us a step, a new policy each time")


if __name__ == "__main__":
    main()
