"""Adaptive K against every fixed K and against vLLM's own static schedule, on a real vLLM server on the CPU kit.

    python -m benchmarks.vllm_server [--rounds N] [--models models|models-informative|models-64m] [--lengths on|off] [--json OUT]

Every round sends the same prompts to every arm, in rotated order: the adaptive policy, each K pinned, and the launch schedule
alone (the sidecar in shadow). --lengths off: one K for all requests of a batch. Prints tokens per second of each arm, and
median and quartiles over rounds of the adaptive arm's ratio to it; a ratio is taken inside a round, so that a slower machine in
one round does not count.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click

from adaptive_spec.client.sidecar import ControlClient
from adaptive_spec.client.vllm import ServerApi
from adaptive_spec.engines.common.server_demonstration import DemoServer, Prompt, free_port
from adaptive_spec.engines.vllm.cpu_kit import CANDIDATES, MODEL, CpuKit
from adaptive_spec.errors import BadInput

STATIC = [[1, 2, 5], [3, 6, 3], [7, 12, 1], [13, 16, 0]]
"""A static schedule as one would write by hand: shorter drafts for larger batches."""
MIXES = {"mixed": "abcdef", "predictable": "aabc", "erratic": "deff"}
CONCURRENCIES = (1, 4, 8)
TOKENS = (40, 100)
WARM_UP_S, SWEEP_TIMEOUT_S = 20.0, 300.0
"""Traffic before the first round: at least so long, and until the sweep has ended."""


class Arms:
    """Tokens per second of each arm, by round."""

    def __init__(self, client: ControlClient, api: ServerApi) -> None:
        self._client, self._api = client, api
        self.names = ["adaptive", "schedule", *(f"static-{k}" for k in CANDIDATES)]
        self.rates: dict[str, list[float]] = {name: [] for name in self.names}
        self.wrong = 0

    def round(self, number: int, prompts: Sequence[tuple[Prompt, int]], concurrency: int) -> None:
        turn = number % len(self.names)
        for name in self.names[turn:] + self.names[:turn]:
            if name == "schedule":
                self._client.send("shadow")
            elif name == "adaptive":
                self._client.send("resume")
            else:
                self._client.send("pin", int(name.removeprefix("static-")))
            time.sleep(0.6)  # a policy is published every 0.5 s
            self.rates[name].append(self._rate(prompts, concurrency))
            if name.startswith("static-"):
                self._client.send("unpin")

    def _rate(self, prompts: Sequence[tuple[Prompt, int]], concurrency: int) -> float:
        begun_s = time.perf_counter()
        with ThreadPoolExecutor(concurrency) as pool:
            outputs = list(pool.map(lambda job: self._api.generate(job[0].text, job[1]).ids, prompts))
        seconds = time.perf_counter() - begun_s
        self.wrong += sum(ids != prompt.continuation(n) for ids, (prompt, n) in zip(outputs, prompts, strict=True))
        return sum(map(len, outputs)) / seconds

    def result(self) -> dict[str, dict[str, Any]]:
        """By arm: mean tokens/s, and quartiles of the ratio of adaptive to it, taken round by round."""
        adaptive = self.rates["adaptive"]
        return {
            name: {
                "tokens_per_s": statistics.fmean(rates),
                "adaptive_ratio": statistics.quantiles([a / r for a, r in zip(adaptive, rates, strict=True)], n=4),
                "rounds": rates,
            }
            for name, rates in self.rates.items()
        }


@click.command(help=__doc__)
@click.option("--rounds", type=click.IntRange(2), default=9, show_default=True)
@click.option("--models", type=click.Choice(["models", "models-informative", "models-64m"]), default="models-informative")
@click.option("--lengths", type=click.Choice(["on", "off"]), default="on", show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="File to write the results to.")
def main(rounds: int, models: str, lengths: str, seed: int, json_file: Path | None) -> None:
    kit, port, dice = CpuKit(), free_port(), random.Random(seed)
    kit.install(*(("--large",) if models == "models-64m" else ()))
    folder = Path(tempfile.mkdtemp(prefix="adaptive-spec-benchmark-"))
    config = kit.speculative_config("eagle", models)
    assert config is not None
    config["num_speculative_tokens_per_batch_size"] = STATIC
    flags = [
        *kit.server_flags(port, "", models), "--speculative-config", json.dumps(config),
    ]  # fmt: skip
    os.environ["ADAPTIVE_SPEC_BATCH_SCORES"] = "auto" if lengths == "on" else "off"
    runtime_dir = folder / "run"
    command = kit.command(
        "adaptive-spec", "serve", "--engine", "vllm", "--mode", "active", "--runtime-dir", str(runtime_dir), "--port", "0",
        "--profile-dir", str(folder / "profiles"), "--", *flags,
    )  # fmt: skip
    api = ServerApi(f"http://127.0.0.1:{port}", model=MODEL)
    server = DemoServer("vLLM", command, api, runtime_dir, folder / "server.log")
    try:
        server.wait(threading.Event())
        client = ControlClient.find(runtime_dir, None, None)
        arms, begun_s = Arms(client, api), time.monotonic()
        while (client.status()["mode"] == "sweep" or time.monotonic() < begun_s + WARM_UP_S) and (
            time.monotonic() < begun_s + SWEEP_TIMEOUT_S
        ):
            for concurrency in CONCURRENCIES:
                arms._rate(_prompts(dice, "mixed", 2 * concurrency), concurrency)
        for number in range(rounds):
            mix, concurrency = list(MIXES)[number % 3], CONCURRENCIES[number // 3 % 3]
            arms.round(number, _prompts(dice, mix, 4 * concurrency), concurrency)
            click.echo(
                f"round {number + 1}: {mix} x{concurrency}: " + ", ".join(f"{n} {r[-1]:.0f}" for n, r in arms.rates.items())
            )
    finally:
        server.end()
    result = {"models": models, "lengths": lengths, "rounds": rounds, "wrong": arms.wrong, "arms": arms.result()}
    for name, figures in arms.result().items():
        low, middle, high = figures["adaptive_ratio"]
        ratio = f"median {middle:.3f}, quartiles {low:.3f} to {high:.3f}"
        click.echo(f"{name:10} {figures['tokens_per_s']:8.0f} tokens/s   adaptive / it: {ratio}")
    click.echo(f"outputs that differ from the target's: {arms.wrong}")
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1))


def _prompts(dice: random.Random, mix: str, count: int) -> list[tuple[Prompt, int]]:
    return [(Prompt(dice.choice(MIXES[mix]), dice.randrange(128)), dice.randint(*TOKENS)) for _ in range(count)]


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        sys.exit(str(error))
