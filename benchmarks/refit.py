"""How long a full refit takes: 1024 token counts, 8 values of K, and every batch size up to 128. Median and p99.

Beside it the same after records of 4096 token counts up to 16384, a server with batches of up to 2048 requests: what is
kept is bounded, so a refit takes no longer the more was seen. Wall time and CPU time: on a busy machine only the CPU time says
something.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import click
import numpy as np

from adaptive_spec.config.settings import ControllerSettings
from adaptive_spec.control.controller import Controller
from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.domain.policy import Granularity
from adaptive_spec.domain.step_record import StepRecord

MAX_BATCH, MAX_K, COUNTS = 128, 7, 1024
WANTED_P99_MS = 20.0
SCATTERED_COUNTS = 16_384
WARM_UP = 3


def full_controller(seed: int = 0, counts: int = COUNTS, max_batch: int = MAX_BATCH) -> Controller:
    """A controller that has measured 4096 verifications on a staircase of 128-token tiles, with 2 % noise.

    Each of the token counts 1..1024 four times, or as many of more `counts`, none twice.
    """
    info = EngineInfo("bench", "none", "none", 1, 4, tuple(range(MAX_K + 1)), max_batch, Granularity.REQUEST, False, os.getpid())
    controller = Controller(ControllerSettings(mode="shadow"), info)
    rng = np.random.default_rng(seed)
    order = rng.permutation(counts) if counts > COUNTS else np.arange(counts)
    for sample in range(4 * COUNTS):
        tokens = int(order[sample % counts]) + 1
        batch = int(np.clip(rng.integers(-(-tokens // (MAX_K + 1)), tokens + 1), 1, max_batch))
        k = min(max(-(-(tokens - batch) // batch), 0), MAX_K)
        verify_len = np.full(batch, (tokens - batch) // batch, np.uint8)
        verify_len[: (tokens - batch) % batch] += 1
        verify_s = (0.010 + 0.004 * ((tokens - 1) // 128) + 2e-6 * tokens) * float(rng.lognormal(0.0, 0.02))
        confidences = rng.uniform(0.3, 1.0, (batch, k)).astype(np.float32)
        accept_len = np.minimum(rng.integers(0, MAX_K + 1, batch), verify_len).astype(np.uint8)
        record = StepRecord(
            sample, 0, 500 * batch, 0, tokens, tokens, batch, k, 0, 0.0005 * k, verify_s, 0.0, verify_s + 0.0005 * k + 0.0008,
            confidences, verify_len, accept_len, np.arange(batch, dtype=np.uint32),
        )  # fmt: skip
        controller.observe(record, 0.0)
    return controller


def run(refits: int) -> dict[str, float]:
    """Time repeated refits: milliseconds of the whole and of its parts."""
    controller = full_controller()
    taken = _timed(controller, refits)
    counts = len(controller.snapshot(0.0).latency_points)
    if counts != COUNTS:
        raise RuntimeError(f"{counts} token counts were measured, not {COUNTS}")
    figures = {f"{part}_p50_ms": float(np.quantile(times, 0.5)) for part, times in taken.items()}
    figures["all_p99_ms"] = float(np.quantile(taken["all"], 0.99))
    scattered = full_controller(counts=SCATTERED_COUNTS, max_batch=SCATTERED_COUNTS // (MAX_K + 1))
    after = _timed(scattered, refits)
    for name in ("all", "cpu"):
        figures[f"scattered_{name}_p50_ms"] = float(np.quantile(after[name], 0.5))
        figures[f"scattered_{name}_p99_ms"] = float(np.quantile(after[name], 0.99))
    figures["cpu_p99_ms"] = float(np.quantile(taken["cpu"], 0.99))
    figures["scattered_counts_kept"] = float(len(scattered.snapshot(0.0).latency_points))
    return {**figures, "wanted_p99_ms": WANTED_P99_MS}


def _timed(controller: Controller, refits: int) -> dict[str, np.ndarray[tuple[int], np.dtype[np.float64]]]:
    """Milliseconds of each refit by part; "cpu": CPU time of the whole."""
    parts: dict[str, list[float]] = {}

    @contextmanager
    def stopwatch(part: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        parts.setdefault(part, []).append(1e3 * (time.perf_counter() - begun))

    for i in range(refits + WARM_UP):
        begun_s = time.process_time()
        with stopwatch("all"):
            controller.refit(float(i), stopwatch)
        parts.setdefault("cpu", []).append(1e3 * (time.process_time() - begun_s))
    return {part: np.array(times[WARM_UP:]) for part, times in parts.items()}


@click.command()
@click.option("--refits", type=click.IntRange(10, 100_000), default=200, show_default=True, help="Refits measured.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(refits: int, as_json: bool) -> None:
    """Measure refits."""
    figures = run(refits)
    if as_json:
        click.echo(json.dumps(figures, indent=1))
        return
    what = f"refit and policy, {COUNTS} token counts, K 0..{MAX_K}"
    median, p99 = figures.pop("all_p50_ms"), figures["all_p99_ms"]
    click.echo(f"{what:52s} median {median:6.2f} ms  p99 {p99:6.2f} ms  wanted p99 <= {WANTED_P99_MS:g} ms")
    what = f"  the same, token counts up to {SCATTERED_COUNTS}, batches up to {SCATTERED_COUNTS // (MAX_K + 1)}"
    p50, p99 = figures.pop("scattered_all_p50_ms"), figures["scattered_all_p99_ms"]
    click.echo(f"{what:52s} median {p50:6.2f} ms  p99 {p99:6.2f} ms")
    cpu = figures.pop("cpu_p50_ms"), figures.pop("scattered_cpu_p50_ms")
    click.echo(f"{'  CPU time of both':52s} median {cpu[0]:6.2f} and {cpu[1]:.2f} ms")
    for part, milliseconds in figures.items():
        if part.endswith("_p50_ms"):
            click.echo(f"{'  of which ' + part.removesuffix('_p50_ms'):52s} median {milliseconds:6.2f} ms")


if __name__ == "__main__":
    main()
