"""How long a full refit takes: 1024 token counts, 8 values of K, and every batch size up to 128. Median and p99."""

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
WARM_UP = 3


def full_controller(seed: int = 0) -> Controller:
    """A controller that has measured every token count 1..1024 on a staircase of 128-token tiles, with 2 % noise."""
    info = EngineInfo("bench", "none", "none", 1, 4, tuple(range(MAX_K + 1)), MAX_BATCH, Granularity.REQUEST, False, os.getpid())
    controller = Controller(ControllerSettings(mode="shadow"), info)
    rng = np.random.default_rng(seed)
    for sample in range(4 * COUNTS):
        tokens = sample % COUNTS + 1
        batch = int(np.clip(rng.integers(-(-tokens // (MAX_K + 1)), tokens + 1), 1, MAX_BATCH))
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
    parts: dict[str, list[float]] = {}

    @contextmanager
    def stopwatch(part: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        parts.setdefault(part, []).append(1e3 * (time.perf_counter() - begun))

    for i in range(refits + WARM_UP):
        with stopwatch("all"):
            controller.refit(float(i), stopwatch)
    taken = {part: np.array(times[WARM_UP:]) for part, times in parts.items()}
    counts = len(controller.snapshot(0.0).latency_points)
    if counts != COUNTS:
        raise RuntimeError(f"{counts} token counts were measured, not {COUNTS}")
    figures = {f"{part}_p50_ms": float(np.quantile(times, 0.5)) for part, times in taken.items()}
    return {**figures, "all_p99_ms": float(np.quantile(taken["all"], 0.99)), "wanted_p99_ms": WANTED_P99_MS}


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
    for part, milliseconds in figures.items():
        if part.endswith("_p50_ms"):
            click.echo(f"{'  of which ' + part.removesuffix('_p50_ms'):52s} median {milliseconds:6.2f} ms")


if __name__ == "__main__":
    main()
