"""The dashboards in Grafana's own components: checked against its schema, and drawn in Chromium while a demo is scraped.

Node's packages are installed once into dashboards/render (560 MB). Without the tools the tests are skipped; CI has them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dashboards.build import DASHBOARDS, FOLDER
from tests.support.monitoring import Api, free_port, needs, prometheus, running
from tests.support.processes import wait_for

RENDER = FOLDER / "render"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
FILES = [str(FOLDER / f"{name}.json") for name in DASHBOARDS]
MAY_BE_EMPTY = {"Tile boundaries over time", "Jump ratios"}
"""Empty when no tile boundary is found, as may happen on a busy CPU."""
WITHOUT_A_TARGET = {"Requests within the target"}
"""Empty in the demo, which sets no `slo_tpot_ms`."""
PARTLY_EMPTY = {"Gain over the launch K", "Draft tokens, beside vLLM's own counters"}
"""Some of their series are missing: the control arm's error comes later than a minute, and no vLLM runs."""
SECONDS = 60

pytestmark = pytest.mark.skipif(
    shutil.which("npm") is None or shutil.which("node") is None, reason="not installed: node and npm, which draw the dashboards"
)


def _npm(*command: str) -> str:
    result = subprocess.run(command, cwd=RENDER, capture_output=True, text=True, timeout=500, check=False)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    return result.stdout


@pytest.fixture(scope="module")
def packages() -> None:
    """Install the packages of the lock file."""
    lock, done = RENDER / "package-lock.json", RENDER / "node_modules" / ".package-lock.json"
    if not done.exists() or done.stat().st_mtime < lock.stat().st_mtime:
        _npm("npm", "ci", "--no-audit", "--no-fund", "--loglevel=error")


@pytest.mark.usefixtures("packages")
def test_types_of_the_schema() -> None:
    _npm("node", "types.mjs", *FILES)


@pytest.mark.usefixtures("packages")
def test_wrong_types_are_found(tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text(Path(FILES[0]).read_text().replace('"drawStyle": "line"', '"drawStyle": "curvy"'))
    result = subprocess.run(["node", "types.mjs", str(bad)], cwd=RENDER, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "curvy" in result.stdout


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """Prometheus that has scraped a running demo for a minute."""
    folder = tmp_path_factory.mktemp("scraped")
    port = free_port()
    demo = [sys.executable, "-m", "adaptive_spec.cli", "demo", "--duration", "900", "--port", str(port)]
    with running(demo, folder / "demo.log"), prometheus(folder, [f"127.0.0.1:{port}"]) as api:
        wait_for(lambda: api.query('adaptive_spec_mode{mode="active"} == 1'), "the demo to end its sweep")
        time.sleep(SECONDS)  # the panels show one minute
        yield api


@needs("prometheus")
@pytest.mark.skipif(CHROMIUM is None, reason="not installed: chromium, which draws the dashboards")
@pytest.mark.usefixtures("packages")
def test_no_panel_is_empty_while_the_demo_runs(scraped: Api, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the demo needs torch")
    sources = [*RENDER.glob("app/*"), RENDER / "vite.config.mjs", RENDER / "package-lock.json"]
    built = RENDER / "out" / "index.html"
    if not built.exists() or built.stat().st_mtime < max(path.stat().st_mtime for path in sources):
        _npm("npx", "vite", "build")
    options = ["--prometheus", scraped.url, "--out", str(tmp_path), "--minutes", "1", "--interval", "1"]
    environment = {**os.environ, "CHROMIUM": str(CHROMIUM)}
    command = ["node", "render.mjs", *options, *FILES]
    result = subprocess.run(command, cwd=RENDER, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    drawn: list[dict[str, Any]] = json.loads(result.stdout)
    assert [d["dashboard"] for d in drawn] == [f"{name}.json" for name in DASHBOARDS]
    boundaries = scraped.query("count(adaptive_spec_tile_boundary_tokens)")
    for dashboard in drawn:
        assert dashboard["errors"] == []
        assert Path(dashboard["screenshot"]).stat().st_size > 20_000
        for panel in dashboard["panels"]:
            where = (dashboard["dashboard"], panel["title"], panel["text"][:200])
            assert panel["error"] == "", where
            assert not panel["clipped"], where
            assert panel["title"] in panel["text"], where
            if panel["title"] in WITHOUT_A_TARGET or (panel["title"] in MAY_BE_EMPTY and not boundaries):
                continue
            assert panel["points"] > 0, where
            assert panel["counts"], where
            partly = any if panel["title"] in PARTLY_EMPTY else all
            assert partly(panel["counts"].values()), where
            assert "No data" not in panel["text"], where
            if panel["type"] in ("timeseries", "trend"):
                assert panel["canvases"] > 0, where
