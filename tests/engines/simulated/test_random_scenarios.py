"""Scenarios drawn at random are valid, differ in every key, and can be repeated from their files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from adaptive_spec.engines.simulated.bench import run_policy
from adaptive_spec.engines.simulated.load_path import SlowSpells
from adaptive_spec.engines.simulated.random_scenarios import random_file, random_scenarios, save_random
from adaptive_spec.engines.simulated.scenario import Noise, load_scenario
from tests.engines.simulated.conftest import Small
from tests.support.processes import run_cli


def test_two_hundred_are_valid_and_cover_the_ranges() -> None:
    scenarios = random_scenarios(200, 7)
    files = [scenario.file for scenario in scenarios]
    assert sum(scenario.ragged for scenario in scenarios) == 100
    running = [entry.running[1] for file in files for entry in file.timeline]
    assert min(running) <= 2
    assert max(running) >= 150
    accept = [value for file in files for kind in file.classes.values() for value in kind.accept]
    assert min(accept) < 0.1
    assert max(accept) > 0.97
    assert min(file.mean_output_tokens for file in files) < 15
    assert max(file.mean_output_tokens for file in files) > 1500
    starts = [scenario.curve.ms[0] for scenario in scenarios]
    assert min(starts) < 3
    assert max(starts) > 120
    assert any((np.diff(scenario.curve.ms) < 0).any() for scenario in scenarios), "dips"
    assert any(file.latency.noise.spell_gap_s > 0 for file in files)
    assert any(file.latency.k_switch_ms > 0 for file in files)
    assert any(len({*event_times}) < len(event_times) for event_times in ([e.at_s for e in f.drift or []] for f in files))
    sets = [file.k_by_batch for file in files if file.k_by_batch]
    assert any(len(by_batch) > 1 for by_batch in sets)
    assert any(max(np.diff(ks), default=1) > 2 for by_batch in sets for ks in by_batch.values()), "gaps"


def test_a_scenario_depends_on_its_number_and_seed_alone() -> None:
    assert random_file(3, 1) == random_file(3, 1)
    assert random_file(3, 1) != random_file(4, 1)
    assert [scenario.name for scenario in random_scenarios(3, 9)] == ["random-9-0", "random-9-1", "random-9-2"]


def test_a_saved_scenario_is_the_drawn_one(tmp_path: Path) -> None:
    save_random(tmp_path / "new", 4, 11)
    for drawn in random_scenarios(4, 11):
        saved = load_scenario(tmp_path / "new" / f"{drawn.name}.yaml")
        assert saved.file == drawn.file
        np.testing.assert_array_equal(saved.curve.ms, drawn.curve.ms)


def test_the_command_draws_runs_and_saves(tmp_path: Path) -> None:
    out, folder = tmp_path / "out.json", tmp_path / "drawn"
    result = run_cli("bench", "--random", "1", "--seed", "5", "--policies", "static-0,oracle", "--save", folder, "--json", out)
    assert result.returncode == 0, result.stderr
    assert "geometric mean" in result.stdout
    assert [path.name for path in folder.iterdir()] == ["random-5-0.yaml"]
    (scenario,) = json.loads(out.read_text())["scenarios"]
    assert 0 < scenario["policies"]["static-0"]["expected_efficiency"] <= 1.05


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "SCENARIO.yaml: must be"),
        (("x.yaml", "--random", "2"), "--random: must come without"),
        (("x.yaml", "--save", "d"), "--save: must come with --random"),
        (("--random", "1", "--save", "/proc/no"), "--save: '/proc/no' cannot be written"),
    ],
)
def test_wrong_calls_are_one_line(arguments: tuple[str, ...], words: str) -> None:
    result = run_cli("bench", *arguments)
    assert (result.returncode, words in result.stderr) == (2, True), result.stderr


def test_spells_are_slow_for_their_time_and_alike_for_every_policy() -> None:
    noise = Noise(spell_gap_s=4.0, spell_s=1.0, spell_factor=2.0)
    one, two = (SlowSpells(noise, np.random.default_rng(1)) for _ in range(2))
    factors = np.array([one.factor(t) for t in np.arange(0.0, 2000.0, 0.01).tolist()])
    assert set(factors) == {1.0, 2.0}
    assert (factors == 2.0).mean() == pytest.approx(0.2, abs=0.03)
    assert [two.factor(t) for t in (0.0, 5.0, 9.0)] == [factors[0], factors[500], factors[900]]


def test_expected_goodput_is_that_of_the_counted_tokens(small: Small) -> None:
    scenario = small(duration_s=300)
    run = run_policy("static-2", scenario, 1)
    assert run.expected_goodput == pytest.approx(run.goodput, rel=0.01)


@pytest.mark.parametrize("granularity", ["batch", "request"])
def test_the_reference_finds_a_better_k_than_the_launch_k(small: Small, granularity: str) -> None:
    steep = {"latency.verify_curve": [[1, 10.0], [64, 400.0]], "granularity": granularity, "duration_s": 60}
    scenario = small(**steep, **{"classes.chat.accept": [0.2, 0.1, 0.1]})
    goodput = {name: run_policy(name, scenario, 1).expected_goodput for name in ("reference", "static-3", "static-0")}
    assert goodput["reference"] > 0.95 * max(goodput["static-0"], goodput["static-3"])
