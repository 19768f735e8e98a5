"""Cost of several ranks per loop of the scheduler: processes on gloo, SGLang's broadcast of the requests, nothing else in a loop.

"with the plugin": what our hook does around the broadcast, and the decision of a step; policies stay, or change all the time.
Ranks on fewer cores take turns, so the differences are upper bounds.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import socket
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
import numpy as np

from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.domain.policy import Granularity, Mode, Policy
from adaptive_spec.domain.survival import GRID_POINTS, SurvivalMap
from adaptive_spec.engine_side.tap import PAGE_NAME
from adaptive_spec.engines.sglang.rank_notes import StoreNotes, default_store
from adaptive_spec.engines.sglang.ranks import RankedTap, Steering, carried, try_policy
from adaptive_spec.wire.policy_page import PolicyPage, payload_bytes

RANKS, MAX_BATCH, MAX_K = 2, 64, 7
LOOPS = 4000


def _policy(version: int) -> Policy:
    return Policy(
        version, Mode.ACTIVE, True, Granularity.BATCH, MAX_K, np.full((MAX_BATCH + 1, 1), 3, np.uint8), np.zeros(0, np.float32),
        np.zeros((MAX_K + 1, MAX_BATCH + 1), np.float32), np.ones(MAX_BATCH * (MAX_K + 1) + 1, np.float32), 0.0,
        SurvivalMap(np.full((MAX_K, GRID_POINTS), 0.5, np.float32), True), True,
    )  # fmt: skip


def rank_process(rank: int, port: int, folder: str, plugged: bool, changing: bool, results: multiprocessing.Queue[Any]) -> None:
    """One rank: microseconds per loop and policies taken into use, put into `results` by rank 0."""
    import torch
    import torch.distributed as distributed

    from tests.engines.sglang.rank_process import broadcast

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", timedelta(seconds=60), RANKS, rank)
    info = EngineInfo("sglang", "m", "cpu", RANKS, 3, (0, 1, 3, 7), MAX_BATCH, Granularity.BATCH, False, os.getpid())
    steering = Steering(rank, check=try_policy(info))
    page = PolicyPage.create_or_open(Path(folder) / PAGE_NAME, payload_bytes(MAX_BATCH, MAX_K)) if rank == 0 else None
    if page is not None:
        page.publish(_policy(1))
        page.heartbeat(time.monotonic_ns())
    tap = RankedTap(folder, info, None, steering)
    if plugged:
        steering.join(StoreNotes(lambda: default_store("benchmark"), rank, RANKS, 1))
    dice, begun_s, loop, adopted = random.Random(0), 0.0, 0, 0
    measured = 0
    while measured < LOOPS:
        if measured == 0 and (not plugged or steering.adopted):
            begun_s, adopted = time.perf_counter(), steering.adopted
        measured += not plugged or steering.adopted > 0
        loop += 1
        if page is not None and changing and loop % 16 == 0:
            page.publish(_policy(page.last_version + 1))
        requests: list[Any] | None = [] if rank == 0 else None
        if plugged and rank == 0:
            message = steering.outgoing(lambda: tap.page_policy(time.monotonic_ns()), time.monotonic())
            requests = [tuple(message)] if message is not None else []
        received = broadcast(None, requests)
        if plugged:
            for message in carried(received)[1]:
                steering.incoming(message)
            steering.forward_pass = loop
            tap.begin_step(dice.randint(1, MAX_BATCH), 1000, time.monotonic_ns())
    taken_s = time.perf_counter() - begun_s
    if rank == 0:
        results.put((1e6 * taken_s / LOOPS, steering.adopted - adopted))
    distributed.barrier()
    os._exit(0)


def measure(plugged: bool, changing: bool) -> tuple[float, int]:
    """Microseconds per loop, and policies taken into use meanwhile."""
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[Any] = context.Queue()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = int(taken.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=rank_process, args=(rank, port, folder, plugged, changing, results)) for rank in range(RANKS)
        ]
        for process in processes:
            process.start()
        found: tuple[float, int] = results.get(timeout=120)
        for process in processes:
            process.join()
    return found


@click.command(help=__doc__)
def main() -> None:
    base, _ = measure(False, False)
    print(f"{RANKS} ranks, broadcast alone: {base:.1f} us a loop")
    for name, changing in (("policies stay", False), ("policies change", True)):
        found, adopted = measure(True, changing)
        print(f"{RANKS} ranks with the plugin, {name}: {found:.1f} us a loop, {adopted} policies taken into use")


if __name__ == "__main__":
    main()
