"""One tensor-parallel rank as a process of its own, without a model: `python -m tests.engines.sglang.rank_process JSON`.

A loop of it: SGLang's broadcast of the received requests with our hook around it, a decode step with all our hooks, and a forward
that ends only if all ranks run the same K. With `sglang` the broadcast is the method of SGLang's own receiver, hooked by its
registry. What happened is written as JSON to `out`, also when another rank ends the run.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as distributed

from adaptive_spec.engines.sglang.attachment import Place
from tests.engines.sglang.eagle_rank import EagleRank
from tests.engines.sglang.rank_policies import MAX_BATCH


def broadcast(receiver: Any, requests: list[Any] | None) -> list[Any]:
    """As SGLang's `broadcast_pyobj`: the size, then the pickled list if it is not empty."""
    data = pickle.dumps(requests) if requests else b""
    size = torch.tensor([len(data)])
    distributed.broadcast(size, 0)
    if not int(size):
        return []
    buffer = torch.from_numpy(np.frombuffer(data, np.uint8).copy()) if data else torch.empty(int(size), dtype=torch.uint8)
    distributed.broadcast(buffer, 0)
    found: list[Any] = pickle.loads(buffer.numpy().tobytes())
    return found


def sglangs_broadcast(rank: int, ranks: int) -> Callable[[Any, list[Any] | None], list[Any]]:
    """The method of SGLang's receiver, on a process group of ours."""
    from sglang.srt.managers.scheduler_components import request_receiver
    from sglang.srt.managers.scheduler_components.request_receiver import SchedulerRequestReceiver

    group = SimpleNamespace(rank=rank, cpu_group=distributed.group.WORLD, ranks=list(range(ranks)))
    parallel = SimpleNamespace(attn_dp_enabled=False, tp_size=ranks, tp_group=group)
    request_receiver.get_parallel = lambda: parallel
    receiver: Any = object.__new__(SchedulerRequestReceiver)
    return lambda _, requests: receiver._broadcast_reqs_across_ranks(requests)


def same_on_all(k: int) -> bool:
    """The forward: it needs every rank."""
    both = torch.tensor([k, -k])
    distributed.all_reduce(both, distributed.ReduceOp.MAX)
    return int(both[0]) == -int(both[1])


def run(options: dict[str, Any]) -> dict[str, Any]:
    rank, ranks = int(options["rank"]), int(options["ranks"])
    torch.set_num_threads(1)
    store = distributed.TCPStore("127.0.0.1", int(options["port"]), ranks, rank == 0, timeout=timedelta(seconds=240))  # type: ignore[attr-defined]
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=50))
    side: EagleRank | None = None
    begun_s = time.monotonic()
    send = sglangs_broadcast(rank, ranks) if options.get("sglang") else broadcast
    if rank not in options.get("without_plugin", ()):
        side = EagleRank(
            Place(rank, ranks), Path(options["runtime_dir"]), options.get("faults", {}).get(str(rank), ""),
            max_age_s=float(options["max_age_s"]), timeout_s=int(options["timeout_s"]),
        )  # fmt: skip
        if not options.get("sglang"):
            side.attachment._hook_broadcast = lambda: None  # type: ignore[method-assign]
        side.attach()
    attach_s = time.monotonic() - begun_s
    steering = side.attachment._steering if side is not None else None
    same = random.Random(1)  # what all ranks see alike
    ks, longest_s, differing, over = [], 0.0, 0, False
    progress = Path(options["out"]).with_suffix(".steps")
    while not over:
        stop = rank == 0 and (os.path.exists(options["stop"]) or time.monotonic() - begun_s > options["limit_s"])
        count = same.randint(0, 2)  # drawn on every rank in every loop, the last one too
        requests = ["stop"] if stop else ["request"] * count
        # The hook's own time is what it takes beside SGLang's broadcast.
        inside = [0.0]

        def timed(receiver: Any, given: Any, inside: list[float] = inside) -> Any:
            started_s = time.monotonic()
            found = send(receiver, given)
            inside[0] += time.monotonic() - started_s
            return found

        started_s = time.monotonic()
        given = requests if rank == 0 else None
        hooked = side is not None and not options.get("sglang")
        received = side.attachment.broadcast(timed, None, given) if hooked and side is not None else timed(None, given)
        longest_s = max(longest_s, time.monotonic() - started_s - inside[0])
        over = "stop" in received
        rows, kv_tokens = same.randint(1, MAX_BATCH), same.randint(1, 100_000)
        ks.append(side.step(rows, kv_tokens) if side is not None else 1)
        differing += not same_on_all(ks[-1])
        if len(ks) % 20 == 0:
            progress.write_text(json.dumps([len(ks), steering.adopted if steering else 0, steering.left if steering else ""]))
        time.sleep(0.001)
    return {
        "steps": len(ks), "ks": ks, "differing": differing, "attach_s": attach_s, "longest_s": longest_s,
        "adopted": steering.adopted if steering else 0, "left": steering.left if steering else "",
        "steers": bool(steering and steering.steers), "failures": dict(side.guard.failures) if side else {},
    }  # fmt: skip


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())
    Path(given["out"]).write_text(json.dumps(run(given)))
    os._exit(0)  # a process group without its other ranks may wait in its destructor
