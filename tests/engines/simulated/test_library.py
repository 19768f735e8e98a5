"""Acceptance: efficiencies on the scenario library must fall in these ranges, each on the scenario's own seed.

The ranges of the fixed policies check the simulator: three scenarios have figures from an independent simulation (a100-8b-steady:
best static 1.000, SGLang's policy 0.970; b300-moe-ragged: best static 0.940; h100-70b-chat-to-code: best static about 0.95,
SGLang's policy about 0.71). Those of `adaptive` are the goals of the project (0.985 at batch, 0.98 at request granularity);
with one or two requests, or where the whole curve changes, a single seed is luck by one percent either way.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from adaptive_spec.engines.simulated.bench import run_scenarios
from adaptive_spec.engines.simulated.results import Result
from adaptive_spec.engines.simulated.scenario import load_scenario

FOLDER = Path(__file__).parents[2] / "scenarios"
BATCH, REQUEST = (0.985, 1.01), (0.98, 1.005)
LUCK = 1.01
"""A policy is not better than the oracle but by luck."""

RANGES: dict[str, dict[str, tuple[float, float]]] = {
    "a100-70b-tp4-boundaries": {"adaptive": BATCH, "static-3": (0.94, 0.98), "ema": (0.70, 0.77)},
    "a100-8b-steady": {"adaptive": (0.99, 1.005), "static-4": (0.998, 1.0), "ema": (0.962, 0.98), "ema-wide": (0.91, 0.96)},
    "b300-batch-nonmonotone": {"adaptive": BATCH, "static-3": (0.975, 0.997), "ema": (0.67, 0.75)},
    "b300-moe-ragged": {"adaptive": REQUEST, "static-7": (0.92, 0.95)},
    "chat-code-switching": {"adaptive": BATCH, "static-7": (0.91, 0.96), "offline-files": (0.78, 0.85)},
    "day-night": {"adaptive": BATCH, "static-3": (0.94, 0.98), "startup-profile": (0.985, LUCK)},
    "draft-collapse": {"adaptive": BATCH, "static-3": (0.88, 0.95), "goodput-bandit": (0.8, 0.9)},
    "draft-collapse-ragged": {"adaptive": REQUEST, "static-7": (0.89, 0.94)},
    "driver-change": {"adaptive": (0.975, 1.01), "static-3": (0.89, 0.95), "startup-profile": (0.93, 0.98)},
    "fp8-jumps": {"adaptive": BATCH, "static-3": (0.96, 0.99), "offline-files": (0.93, 0.97)},
    "h100-70b-chat-to-code": {"adaptive": BATCH, "static-3": (0.93, 0.96), "static-4": (0.7, 0.8), "ema": (0.69, 0.73)},
    "h100-70b-steady": {"adaptive": (0.99, 1.005), "static-5": (0.99, 1.001), "ema": (0.73, 0.79)},
    "long-context": {"adaptive": BATCH, "static-3": (0.965, 0.99), "ema": (0.84, 0.89)},
    "miscalibrated-draft": {"adaptive": REQUEST, "static-5": (0.92, 0.95), "offline-files": (0.76, 0.82)},
    "moe-ramp-plateau": {"adaptive": BATCH, "static-3": (0.98, 0.995), "ema": (0.80, 0.87)},
    "noisy-neighbour": {"adaptive": BATCH, "static-3": (0.975, 0.993), "ema": (0.83, 0.88)},
    "ragged-steady": {"adaptive": REQUEST, "static-3": (0.93, 0.955), "startup-profile": (0.96, 0.985)},
    "saturated": {"adaptive": BATCH, "static-1": (0.985, 1.003), "ema-wide": (0.90, 0.95)},
    "swinging-batch": {"adaptive": (0.985, 1.02), "static-3": (0.965, 0.995), "ema": (0.70, 0.76)},
    "thermal-drift": {"adaptive": BATCH, "static-2": (0.91, 0.95), "offline-files": (0.99, LUCK)},
    "tiny-batch": {"adaptive": (0.97, 1.02), "static-5": (0.90, 0.96), "goodput-bandit": (0.89, 0.94)},
}


def test_every_scenario_has_its_ranges() -> None:
    assert sorted(RANGES) == sorted(path.stem for path in FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("name", RANGES)
def test_efficiencies_fall_in_their_ranges(name: str) -> None:
    scenario = load_scenario(FOLDER / f"{name}.yaml")
    result = run_scenarios([scenario], ",".join(RANGES[name]), None, False, 1)[0]
    reached = {policy: result.efficiency(run) for policy, run in result.runs.items()}
    outside = {
        policy: value for policy, value in reached.items() if not RANGES[name][policy][0] <= value <= RANGES[name][policy][1]
    }
    assert not outside, f"{outside} not in {RANGES[name]}"
    assert result.runs["adaptive"].failures == 0
    if name == "draft-collapse":
        the_draft_breaks_and_recovers(result)


def the_draft_breaks_and_recovers(result: Result) -> None:
    """K goes to 0 and comes back, soon, while looking for the recovery costs little."""
    run = result.runs["adaptive"]
    broken, recovered = 1, 2
    assert result.efficiency(run, broken) >= 0.97
    for phase, most in ((broken, 400), (recovered, 800)):
        steps = run.phases[phase].good_after
        assert steps is not None
        assert steps <= most
    assert run.probe_share is not None
    assert run.probe_share <= 0.02
