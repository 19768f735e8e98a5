"""A tap that times every call of the hot path, and what the operating system and Python did meanwhile.

A thread that is not run for a while looks like a slow call: its wall time grows and its processor time does not. So both are
measured, with the involuntary switches of the thread, its page faults, and the garbage collections that ran.
"""

from __future__ import annotations

import gc
import heapq
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from adaptive_spec.domain.arrays import Float32s, Floats, Lengths, RequestIds
from adaptive_spec.engine_side.tap import BegunStep, EngineTap

KEPT = 10
"""Of each call, the slowest ones that are remembered."""
CALLS = ("begin_step", "verify_lengths", "end_step")


class SlowCall(NamedTuple):
    """wall_ms, cpu_ms: of the thread. switched: times that another thread took its core. faults: page faults, major ones counted
    by `major_faults` too. collections: of garbage. adopted: the call took a new policy over. step: number of the decode step.
    """

    wall_ms: float
    cpu_ms: float
    switched: int
    faults: int
    major_faults: int
    collections: int
    adopted: bool
    step: int

    @property
    def ours(self) -> bool:
        """Whether most of its time was work of the thread."""
        return self.cpu_ms > 0.5 * self.wall_ms


class CallTimes:
    """calls: how many. total_ms: their wall time. slowest: the KEPT slowest, slowest first."""

    def __init__(self) -> None:
        self.calls, self.total_ms = 0, 0.0
        self._heap: list[SlowCall] = []

    def add(self, slow: SlowCall) -> None:
        self.calls += 1
        self.total_ms += slow.wall_ms
        if len(self._heap) < KEPT:
            heapq.heappush(self._heap, slow)
        elif slow.wall_ms > self._heap[0].wall_ms:
            heapq.heapreplace(self._heap, slow)

    @property
    def slowest(self) -> list[SlowCall]:
        return sorted(self._heap, reverse=True)


class TimedTap(EngineTap):
    """A tap with `times` of each of CALLS."""

    times: dict[str, CallTimes]

    def begin_step(self, batch_size: int, kv_tokens: int, now_ns: int) -> int:
        return int(self._timed("begin_step", lambda: EngineTap.begin_step(self, batch_size, kv_tokens, now_ns)))

    def verify_lengths(self, confidences: Float32s, expected: Floats | None = None) -> Lengths:
        found: Lengths = self._timed("verify_lengths", lambda: EngineTap.verify_lengths(self, confidences, expected))
        return found

    def end_step(
        self, now_ns: int, num_tokens: int, padded_tokens: int, draft_s: float, verify_s: float, draft_extend_s: float,
        step_s: float, confidences: Float32s, verify_len: Lengths, accept_len: Lengths,
        request_ids: RequestIds, flags: int = 0, begun: BegunStep | None = None,
    ) -> None:  # fmt: skip
        self._timed(
            "end_step",
            lambda: EngineTap.end_step(
                self, now_ns, num_tokens, padded_tokens, draft_s, verify_s, draft_extend_s, step_s, confidences, verify_len,
                accept_len, request_ids, flags, begun,
            ),
        )  # fmt: skip

    def save(self, path: Path) -> None:
        """Write what was measured, replacing the file."""
        document = {
            name: {"calls": times.calls, "total_ms": times.total_ms, "slowest": [list(slow) for slow in times.slowest]}
            for name, times in self.times.items()
        }
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(document))
        temporary.replace(path)

    def _timed(self, name: str, call: Callable[[], Any]) -> Any:
        if "times" not in self.__dict__:
            self.times = {name: CallTimes() for name in CALLS}
        adoptions, collections = self._adoptions, _collections()
        used = resource.getrusage(resource.RUSAGE_THREAD)
        cpu_ns, begun_ns = time.thread_time_ns(), time.perf_counter_ns()
        result = call()
        wall_ns, cpu_ns = time.perf_counter_ns() - begun_ns, time.thread_time_ns() - cpu_ns
        now = resource.getrusage(resource.RUSAGE_THREAD)
        self.times[name].add(
            SlowCall(
                1e-6 * wall_ns, 1e-6 * cpu_ns, now.ru_nivcsw - used.ru_nivcsw, now.ru_minflt - used.ru_minflt,
                now.ru_majflt - used.ru_majflt, _collections() - collections, self._adoptions > adoptions, self._step,
            )
        )  # fmt: skip
        return result


def _collections() -> int:
    return sum(generation["collections"] for generation in gc.get_stats())
