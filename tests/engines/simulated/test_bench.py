"""`adaptive-spec bench` as a process: what it prints and the JSON of the contract."""

from __future__ import annotations

import json

import pytest

from adaptive_spec.engines.simulated.bench import run_scenarios
from tests.engines.simulated.conftest import Small
from tests.engines.simulated.test_scenario import written
from tests.support.processes import run_cli

CHAT = {"chat": 1.0}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str]:  # type: ignore[type-arg]  # any JSON
    folder = tmp_path_factory.mktemp("bench")
    scenario = written(folder, {"drift": [{"at_s": 6, "latency_scale": 1.5}]})
    result = run_cli("bench", scenario, "--seed", "5", "--json", folder / "out.json", "--jobs", "1")
    assert result.returncode == 0, result.stderr
    return json.loads((folder / "out.json").read_text()), result.stdout


def test_the_json_is_that_of_the_contract(outcome: tuple[dict, str]) -> None:  # type: ignore[type-arg]  # any JSON
    document, _ = outcome
    assert document["version"] == 1
    (scenario,) = document["scenarios"]
    assert set(scenario) == {"name", "granularity", "policies"}
    assert (scenario["name"], scenario["granularity"]) == ("small", "batch")
    policies = scenario["policies"]
    assert list(policies) == ["adaptive", "oracle", "static-0", "static-1", "static-2", "static-3", "ema"]
    oracle = policies["oracle"]
    for policy in policies.values():
        assert set(policy) == {"goodput_tokens_per_s", "efficiency", "swaps", "steps", "phases"}
        assert policy["efficiency"] == pytest.approx(policy["goodput_tokens_per_s"] / oracle["goodput_tokens_per_s"])
        assert [phase["at_s"] for phase in policy["phases"]] == [0, 6]
        for phase, best in zip(policy["phases"], oracle["phases"], strict=True):
            assert set(phase) == {"at_s", "goodput_tokens_per_s", "efficiency", "steps_to_95pct"}
            assert phase["efficiency"] == pytest.approx(phase["goodput_tokens_per_s"] / best["goodput_tokens_per_s"])
    assert oracle["efficiency"] == 1.0
    assert [phase["steps_to_95pct"] for phase in oracle["phases"]] == [50, 50], "the first full window"
    assert policies["static-0"]["phases"][0]["steps_to_95pct"] is None


def test_the_table_says_that_it_is_simulated_and_what_stands_in(outcome: tuple[dict, str]) -> None:  # type: ignore[type-arg]
    _, text = outcome
    assert "small: simulated server, batch granularity, 10 s, seed 5" in text
    assert "cold start is in the clock" in text
    assert "ema: " in text
    for name in ("adaptive", "oracle", "static-3"):
        assert name in text


def test_processes_change_nothing(small: Small) -> None:
    scenario = small(timeline=[{"at_s": 0, "running": [2, 7], "mix": CHAT}])
    one, two = (run_scenarios([scenario], "adaptive,static-1", 3, False, jobs)[0].document() for jobs in (1, 2))
    assert one == two


def test_an_oracle_that_was_not_asked_for_measures_all_the_same(small: Small) -> None:
    (result,) = run_scenarios([small()], "static-1", None, False, 1)
    assert list(result.runs) == ["static-1"]
    assert 0.0 < result.efficiency(result.runs["static-1"]) <= 1.01


def test_variants_of_one_name_may_run_together(small: Small) -> None:
    first, second = run_scenarios([small(), small(max_k=2)], "static", None, False, 1)
    assert (len(first.runs), len(second.runs)) == (4, 3)


def test_an_event_in_the_last_step_is_a_phase_for_every_policy(small: Small) -> None:
    scenario = small(drift=[{"at_s": 9.999, "latency_scale": 1.1}, {"at_s": 9.9995, "latency_scale": 1.2}])
    (result,) = run_scenarios([scenario], "adaptive,static", None, False, 1)
    for policy in result.document()["policies"].values():
        assert [phase["at_s"] for phase in policy["phases"]] == [0, 9.999, 9.9995]
