"""Snapshot: everything the outside may know of the controller at one moment, immutable. Metrics and pages read only this."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from adaptive_spec.domain.policy import Mode
from adaptive_spec.domain.staircase import Boundary, Segment


@dataclass(frozen=True)
class HistogramData:
    """Cumulative-free histogram: `counts` per bucket (upper bounds `edges_s`, last bucket +Inf) and the sum, seconds."""

    edges_s: tuple[float, ...]
    counts: tuple[int, ...]
    sum_s: float


@dataclass(frozen=True)
class Event:
    """Something an operator would want to read: `time_s` on the controller's clock, kind (swap, drift, mode, ...), words."""

    time_s: float
    kind: str
    text: str


@dataclass(frozen=True)
class Snapshot:
    """State of the controller. Counters count from the controller's beginning and survive a warm restart.

    Position-indexed tuples begin at draft position 1. Gains are ratios against the launch K, 0 = no gain; None = unknown.
    """

    time_s: float
    mode: Mode
    reason: str
    engine: str
    launch_k: int
    policy_version: int
    policy_time_s: float
    k_by_batch_size: Mapping[int, int]
    segments: tuple[Segment, ...]
    boundaries: tuple[Boundary, ...]
    latency_points: tuple[tuple[int, float, float], ...]
    """Measured (num_tokens, mean seconds, weight)."""
    latency_mape: float | None
    stage_histograms: Mapping[str, HistogramData]
    predicted_step_s_total: float
    measured_step_s_total: float
    draft_tokens: tuple[int, ...]
    verified_tokens: tuple[int, ...]
    accepted_tokens: tuple[int, ...]
    expected_accepted_tokens: float
    output_tokens: int
    decode_steps: int
    goodput_tokens_per_s: float | None
    calibration_kind: str
    calibration_error: float | None
    calibration_brier: float | None
    calibration_log_loss: float | None
    calibration_curve: tuple[tuple[float, float, float, int], ...]
    """(bin centre of the cumulative score, calibrated probability, observed acceptance, samples)."""
    drift_events: Mapping[str, int]
    swaps: Mapping[str, int]
    predicted_gain: float | None
    measured_gain: float | None
    observations: int
    dropped: Mapping[str, int]
    refit_histograms: Mapping[str, HistogramData]
    sweep_steps: int
    sweep_progress: float
    """0..1, 1 when the sweep is over."""
    sweep_s: float
    probe_share: float
    events: tuple[Event, ...] = ()
    batch_size: int = 0
    """Requests in the newest decode step, 0 before the first."""
    watched_only: bool = False
    """The mode is shadow, though another was asked for, because the engine runs none of the policies made for it."""
