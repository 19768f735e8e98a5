"""`make stack`: targets scraped, rules loaded, no evaluation fails, and every dashboard expression returns data."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from dashboards.build import DASHBOARDS
from tests.dashboards.test_dashboards import expressions, load
from tests.support.monitoring import ROOT, Api, free_port, needs
from tests.support.processes import assert_one_line, wait_for

MAY_BE_EMPTY = (
    "Tile boundaries over time", "Jump ratios", "annotation ", "Requests within the target", "Gain over the launch K C",
    "Draft tokens, beside vLLM's own counters",
)  # fmt: skip
"""Empty when a busy CPU shows no tile boundary, when there was no swap within the last minute, without `slo_tpot_ms`, before the
control arm has an error, or without vLLM."""
PATIENCE_S = 150.0


def _groups(api: Api) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = api.get("/api/v1/rules")["data"]["groups"]
    return groups


@needs("prometheus", "alertmanager")
def test_the_stack_runs_and_returns_data(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the demo needs torch")
    ports = {name: free_port() for name in ("demo", "prometheus", "alertmanager")}
    command = [sys.executable, "-m", "deploy.stack", *(f"--{name}-port={port}" for name, port in ports.items())]
    log = tmp_path / "stack.log"
    with log.open("wb") as output:
        stack = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
    try:
        wait_for(lambda: "Ctrl-C" in log.read_text() or stack.poll() is not None, "the addresses")
        printed = log.read_text()
        assert stack.poll() is None, printed
        for name, port in ports.items():
            assert f"http://127.0.0.1:{port}/" in printed, name
        api = Api(f"http://127.0.0.1:{ports['prometheus']}")
        targets = api.get("/api/v1/targets")["data"]["activeTargets"]
        assert [(t["health"], t["labels"]["job"]) for t in targets] == [("up", "adaptive-spec")]
        managers = api.get("/api/v1/alertmanagers")["data"]["activeAlertmanagers"]
        assert [m["url"] for m in managers] == [f"http://127.0.0.1:{ports['alertmanager']}/api/v2/alerts"]

        # The shipped intervals: rules every 15 s, a scrape every 5 s, so a rate needs a while.
        wait_for(lambda: all(g["lastEvaluation"] > "2000" for g in _groups(api)), "every group to be evaluated")
        rules = [rule for group in _groups(api) for rule in group["rules"]]
        files = sorted((ROOT / "deploy" / "prometheus" / "rules").glob("*.yaml"))
        shipped = [rule for file in files for group in yaml.safe_load(file.read_text())["groups"] for rule in group["rules"]]
        assert sorted(rule["name"] for rule in rules) == sorted(rule.get("alert") or rule["record"] for rule in shipped)
        assert {rule["health"] for rule in rules} == {"ok"}, [r for r in rules if r["health"] != "ok"]
        failures = [
            line for line in api.text("/metrics").splitlines() if line.startswith("prometheus_rule_evaluation_failures_total")
        ]
        assert len(failures) == 4
        assert all(float(line.rpartition(" ")[2]) == 0.0 for line in failures)

        empty = [(f"{name}: {where}", expr) for name in DASHBOARDS for where, expr in expressions(load(name))]
        empty = [(where, expr) for where, expr in empty if not where.split(": ", 1)[1].startswith(MAY_BE_EMPTY)]
        deadline_s = time.monotonic() + PATIENCE_S
        while empty and time.monotonic() < deadline_s:
            empty = [(where, expr) for where, expr in empty if not api.query(expr)]
            time.sleep(1.0)
        assert empty == []

        stack.send_signal(signal.SIGTERM)
        assert stack.wait(30.0) == 0
        for port in ports.values():
            socket.create_server(("127.0.0.1", port)).close()  # the ports are free again
    finally:
        stack.kill()
        stack.wait()


@needs("prometheus", "alertmanager")
def test_a_port_in_use_is_reported() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [sys.executable, "-m", "deploy.stack", f"--demo-port={taken.getsockname()[1]}"]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert_one_line(result, "--demo-port", "Address already in use")


def test_missing_programs_are_reported() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "deploy.stack"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env={"PATH": ""},
    )
    assert_one_line(result, "prometheus and alertmanager not found on PATH")
