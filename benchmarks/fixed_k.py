"""Goodput of the embedded engine at every fixed K, per kind of text and number of requests, and acceptance by position.

python benchmarks/fixed_k.py --concurrency 1,4,16
"""

from __future__ import annotations

import sys

import click
import numpy as np
import torch
from numpy.typing import NDArray

from adaptive_spec.engines.embedded.compare import Comparison, fixed_arms
from adaptive_spec.engines.embedded.decoder import Decoder, StepOutcome
from adaptive_spec.engines.embedded.load import PromptSource
from adaptive_spec.engines.embedded.models import MAX_K, load_models
from adaptive_spec.engines.embedded.requests import PrefixCache
from adaptive_spec.engines.embedded.text import KINDS
from adaptive_spec.engines.embedded.weights import load_prompts
from adaptive_spec.engines.torch_device import device_name
from adaptive_spec.errors import BadInput


@click.command(help=__doc__)
@click.option("--concurrency", default="1,4,16", show_default=True, help="numbers of requests at once")
@click.option("--blocks", type=click.IntRange(1), default=4, show_default=True, help="blocks of prompts per number and kind")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(1, 64), default=1, show_default=True)
def main(concurrency: str, blocks: int, device: str, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        models, prompts = load_models(device), load_prompts()
        numbers = [int(part) for part in concurrency.split(",")]
    except (BadInput, ValueError) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    click.echo(f"# {models.name} on {device_name(models.target.device)}, torch {torch.__version__}, {threads} thread(s)")
    prefixes = PrefixCache()
    for kind in KINDS:
        counts = np.zeros((2, MAX_K))

        def count(_decoder: Decoder, outcome: StepOutcome, counts: NDArray[np.float64] = counts) -> bool:
            if outcome.k == MAX_K:
                for row, lengths in enumerate((outcome.verify_len, outcome.accept_len)):
                    counts[row] += (np.arange(MAX_K) < lengths[:, None]).sum(axis=0)
            return True

        for number in numbers:
            comparison = Comparison(fixed_arms(models, prefixes, range(MAX_K + 1)), PromptSource(prompts, seed=0))
            for _ in range(blocks):
                comparison.run_block(kind, number, count)
            figures = "  ".join(f"K={k} {value:.0f}" for k, value in enumerate(comparison.goodput().values()))
            click.echo(f"{kind}, {number} at once, tokens/s: {figures}  lossless {comparison.lossless}")
        rates = " ".join(f"{rate:.3f}" for rate in counts[1] / counts[0])
        conditional = " ".join(f"{rate:.3f}" for rate in counts[1] / np.append(counts[0][0], counts[1][:-1]))
        click.echo(f"{kind}, accepted by position: {rates} (given all before: {conditional})")


if __name__ == "__main__":
    main()
