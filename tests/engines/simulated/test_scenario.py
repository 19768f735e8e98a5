"""Scenario files: what they mean, and that every fault is one line naming the field."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from adaptive_spec.engines.simulated.scenario import load_scenario
from adaptive_spec.errors import BadInput
from tests.engines.simulated.conftest import SMALL, Small
from tests.support.processes import assert_one_line, run_cli

LIBRARY = Path(__file__).parents[2] / "scenarios"


class _NoAliases(yaml.SafeDumper):
    """Writes a value that occurs twice twice: a scenario may hold no alias."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def written(tmp_path: Path, changes: dict[str, Any]) -> Path:
    """The small scenario in a file, with dotted keys changed; None removes a key, list places are numbers."""
    data: Any = copy.deepcopy(SMALL)
    for dotted, value in changes.items():
        *path, last = dotted.split(".")
        inner = data
        for key in path:
            inner = inner[int(key)] if isinstance(inner, list) else inner[key]
        if isinstance(inner, list):
            inner[int(last)] = value
        elif value is REMOVED:
            del inner[last]
        else:
            inner[last] = value
    path_ = tmp_path / "bad.yaml"
    path_.write_text(yaml.dump(data, Dumper=_NoAliases))
    return path_


REMOVED = object()
CHAT = {"chat": 1.0}
BAD: list[tuple[str, Any, str]] = [
    ("name", "", "name"),
    ("name", REMOVED, "name: is missing"),
    ("granularity", "token", "granularity"),
    ("max_k", 0, "max_k"),
    ("max_k", 33, "max_k"),
    ("max_k", 2.5, "max_k"),
    ("max_k", "7", "max_k"),
    ("duration_s", 0, "duration_s"),
    ("duration_s", float("nan"), "duration_s"),
    ("seed", -1, "seed"),
    ("mean_output_tokens", 0.5, "mean_output_tokens"),
    ("k_by_batch", {2: [1]}, "k_by_batch"),
    ("k_by_batch", {1: []}, "k_by_batch"),
    ("k_by_batch", {1: [3, 1]}, "k_by_batch"),
    ("k_by_batch", {1: [9]}, "k_by_batch.1: must be <="),
    ("latency.k_switch_ms", -1, "latency.k_switch_ms"),
    ("colour", 1, "colour: unknown key"),
    ("latency.colour", 1, "latency.colour: unknown key"),
    ("latency.noise.colour", 1, "latency.noise.colour: unknown key; must be one of sigma"),
    ("classes.chat.colour", 1, "classes.chat.colour: unknown key"),
    ("latency", REMOVED, "latency: is missing"),
    ("latency.verify_curve", REMOVED, "latency.verify_curve: is missing"),
    ("latency.verify_curve", "nowhere.csv", "latency.verify_curve"),
    ("latency.verify_curve", [], "latency.verify_curve"),
    ("latency.verify_curve", [[1, 10.0]], "latency.verify_curve"),
    ("latency.verify_curve", [[2, 10.0], [1, 11.0]], "latency.verify_curve: token counts must ascend, got 1 after 2"),
    ("latency.verify_curve", [[1, 10.0], [1, 11.0]], "latency.verify_curve"),
    ("latency.verify_curve", [[1, 10.0], [8, -1.0]], "latency.verify_curve.1"),
    ("latency.verify_curve", [[1.5, 10.0], [8, 11.0]], "latency.verify_curve.0"),
    ("latency.verify_curve", [[1, 10.0, 3], [8, 11.0]], "latency.verify_curve"),
    ("latency.verify_curve", [[1, 10.0], [8, 1.0]], "latency.verify_curve"),
    ("latency.graph_batch_sizes", [4, 2], "latency.graph_batch_sizes"),
    ("latency.graph_batch_sizes", [0, 2], "latency.graph_batch_sizes"),
    ("latency.graph_batch_sizes", [], "latency.graph_batch_sizes"),
    ("latency.token_buckets", [8, 8], "latency.token_buckets"),
    ("latency.draft_fixed_ms", -0.1, "latency.draft_fixed_ms"),
    ("latency.draft_ms_per_step", -0.1, "latency.draft_ms_per_step"),
    ("latency.context_ms_per_1k_tokens", -1, "latency.context_ms_per_1k_tokens"),
    ("latency.overhead_ms", "much", "latency.overhead_ms"),
    ("latency.noise.sigma", -0.1, "latency.noise.sigma"),
    ("latency.noise.spike_rate", 1.1, "latency.noise.spike_rate"),
    ("latency.noise.spike_factor", 0.5, "latency.noise.spike_factor"),
    ("classes", {}, "classes"),
    ("classes.chat.accept", [0.7, 0.6], "classes.chat.accept: must have at least max_k = 3 values, got 2"),
    ("classes.chat.accept", [0.7, 0.6, 1.2], "classes.chat.accept"),
    ("classes.chat.accept", [0.7, 0.6, 0.0], "classes.chat.accept"),
    ("classes.chat.accept", 0.7, "classes.chat.accept"),
    ("classes.chat.concentration", 0, "classes.chat.concentration"),
    ("classes.chat.request_spread", -1, "classes.chat.request_spread"),
    ("classes.chat.context", -5, "classes.chat.context"),
    ("classes.chat.score_slope", 0, "classes.chat.score_slope"),
    ("classes.chat.score_bias", float("inf"), "classes.chat.score_bias"),
    ("timeline", [], "timeline"),
    ("timeline.0.at_s", 5, "timeline.0.at_s: must be 0, got 5"),
    ("timeline.0.running", 0, "timeline.0.running"),
    ("timeline.0.running", [5, 3], "timeline.0.running"),
    ("timeline.0.running", [1, 2, 3], "timeline.0.running"),
    ("timeline.0.running", 2.5, "timeline.0.running"),
    ("timeline.0.running", 100_000, "timeline.0.running"),
    ("timeline.0.mix", {"poetry": 1.0}, "timeline.0.mix.poetry: unknown class: must be one of chat, code"),
    ("timeline.0.mix", {"chat": 0.5}, "timeline.0.mix"),
    ("timeline.0.mix", {"chat": 1.5, "code": -0.5}, "timeline.0.mix"),
    ("timeline.0.mix", {}, "timeline.0.mix"),
    (
        "timeline",
        [{"at_s": 0, "running": 2, "mix": CHAT}, {"at_s": 0, "running": 3, "mix": CHAT}],
        "timeline.1.at_s: must be > 0, that of the entry before, got 0",
    ),
    ("drift", [{"at_s": 5}], "drift.0"),
    ("drift", [{"at_s": -5, "latency_scale": 2}], "drift.0.at_s"),
    ("drift", [{"at_s": 5, "latency_scale": 0}], "drift.0.latency_scale"),
    ("drift", [{"at_s": 5, "verify_curve": "nowhere.csv"}], "drift.0.verify_curve"),
    ("drift", [{"at_s": 5, "class": "poetry", "score_slope": 2}], "drift.0.class"),
    ("drift", [{"at_s": 5, "class": "chat"}], "drift.0"),
    ("drift", [{"at_s": 5, "score_slope": 2}], "drift.0"),
    ("drift", [{"at_s": 5, "class": "chat", "accept": [0.5]}], "drift.0.accept"),
    ("drift", [{"at_s": 5, "class": "chat", "colour": 1}], "drift.0.colour: unknown key; must be one of at_s, latency_scale"),
]


