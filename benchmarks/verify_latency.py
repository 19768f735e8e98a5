"""Time the embedded engine's verify forward for 1..N rows by brute force: what the learnt tile boundaries must agree with.

    python benchmarks/verify_latency.py --rows 32 --out build/verify_latency.csv

Every round measures each row count once, in a shuffled order, so that a noisy second hits all alike.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray

from adaptive_spec.engines.embedded.kv_cache import PackedRows
from adaptive_spec.engines.embedded.models import MAX_K, Models, load_models
from adaptive_spec.engines.torch_device import device_name
from adaptive_spec.errors import BadInput


def measure(models: Models, max_tokens: int, context: int, rounds: int, seed: int = 0) -> NDArray[np.float64]:
    """Seconds [rounds, max_tokens] of a verify forward of 1..max_tokens rows, at most MAX_K + 1 rows a request."""
    target = models.target
    requests = -(-max_tokens // (MAX_K + 1))
    cache = target.new_cache(requests)
    random = np.random.default_rng(seed)
    forwards = []
    for tokens in range(1, max_tokens + 1):
        slots = np.arange(tokens) // (MAX_K + 1)
        within = np.arange(tokens) % (MAX_K + 1)
        bytes_ = torch.from_numpy(random.integers(32, 127, size=tokens)).to(target.device)
        forwards.append((bytes_, slots, context + within))
    seconds = np.empty((rounds, max_tokens))
    for r in range(-2, rounds):  # two rounds to warm up
        for index in random.permutation(max_tokens):
            tokens_, slots, positions = forwards[index]
            started = time.perf_counter()
            target.forward(cache, tokens_, PackedRows.of(cache, slots, positions)).argmax(-1).cpu()
            seconds[r, index] = time.perf_counter() - started
    return seconds


@click.command(help=__doc__)
@click.option("--rows", type=click.IntRange(2, 128), default=32, show_default=True, help="largest number of rows")
@click.option("--rounds", type=click.IntRange(3, 100_000), default=60, show_default=True)
@click.option(
    "--context", type=click.IntRange(1, 300), default=160, show_default=True, help="tokens of each request in the KV cache"
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(1, 64), default=1, show_default=True)
@click.option("--threshold", type=float, default=0.15, show_default=True, help="relative jump that makes a boundary")
@click.option("--out", type=click.Path(path_type=Path), help="CSV of medians and quantiles")
@click.option("--samples", type=click.Path(path_type=Path), help="CSV of all samples, as `adaptive-spec fit --latency` reads it")
def main(
    rows: int, rounds: int, context: int, device: str, threads: int, threshold: float, out: Path | None, samples: Path | None
) -> None:
    torch.set_num_threads(threads)
    try:
        models = load_models(device)
    except (BadInput, ValueError) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    milliseconds = measure(models, rows, context, rounds) * 1e3
    low, median, high = np.quantile(milliseconds, (0.1, 0.5, 0.9), axis=0)
    head = (
        f"# verify forward of {models.name}, qnnpack {models.target.qnnpack}, context {context}, {rounds} rounds\n"
        f"# {device_name(models.target.device)}, {os.cpu_count()} cores, {threads} thread(s), "
        f"{platform.platform()}, torch {torch.__version__}\n"
        f"# {' '.join([Path(sys.executable).name, *sys.argv])}\n"
    )
    table = "num_tokens,median_ms,p10_ms,p90_ms,samples\n" + "".join(
        f"{n},{median[n - 1]:.4f},{low[n - 1]:.4f},{high[n - 1]:.4f},{rounds}\n" for n in range(1, rows + 1)
    )
    click.echo(head + table, nl=False)
    jumps = median[1:] / median[:-1]
    found = ", ".join(f"{n + 1} (x{jumps[n]:.2f})" for n in np.flatnonzero(jumps >= 1.0 + threshold))
    click.echo(f"# boundaries at {threshold:g}: {found or 'none'}")
    if out is not None:
        out.write_text(head + table, encoding="utf-8")
    if samples is not None:
        lines = (f"{n + 1},{value:.5f}\n" for row in milliseconds for n, value in enumerate(row))
        samples.write_text(head + "num_tokens,latency_ms\n" + "".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
