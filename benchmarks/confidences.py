"""What draft confidences cost and what they gain.

Cost: the probability of the most likely token from logits, on one thread of this CPU. `softmax` writes all probabilities and
takes the largest; `logsumexp` is exp(max - logsumexp); `max_probability` is what the plugin does on a CPU; off costs nothing.
CPU time of the thread, variants in turn, medians; ratios are medians of the ratios within a turn. The Triton kernel needs a GPU.

Gain: goodput of the adaptive policy with confidences over that of the same policy on the same requests without, simulated.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import click

from adaptive_spec.engines.simulated.bench import run_scenarios
from adaptive_spec.engines.simulated.results import Result
from adaptive_spec.engines.simulated.scenario import load_scenario

VOCABULARIES = (32_000, 128_256, 151_936)
"""Llama 2, Llama 3, Qwen 2.5."""
ROWS = (1, 64, 256)
TURN_LOGITS = 1 << 26
"""Logits a variant handles over its turns, for about the same time at every size."""
FEWEST_TURNS = 5
SCENARIOS = ("chat-code-switching", "draft-collapse", "tiny-batch")
"""Batch granularity, drift among them; all scenarios of tests/scenarios take an hour."""
POLICY, WITHOUT = "adaptive", "without-confidences"


def cost(vocabulary: int, rows: int) -> dict[str, list[float]]:
    """CPU seconds by variant, one entry a turn."""
    import torch
    from torch import Tensor

    from adaptive_spec.engines.common.max_probability import max_probability

    def softmax(logits: Tensor) -> Tensor:
        return torch.softmax(logits.float(), dim=-1).amax(dim=-1)

    def logsumexp(logits: Tensor) -> Tensor:
        values = logits.float()
        return (values.amax(dim=-1) - torch.logsumexp(values, dim=-1)).exp()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    logits = 4.0 * torch.randn(rows, vocabulary)
    variants: dict[str, Callable[[Tensor], Tensor]] = {
        "softmax": softmax, "logsumexp": logsumexp, "max_probability": max_probability,
    }  # fmt: skip
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(1 + max(TURN_LOGITS // (rows * vocabulary), FEWEST_TURNS)):
        for name, variant in variants.items():
            begun = time.thread_time()
            variant(logits)
            if turn:  # the first is for warming up
                taken[name].append(time.thread_time() - begun)
    return taken


def gain(result: Result) -> float:
    """Goodput with confidences over goodput without, minus one."""
    return result.runs[POLICY].goodput / result.runs[WITHOUT].goodput - 1.0


@click.command()
@click.option("--scenario", "names", multiple=True, help="Scenarios of tests/scenarios, in place of the usual ones.")
@click.option("--seeds", default=2, show_default=True, type=click.IntRange(min=1), help="Pairs of runs a scenario.")
@click.option("--jobs", default=None, type=click.IntRange(min=1), help="Processes. Default: 2.")
def main(names: tuple[str, ...], seeds: int, jobs: int | None) -> None:
    """Print both."""
    print("cost, ms of CPU time per call on float32 logits, one thread (ratio to softmax)")
    for vocabulary in VOCABULARIES:
        for rows in ROWS:
            taken = cost(vocabulary, rows)
            parts = [
                f"{name} {1e3 * median(values):.2f} ({median(v / s for v, s in zip(values, taken['softmax'], strict=True)):.2f})"
                for name, values in taken.items()
            ]
            print(f"  vocabulary {vocabulary:7,}, rows {rows:3}: {', '.join(parts)}, off 0", flush=True)
    print("gain in goodput by confidences, simulated (efficiency is goodput over the oracle's)", flush=True)
    every = []
    for name in names or SCENARIOS:
        scenario = load_scenario(Path(__file__).parent.parent / "tests" / "scenarios" / f"{name}.yaml")
        results = [
            run_scenarios([scenario], f"{POLICY},{WITHOUT}", scenario.file.seed + 1000 * seed, False, jobs or 2)[0]
            for seed in range(seeds)
        ]
        gains = [gain(result) for result in results]
        every += gains
        both = [median(result.efficiency(result.runs[policy]) for result in results) for policy in (POLICY, WITHOUT)]
        print(
            f"  {name:24} ({scenario.file.granularity}): with {both[0]:.4f}, without {both[1]:.4f}, "
            f"gain {', '.join(f'{g:+.2%}' for g in gains)}",
            flush=True,
        )
    print(f"  median of {len(every)} pairs: {median(every):+.2%}")


if __name__ == "__main__":
    main()
