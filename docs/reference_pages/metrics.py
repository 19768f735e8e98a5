"""Generates docs/metrics.md from the exporter: `python -m docs.reference_pages.metrics` prints it."""

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
    """Return all metric families of the exporter, without samples and constant labels."""
    info = EngineInfo("engine", "m", "g", 1, 1, (0, 1), 1, Granularity.BATCH, False, 0)
    current_view = CurrentView(time.monotonic())
    current_view.view = View(time.monotonic(), Controller(ControllerSettings(), info).snapshot(0.0))
    return list(SnapshotCollector(current_view).collect())


def exposed_name(family: Metric) -> str:
    return f"{family.name}_total" if family.type == "counter" else str(family.name)


def own_labels(family: Metric) -> list[str]:
    """Return the labels of a family besides the constant ones."""
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
        "Made by `make docs` from `adaptive_spec/sidecar/metrics.py`; do not edit.",
        "",
        "`/metrics` of the sidecar, in Prometheus' text format or OpenMetrics, as requested. Once an engine is attached all",
        "metrics also have the constant labels `model`, `gpu` and `tp`, with data parallelism `dp_rank`, except that `model` of",
        "`refit_duration_seconds` is the model that was refitted. A value that is not known yet is left out, not exported as 0.",
        "Counters survive a restart of the sidecar. Positions are draft positions, starting at 1; the bonus token is not a draft",
        "token.",
        "",
        "| metric | type | labels | meaning |",
        "|---|---|---|---|",
    ]
    for family in metric_families():
        labels = ", ".join(f"`{name}`" for name in own_labels(family))
        lines.append(f"| `{exposed_name(family)}` | {family.type} | {labels} | {family.documentation} |")
    lines += ["", "Metrics of the sidecar process:", "", "| metric | type | meaning |", "|---|---|---|"]
    lines += [f"| `{exposed_name(family)}` | {family.type} | {family.documentation} |" for family in _process_metrics()]
    lines += [
        "",
        "A histogram has `_bucket`, `_sum` and `_count`. Useful expressions:",
        "",
        "| question | PromQL |",
        "|---|---|",
        f"| Goodput | `rate({PREFIX}output_tokens_total[1m])` is output tokens per second of wall time; "
        f"`{PREFIX}goodput_tokens_per_second` is per second of decode time |",
        f"| Acceptance by position | `rate({PREFIX}accepted_tokens_total[5m]) / rate({PREFIX}verified_tokens_total[5m])` |",
        f"| Mean accept_len | `sum(rate({PREFIX}accepted_tokens_total[5m])) "
        f'/ sum(rate({PREFIX}draft_tokens_total{{position="1"}}[5m]))` |',
        f"| Measured / predicted step time | `rate({PREFIX}measured_step_seconds_total[5m]) "
        f"/ rate({PREFIX}predicted_step_seconds_total[5m])`, 1 = as predicted |",
        f"| Accepted / expected draft tokens | `sum(rate({PREFIX}accepted_tokens_total[5m])) "
        f"/ sum(rate({PREFIX}expected_accepted_tokens_total[5m]))`, 1 = as predicted |",
        f"| Current mode | `{PREFIX}mode == 1` |",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(metrics_page(), end="")
