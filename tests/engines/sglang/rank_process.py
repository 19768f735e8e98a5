"""One tensor-parallel rank, without a model: `python -m tests.engines.sglang.rank_process JSON`. Writes K of every step."""

from __future__ import annotations

import json
import random
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as distributed

from adaptive_spec.engines.sglang.ranks import RankedTap, Rendezvous, TorchGroup
from tests.engines.sglang.rank_policies import CANDIDATES, MAX_BATCH, rank_info


def run(options: dict[str, Any]) -> dict[str, Any]:
    rank, ranks = int(options["rank"]), int(options["ranks"])
    torch.set_num_threads(1)
    store = f"file://{options['store']}"
    distributed.init_process_group("gloo", store, timedelta(seconds=120), ranks, rank)
    group = TorchGroup(distributed.group.WORLD, 0)
    rendezvous = Rendezvous(group, rank, int(options["interval_steps"]))
    tap = RankedTap(options["runtime_dir"], rank_info(), None, rendezvous, float(options["max_age_s"]))
    same, own = random.Random(1), random.Random(100 + rank)  # what all ranks see alike, and what is each one's own
    k_of_step, version_of_step = [], []
    begun_s = time.monotonic()
    while True:
        if own.random() < 0.001:
            time.sleep(own.random() * 0.02)  # a slow rank
        if options.get("failing_rank") == rank and own.random() < 0.01:
            rendezvous.failed = True
        k_of_step.append(tap.begin_step(same.randint(1, MAX_BATCH), same.randint(1, 100_000), time.monotonic_ns()))
        version_of_step.append(tap.begun.policy_version)
        if len(k_of_step) % 500 == 0:  # all ranks end at the same step
            over = rendezvous.swaps >= options["swaps"] or time.monotonic() - begun_s > options["limit_s"]
            if group.total(np.array([rank == 0 and over], np.int64))[0]:
                break
    np.savez(options["out"], k=np.array(k_of_step, np.uint8), version=np.array(version_of_step, np.int64))
    distributed.destroy_process_group()
    assert set(k_of_step) <= set(CANDIDATES)
    return {"steps": len(k_of_step), "swaps": rendezvous.swaps, "failures": tap.counters.hook_failures + rendezvous.failures}


if __name__ == "__main__":
    print(json.dumps(run(json.loads(Path(sys.argv[1]).read_text()))))
