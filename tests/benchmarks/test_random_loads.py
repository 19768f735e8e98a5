"""What `make benchmarks ARGS="--seed S"` says of random scenarios."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from rich.console import Console

from adaptive_spec.engines.simulated.random_scenarios import random_scenarios
from adaptive_spec.engines.simulated.results import Phase, Result, Run
from benchmarks.random_loads import better_peers, better_table


def result(**goodputs: float) -> Result:
    """One scenario in which each policy gave so many tokens/s; the oracle 100."""
    (scenario,) = random_scenarios(1, 3)

    def run(goodput: float) -> Run:
        return Run(1, 1.0, 1, 0, (Phase(0.0, expected_tokens=goodput, expected_s=1.0),))

    return Result(scenario, {name.replace("_", "-"): run(goodput) for name, goodput in goodputs.items()}, run(100.0))


def test_a_peer_is_named_when_it_is_better_by_more_than_one_percent() -> None:
    found = better_peers(result(adaptive=90.0, reference=90.8, ema=93.6, ema_wide=99.0, oracle=100.0))
    assert list(found) == ["ema-wide", "ema"]
    assert abs(found["ema"] - 0.04) < 1e-9


def test_the_table_names_only_scenarios_with_a_better_peer() -> None:
    console = Console(record=True, width=150)
    console.print(better_table([result(adaptive=90.0, ema=99.0), result(adaptive=99.0, ema=99.5)]))
    text = console.export_text()
    assert "1 of 2" in text
    assert "ema +10.0%" in text
    assert "0.9000" in text
    assert "0.9900" not in text


def test_a_count_without_a_seed_is_refused() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.decisions", "--random", "4"],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "--random: must come with --seed" in ended.stderr
