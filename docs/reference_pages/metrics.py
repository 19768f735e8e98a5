"""The page that documents the metrics, made from the exporter itself.

`python -m docs.reference_pages.metrics` prints docs/metrics.md.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.metrics_core import Metric

from adaptive_spec.config.settings import ControllerSettings
from adaptive_spec.control.controller import Controller
from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.domain.policy import Granularity
from adaptive_spec.sidecar.metrics import PREFIX, SnapshotCollector
from adaptive_spec.sidecar.view import CurrentView, View

PROCESS = ("process_resident_memory_bytes", "process_cpu_seconds", "process_start_time_seconds")


def metric_families() -> list[Metric]:
    """All families of the exporter, without samples and without the constant labels."""
    info = EngineInfo("engine", "m", "g", 1, 1, (0, 1), 1, Granularity.BATCH, False, 0)
    current_view = CurrentView(time.monotonic())
    current_view.view = View(time.monotonic(), Controller(ControllerSettings(), info).snapshot(0.0))
    return list(SnapshotCollector(current_view).collect())


def exposed_name(family: Metric) -> str:
    return f"{family.name}_total" if family.type == "counter" else str(family.name)


def own_labels(family: Metric) -> list[str]:
    """Labels a family has besides the constant ones."""
    names: tuple[str, ...] = family._labelnames  # type: ignore[attr-defined]  # of every kind of family, though not of its base
    return list(names)


def _process_metrics() -> Iterator[Metric]:
    collector = ProcessCollector(registry=CollectorRegistry())
    yield from (family for family in collector.collect() if family.name in PROCESS)


def metrics_page() -> str:
    """Return docs/metrics.md."""
    lines = [
        "# Metrics",
        "",
        "Made by `make docs` from `adaptive_spec/sidecar/metrics.py`; do not edit by hand.",
        "",
        "`/metrics` of the sidecar, in Prometheus' text format or OpenMetrics, as asked. Once an engine is attached all",
        "carry the constant labels `model`, `gpu` and `tp` besides those below (a refit has a `model` of its own, which of our",
        "models it was, and no other). What is not known yet is left out, never 0. Counters survive a restart of the sidecar.",
        "Positions are draft positions and begin at 1; the bonus token is no draft token.",
        "",
        "| metric | type | labels | what it says |",
        "|---|---|---|---|",
    ]
    for family in metric_families():
        labels = ", ".join(f"`{name}`" for name in own_labels(family))
        lines.append(f"| `{exposed_name(family)}` | {family.type} | {labels} | {family.documentation} |")
    lines += ["", "Of the sidecar's own process:", "", "| metric | type | what it says |", "|---|---|---|"]
    lines += [f"| `{exposed_name(family)}` | {family.type} | {family.documentation} |" for family in _process_metrics()]
    lines += [
        "",
        "A histogram has `_bucket`, `_sum` and `_count`. Some expressions to begin with:",
        "",
        "| question | PromQL |",
        "|---|---|",
        f"| Goodput | `rate({PREFIX}output_tokens_total[1m])` is tokens per second of the clock; "
        f"`{PREFIX}goodput_tokens_per_second` of decode time |",
        f"| Acceptance by position | `rate({PREFIX}accepted_tokens_total[5m]) / rate({PREFIX}verified_tokens_total[5m])` |",
        f"| Mean accept_len | `sum(rate({PREFIX}accepted_tokens_total[5m])) "
        f'/ sum(rate({PREFIX}verified_tokens_total{{position="1"}}[5m]))` |',
        f"| Are step times predicted? | `rate({PREFIX}measured_step_seconds_total[5m]) "
        f"/ rate({PREFIX}predicted_step_seconds_total[5m])`, 1 = exactly |",
        f"| Is acceptance predicted? | `sum(rate({PREFIX}accepted_tokens_total[5m])) "
        f"/ sum(rate({PREFIX}expected_accepted_tokens_total[5m]))`, 1 = exactly |",
        f"| What does it do now? | `{PREFIX}mode == 1` |",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(metrics_page(), end="")