@pytest.mark.parametrize(("key", "value", "words"), BAD, ids=[f"{key}-{n}" for n, (key, _, _) in enumerate(BAD)])
def test_a_bad_field_is_one_line_that_names_it(tmp_path: Path, key: str, value: Any, words: str) -> None:
    path = written(tmp_path, {key: value})
    with pytest.raises(BadInput) as error:
        load_scenario(path)
    assert f"{path}: {words}" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_command_says_it_on_one_line_and_exits_2(tmp_path: Path) -> None:
    path = written(tmp_path, {"timeline.0.mix": {"poetry": 1.0}})
    assert_one_line(run_cli("bench", path), "timeline.0.mix.poetry")
    assert_one_line(run_cli("bench", tmp_path / "none.yaml"), "none.yaml")
    good = written(tmp_path, {})
    assert_one_line(run_cli("bench", good, "--policies", "guess"), "--policies", "guess", "static-3")
    assert_one_line(run_cli("bench", good, "--json", tmp_path / "no" / "where.json"), "--json")
    (tmp_path / "twice.yaml").write_text("name: a\nname: b\n")
    assert_one_line(run_cli("bench", tmp_path / "twice.yaml"), "line 2", "duplicate key")


def test_the_curve_is_that_of_the_next_listed_count_and_goes_on_in_a_line(small: Small) -> None:
    table = small().curve.table(80)
    assert table[[1, 2, 16, 17, 32, 33, 64]].tolist() == [10.0, 12.0, 12.0, 20.0, 20.0, 30.0, 30.0]
    assert np.allclose(table[[65, 80]], [30.0 + 10 / 32, 35.0])


def test_a_curve_may_fall_in_between(small: Small) -> None:
    assert small(**{"latency.verify_curve": [[1, 10.0], [16, 9.0], [64, 20.0]]}).curve.table(64)[16] == 9.0


def test_phases_start_at_every_event_before_the_end(small: Small) -> None:
    scenario = small(
        timeline=[{"at_s": 0, "running": 2, "mix": CHAT}, {"at_s": 4, "running": [2, 5], "mix": CHAT}],
        drift=[{"at_s": 7, "latency_scale": 2}, {"at_s": 4, "latency_scale": 3}, {"at_s": 99, "latency_scale": 1}],
    )
    assert scenario.phase_starts == (0.0, 4.0, 7.0)
    assert [event.at_s for event in scenario.drift] == [4.0, 7.0, 99.0]


def test_the_library_has_many_scenarios_each_with_its_source() -> None:
    paths = sorted(LIBRARY.glob("*.yaml"))
    assert len(paths) >= 13
    for path in paths:
        scenario = load_scenario(path)
        assert scenario.name == path.stem
        assert path.read_text().startswith("#")
