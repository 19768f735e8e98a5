"""Seconds of a forward by number of rows: CUDA graphs and events on a GPU, the clock on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.gpu_report.shapes import Forward

WARM_UP_ROUNDS = 2


class Timer:
    """Times one forward at a time. On CUDA each row count is captured as a graph the first time, as servers do."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def seconds(self, rows: int) -> float:
        """Run the forward over `rows` rows once and return its seconds."""
        if self._forward.device.type != "cuda":
            begun_s = time.perf_counter()
            self._forward.run(rows)
            return time.perf_counter() - begun_s
        graph = self._graphs.get(rows) or self._capture(rows)
        begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3

    def _capture(self, rows: int) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._forward.run(rows)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._forward.run(rows)
        self._graphs[rows] = graph
        return graph


def measure(
    timer: Timer, counts: Sequence[int], rounds: int, advance: Callable[[], None] | None = None, seed: int = 0
) -> NDArray[np.float64]:
    """Seconds [rounds, counts]. Every round measures each count once, in shuffled order, so that other load affects all alike."""
    random = np.random.default_rng(seed)
    seconds = np.empty((rounds, len(counts)))
    for r in range(-WARM_UP_ROUNDS, rounds):
        for index in random.permutation(len(counts)):
            seconds[r, index] = timer.seconds(counts[index])
        if advance is not None:
            advance()
    return seconds
