"""`python -m dashboards.build` writes one JSON file per dashboard into this folder; the output is deterministic."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from dashboards.calibration import calibration
from dashboards.health import health
from dashboards.latency import latency
from dashboards.overview import overview

FOLDER = Path(__file__).parent
DASHBOARDS: dict[str, Callable[[], Dashboard]] = {
    "overview": overview, "latency": latency, "calibration": calibration, "health": health,
}  # fmt: skip


def document(name: str) -> str:
    """Return the JSON of a dashboard, by its name in `DASHBOARDS`."""
    return json.dumps(DASHBOARDS[name](), cls=JSONEncoder, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def write_all() -> None:
    """Write every dashboard to FOLDER/{name}.json."""
    for name in DASHBOARDS:
        (FOLDER / f"{name}.json").write_text(document(name), encoding="utf-8")


if __name__ == "__main__":
    write_all()
