"""The goals of the decisions are computed from results as they are worded."""

from __future__ import annotations

import pytest

from benchmarks.goals import Summary, geometric_mean, goal_rows


def summary(name: str, granularity: str = "batch", drifts: bool = True, **changes: object) -> Summary:
    fields: dict[str, object] = {
        "name": name, "granularity": granularity, "drifts": drifts,
        "efficiency": {"adaptive": 0.99, "ema": 0.75, "ema-wide": 0.88, "oracle": 1.0},
        "gains": {"ema": 1.32, "ema-wide": 1.125}, "worst_phase": 0.97, "best_static_name": "static-3", "best_static": 0.95,
        "steps_after_events": (50, 180, 300), "steps_from_cold": (60,), "swaps": 3.0, "probe_share": 0.004,
    }  # fmt: skip
    return Summary(**{**fields, **changes})  # type: ignore[arg-type]  # fields by name


def reached(rows: list, words: str) -> tuple[str, bool]:  # type: ignore[type-arg]  # GoalRow
    (row,) = [row for row in rows if row.words.startswith(words)]
    return row.reached, row.met


def test_goals_hold_when_everything_is_good() -> None:
    rows = goal_rows([summary("a"), summary("b", drifts=False, best_static=0.99, steps_after_events=())])
    assert all(row.met for row in rows)
    assert reached(rows, "steps to 95 %") == ("180 / 300", True)
    assert reached(rows, "against the best static K where something drifts") == ("+4.21%", True)
    assert reached(rows, "against SGLang's own policy (ema)")[0].startswith("+32.0% (the oracle +33.3%")


def test_each_goal_can_fail() -> None:
    bad = summary("bad", efficiency={"adaptive": 0.9, "ema": 0.89, "ema-wide": 0.9, "oracle": 1.0}, worst_phase=0.8,
                  gains={"ema": 1.01, "ema-wide": 1.0}, best_static=0.95, steps_after_events=(50, None))  # fmt: skip
    steady = summary("steady", drifts=False, best_static=1.01, probe_share=0.02, steps_after_events=(None,))
    rows = goal_rows([bad, steady])
    assert not any(row.met for row in rows)
    assert reached(rows, "efficiency") == ("0.9000 bad", False)
    assert reached(rows, "steps to 95 %") == ("inf / inf", False)


def test_granularities_are_judged_apart() -> None:
    rows = goal_rows([summary("a"), summary("r", "request", efficiency={"adaptive": 0.981})])
    efficiencies = {row.granularity: row.reached for row in rows if row.words.startswith("efficiency")}
    assert efficiencies == {"batch": "0.9900 a", "request": "0.9810 r"}
    assert not any(row.granularity == "request" and "SGLang" in row.words for row in rows)


def test_the_geometric_mean() -> None:
    assert geometric_mean([0.5, 2.0]) == pytest.approx(1.0)
