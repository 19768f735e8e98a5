"""The shipped rules and configurations: promtool's cases, and the alert that matters most from engine to webhook."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.monitoring import DEPLOY, ROOT, Api, Webhook, alertmanager, needs, program, prometheus, running, scaled
from tests.support.processes import SidecarProcess, run_cli

RULES = sorted((DEPLOY / "rules").glob("*.yaml"))
NAMES = {
    "CalibrationDecay", "LatencyModelDrift", "PredictedGainNotRealised", "PolicyFlapping", "PolicyStale", "SidecarDown",
    "EngineDetached", "ObservationsDropped", "StuckInFallback", "PluginNotLoaded", "PolicyIgnored", "DraftsWorthless",
    "AnnotationsRefused",
}  # fmt: skip


def _alerts() -> list[dict[str, Any]]:
    groups = [g for path in RULES for g in yaml.safe_load(path.read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"] if "alert" in rule]


def _run(*command: str | Path | None) -> str:
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@needs("promtool")
def test_every_case_of_every_alert() -> None:
    """Each alert fires in one case, after its `for` and not before, and stays silent in others."""
    assert "SUCCESS" in _run(program("promtool"), "test", "rules", DEPLOY / "tests" / "alerts.test.yaml")
    cases = yaml.safe_load((DEPLOY / "tests" / "alerts.test.yaml").read_text())["tests"]
    checks = [check for case in cases for check in case.get("alert_rule_test", [])]
    rules = {(rule["alert"], rule["labels"].get("signal")) for rule in _alerts()}
    assert rules == {(c["alertname"], alert["exp_labels"].get("signal")) for c in checks for alert in c["exp_alerts"]}
    assert {name for name, _ in rules} == {c["alertname"] for c in checks if not c["exp_alerts"]} == NAMES


@needs("promtool")
def test_a_broken_rule_fails_its_case(tmp_path: Path) -> None:
    for folder in ("rules", "tests"):
        (tmp_path / folder).mkdir()
        for path in (DEPLOY / folder).glob("*.yaml"):
            (tmp_path / folder / path.name).write_text(path.read_text().replace("[10m]) > 0.05", "[10m]) > 0.5"))
    command = [str(program("promtool")), "test", "rules", str(tmp_path / "tests" / "alerts.test.yaml")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert "CalibrationDecay by ECE" in result.stdout + result.stderr


@needs("promtool", "amtool")
def test_configurations() -> None:
    assert "SUCCESS" in _run(program("promtool"), "check", "config", DEPLOY / "prometheus.yml")
    assert "SUCCESS" in _run(program("amtool"), "check-config", DEPLOY / "alertmanager.yml")


def test_every_alert_has_severity_summary_with_a_value_and_a_runbook() -> None:
    for rule in _alerts():
        name = rule["alert"]
        assert rule["labels"]["severity"] in ("warning", "critical"), name
        assert "$value" in rule["annotations"]["summary"], name
        assert rule["annotations"]["runbook"] == f"docs/runbooks/{name}.md", name
        text = (ROOT / rule["annotations"]["runbook"]).read_text()
        assert text.startswith(f"# {name}\n"), name
        for part in ("## What it means", "## What to look at", "## What to do"):
            assert part in text, name
        assert "for" in rule, name
    pages = {path.stem for path in (ROOT / "docs" / "runbooks").glob("*.md")} - {"README"}
    assert pages == NAMES == {rule["alert"] for rule in _alerts()}


def test_shortened_rules_differ_in_times_only() -> None:
    text = "expr: rate(x_total[10m])\n    for: 5m\n    interval: 5m\n"
    assert scaled(text, 60) == "expr: rate(x_total[10s])\n    for: 5s\n    interval: 5m\n"


@needs("prometheus", "alertmanager")
def test_a_lying_draft_raises_calibration_decay_and_an_honest_one_ends_it(tmp_path: Path) -> None:
    """Engine, sidecar, Prometheus, Alertmanager and a webhook, all real; the shipped rules run 60 times as fast."""
    pytest.importorskip("torch", reason="the embedded engine needs torch")
    runtime_dir, lie = tmp_path / "runtime", tmp_path / "lie"
    for folder in ("prometheus", "alertmanager", "profiles"):
        (tmp_path / folder).mkdir()
    runtime_dir.mkdir(mode=0o700)
    config = tmp_path / "config.yaml"
    config.write_text("controller: {sweep: {max_tokens: 16, max_steps: 200}}\n")
    engine = [sys.executable, "-m", "tests.support.lying_engine", "--runtime-dir", str(runtime_dir), "--lie", str(lie)]
    with (
        SidecarProcess(runtime_dir, tmp_path / "profiles", "--config", str(config)) as sidecar,
        running(engine, tmp_path / "engine.log"),
        Webhook() as webhook,
        alertmanager(tmp_path / "alertmanager", webhook.url) as am,
        prometheus(tmp_path / "prometheus", [sidecar.url.removeprefix("http://")], am, "500ms", 60) as api,
    ):
        sidecar.wait_status(lambda s: s["mode"] == "active", "the sweep to end")
        # With K free, the policy would answer a lie by drafting nothing, and no lie would be seen any more.
        assert run_cli("ctl", "pin", "3", "--runtime-dir", runtime_dir).returncode == 0
        steps = sidecar.status()["decode_steps"]
        sidecar.wait_status(lambda s: s["decode_steps"] > steps + 1000, "an honest draft to be learnt")
        _patiently(lambda: not _firing(api), "an honest draft to raise no alert")
        webhook.alerts.clear()

        lie.touch()
        alert = _patiently(lambda: webhook.first("CalibrationDecay", "firing"), "the webhook to hear of the lie")
        assert alert["labels"]["severity"] == "warning"
        assert alert["labels"]["model"] == sidecar.status()["engine"]["model"]
        assert "%" in alert["annotations"]["summary"]
        assert alert["annotations"]["runbook"] == "docs/runbooks/CalibrationDecay.md"

        lie.unlink()
        _patiently(
            lambda: not _firing(api) and _last_word(webhook) == {"resolved"}, "the alert to end once acceptance is learnt again"
        )
        _patiently(lambda: sidecar.status()["calibration"]["ece"] < 0.05, "a small calibration error")


def _firing(api: Api) -> list[Any]:
    return api.query('ALERTS{alertname="CalibrationDecay", alertstate="firing"}')


def _last_word(webhook: Webhook) -> set[str]:
    """What was last said of each CalibrationDecay, by signal."""
    said = {a["labels"]["signal"]: a["status"] for a in webhook.alerts if a["labels"]["alertname"] == "CalibrationDecay"}
    return set(said.values())


def _patiently(condition: Any, what: str, patience_s: float = 240.0) -> Any:
    """Like `wait_for`, for what takes some hundreds of decode steps on a machine that others use too."""
    deadline_s = time.monotonic() + patience_s
    while time.monotonic() < deadline_s:
        if value := condition():
            return value
        time.sleep(0.2)
    raise AssertionError(f"in vain: waited for {what}")
