"""Recomputes the metrics of the models from a trace, with a controller but without a sidecar.

The models depend on the records in their order and on the records after which the sidecar refitted, because a calibration is
scored on earlier predictions. The times of the records and the sizes of their batches do not matter. The sidecar's log says
after which record each refit was.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from adaptive_spec.config.settings import ControllerSettings
from adaptive_spec.control.controller import Controller
from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.domain.step_record import StepRecord
from tests.support.ring_trace import RingTrace

Labels = tuple[tuple[str, str], ...]
Metrics = Mapping[str, Mapping[Labels, float]]
NAMES = (
    "tile_boundary_tokens", "tile_jump_ratio", "latency_segment_intercept_seconds", "latency_segment_slope_seconds_per_token",
    "latency_segment_first_tokens", "latency_segment_last_tokens", "latency_error_ratio", "calibration_error_ratio",
    "calibration_brier_ratio", "calibration_log_loss", "calibration_curve_probability", "calibration_observed_probability",
    "expected_accepted_tokens_total",
)  # fmt: skip


def metrics_of(page: str) -> dict[str, dict[Labels, float]]:
    """Return the samples of a metrics page by name and labels, without prefix and constant labels."""
    found: dict[str, dict[Labels, float]] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            labels = tuple((k, v) for k, v in sorted(sample.labels.items()) if k not in ("model", "gpu", "tp"))
            found.setdefault(sample.name.removeprefix("adaptive_spec_"), {})[labels] = sample.value
    return found


class Fit(NamedTuple):
    """A refit or a command, and the number of records before it."""

    after: int
    command: str
    k: int | None


def fits(log: str) -> list[Fit]:
    """Return the refits and commands in a sidecar's log of level debug."""
    pattern = r"(?:(refit)|command: (\w+)(?: (\d+))?,) after record (\d+)"
    return [Fit(int(n), refit or name, int(k) if k else None) for refit, name, k, n in re.findall(pattern, log)]


def thinned(records: Sequence[StepRecord], fitted: Sequence[Fit], every: int) -> tuple[list[StepRecord], list[Fit]]:
    """Remove one of every `every` records, and adapt the positions of the refits."""
    return [r for i, r in enumerate(records) if i % every], [f._replace(after=f.after - -(-f.after // every)) for f in fitted]


def models_anew(
    records: Sequence[StepRecord], fitted: Sequence[Fit], info: EngineInfo, settings: ControllerSettings
) -> dict[str, dict[Labels, float]]:
    """Return the expected metrics of `NAMES` by labels; those without a value are left out."""
    controller = Controller(settings, info)
    at, now_s = 0, records[0].time_ns * 1e-9
    controller.tick(now_s)
    for fit in [*fitted, Fit(len(records), "", None)]:
        for record in records[at : fit.after]:
            now_s = record.time_ns * 1e-9
            controller.observe(record, now_s)
        at = fit.after
        if fit.command == "refit":
            controller.refit(now_s)
        elif fit.command:
            controller.command(fit.command, now_s, fit.k)
    models, staircase = controller.models, controller.models.verify.fit
    assert staircase is not None
    quality = models.acceptance.reliability
    curve = {f"{centre:.3f}": (calibrated, observed) for centre, calibrated, observed, _ in quality.curve()}

    def by(label: str, values: Sequence[float]) -> dict[Labels, float]:
        return {((label, str(i)),): float(value) for i, value in enumerate(values)}

    found: dict[str, Mapping[Labels, float | None]] = {
        "tile_boundary_tokens": by("boundary", [b.tokens for b in staircase.boundaries]),
        "tile_jump_ratio": by("boundary", [b.jump_ratio for b in staircase.boundaries]),
        "latency_segment_intercept_seconds": by("segment", [s.intercept_s for s in staircase.segments]),
        "latency_segment_slope_seconds_per_token": by("segment", [s.slope_s_per_token for s in staircase.segments]),
        "latency_segment_first_tokens": by("segment", [s.first for s in staircase.segments]),
        "latency_segment_last_tokens": by("segment", [s.last for s in staircase.segments]),
        "latency_error_ratio": {(): staircase.mape},
        "calibration_error_ratio": {(): quality.ece},
        "calibration_brier_ratio": {(): quality.brier},
        "calibration_log_loss": {(): quality.log_loss},
        "calibration_curve_probability": {(("score", score),): calibrated for score, (calibrated, _) in curve.items()},
        "calibration_observed_probability": {(("score", score),): observed for score, (_, observed) in curve.items()},
        "expected_accepted_tokens_total": {(): controller.counters.expected_accepted},
    }
    return {name: {labels: value for labels, value in rows.items() if value is not None} for name, rows in found.items() if rows}


def same_models(metrics: Metrics, wanted: Metrics, relative: float) -> list[str]:
    """Return the differences in `NAMES`; token counts must be equal, other values within `relative`."""
    wrong = []
    for name in NAMES:
        found, expected = metrics.get(name, {}), wanted.get(name, {})
        if found.keys() != expected.keys():
            wrong.append(f"{name}: {sorted(found)} instead of {sorted(expected)}")
            continue
        for labels, value in expected.items():
            slack = 0.0 if name.endswith("_tokens") else relative * max(abs(value), 1e-9)
            if abs(found[labels] - value) > slack:
                wrong.append(f"{name}{dict(labels)}: {found[labels]!r} instead of {value!r}")
    return wrong


class Anew(NamedTuple):
    """What the models were made anew from."""

    info: EngineInfo
    records: list[StepRecord]
    fitted: list[Fit]


def assert_models_are_those_of(
    whole: RingTrace, status: Mapping[str, Any], metrics: Metrics, log: str, settings: ControllerSettings
) -> Anew:
    """Assert that a sidecar's metrics are those of models made anew from all records since the start.

    log: the sidecar's, of level debug. A twentieth of the records less must not agree: the comparison can fail.
    """
    info, records = whole.ring.info, whole.end()
    assert (whole.ring.start, len(records)) == (0, status["decode_steps"]), "nothing was written before"
    fitted = [fit for fit in fits(log) if fit.after <= len(records)]
    assert {fit.command for fit in fitted} >= {"refit", "pin", "unpin"}
    assert same_models(metrics, models_anew(records, fitted, info, settings), 1e-6) == []
    assert sorted(metrics.get("tile_boundary_tokens", {}).values()) == status["boundaries"]
    assert {name for name in NAMES if metrics.get(name)} >= set(NAMES[2:]), "only boundaries may be missing"
    fewer, moved = thinned(records, fitted, 20)
    assert len(same_models(metrics, models_anew(fewer, moved, info, settings), 1e-6)) > 10
    return Anew(info, records, fitted)
