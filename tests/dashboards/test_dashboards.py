"""The committed dashboards: up to date, with metrics and labels of the exporter, and valid PromQL."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from adaptive_spec.sidecar.metrics import metrics_registry
from adaptive_spec.sidecar.view import CurrentView, View
from adaptive_spec.wire.engine_report import EngineReport
from dashboards.build import DASHBOARDS, FOLDER, document
from tests.sidecar.test_metrics import SNAPSHOT
from tests.support.monitoring import DEPLOY, needs, program
from tests.support.numbers_engine import engine_info

VARIABLES = {"$__rate_interval": "1m", "$__interval": "15s", "$job": ".*", "$model": ".*", "$gpu": ".*", "$instance": ".*"}
PANEL_TYPES = {"timeseries", "stat", "trend", "table"}
"""The panel types that dashboards/render can draw."""
CLIENT_METRICS = {"up", "process_resident_memory_bytes", "process_cpu_seconds_total"}


def load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return found


def expressions(dashboard: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(where, expression with its variables replaced) of every panel and annotation."""
    marks = [(f"annotation {a['name']}", a["expr"]) for a in dashboard["annotations"]["list"] if a.get("expr")]
    targets = [(f"{panel['title']} {t['refId']}", t["expr"]) for panel in dashboard["panels"] for t in panel["targets"]]
    for where, expr in marks + targets:
        for variable, value in VARIABLES.items():
            expr = expr.replace(variable, value)
        assert not re.search(r"\$[a-z_{]", expr), (where, expr)
        yield where, expr


def exported() -> dict[str, set[str]]:
    """Return the names of all samples of the exporter, with their labels."""
    current_view = CurrentView(0.0)
    report = EngineReport(1, "test", "attached", "", {"begin_step": 1}, {"adoptions": 1})
    current_view.view = View(
        5.0, SNAPSHOT, engine_info(), True, {"refit": 2}, "sweep", 4.0, report=report, annotations_sent=3,
        annotations_dropped={"refused": 1},
    )  # fmt: skip
    families = text_string_to_metric_families(generate_latest(metrics_registry(current_view)).decode())
    # A metric without samples yet is listed by the name of its family.
    names: dict[str, set[str]] = {}
    for family in families:
        names.setdefault(family.name + ("_total" if family.type == "counter" else ""), set())
        for sample in family.samples:
            names.setdefault(sample.name, set()).update(sample.labels)
    return names


@pytest.mark.parametrize("name", DASHBOARDS)
def test_committed_json_is_current(name: str) -> None:
    assert (FOLDER / f"{name}.json").read_text(encoding="utf-8") == document(name), "run `make dashboards`"


def test_no_other_json_is_in_the_folder() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == set(DASHBOARDS)


@pytest.mark.parametrize("name", DASHBOARDS)
def test_every_metric_exists_in_the_exporter(name: str) -> None:
    known = exported()
    used = {metric for _, expr in expressions(load(name)) for metric in re.findall(r"\b(?:adaptive_spec|process)_\w+", expr)}
    assert len(used) > 5
    assert used - known.keys() <= CLIENT_METRICS, "the dashboard uses a metric that is not exported"


def test_every_metric_of_the_rules_exists_in_the_exporter() -> None:
    known = exported()
    rules = [
        r for path in (DEPLOY / "rules").glob("*.yaml") for g in yaml.safe_load(path.read_text())["groups"] for r in g["rules"]
    ]
    recorded = {rule["record"] for rule in rules if "record" in rule}
    assert recorded
    for rule in rules:
        names = re.findall(r"[a-z_]+:[\w:]+|\b(?:adaptive_spec_\w+|up)\b", rule["expr"])
        assert names, rule
        for name in names:
            assert name in (recorded if ":" in name else {*known, *CLIENT_METRICS}), (rule, name)


@pytest.mark.parametrize("name", DASHBOARDS)
def test_labels_in_legends_exist(name: str) -> None:
    known = exported()
    for panel in load(name)["panels"]:
        for target in panel["targets"]:
            metrics = re.findall(r"adaptive_spec_\w+", target["expr"])
            labels = {label for metric in metrics for label in known.get(metric, ())} | {"job", "instance"}
            labels |= set(re.findall(r', "(\w+)"(?:, "[^"]*"){3}\)', target["expr"]))  # the new label of a label_replace
            for label in re.findall(r"{{(\w+)}}", target.get("legendFormat", "")):
                assert label in labels, (panel["title"], label)


@needs("promtool")
@pytest.mark.parametrize("name", DASHBOARDS)
def test_prometheus_parses_every_expression(name: str, tmp_path: Path) -> None:
    rules = [{"record": f"checked:{i}", "expr": expr} for i, (_, expr) in enumerate(expressions(load(name)))]
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "checked", "rules": rules}]}))
    result = subprocess.run([str(program("promtool")), "check", "rules", str(path)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", DASHBOARDS)
def test_form(name: str) -> None:
    dashboard = load(name)
    assert dashboard["uid"] == f"adaptive-spec-{name}"
    assert [v["name"] for v in dashboard["templating"]["list"]] == ["datasource", "job", "engine", "model", "gpu", "instance"]
    assert {a["name"] for a in dashboard["annotations"]["list"]} >= {"Swaps", "Drift", "Event texts"}
    taken: set[tuple[int, int]] = set()
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in dashboard["panels"]:
        assert panel["type"] in PANEL_TYPES
        assert panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "$datasource"}
        g = panel["gridPos"]
        assert g["x"] + g["w"] <= 24
        cells = {(x, y) for x in range(g["x"], g["x"] + g["w"]) for y in range(g["y"], g["y"] + g["h"])}
        assert not cells & taken, f"{panel['title']} overlaps another panel"
        taken |= cells
