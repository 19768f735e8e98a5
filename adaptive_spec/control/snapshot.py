"""Snapshot: the whole observable state of the controller at one moment, immutable. Metrics and pages read only this."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from adaptive_spec.control.counters import Counters, Event, HistogramData, batch_bucket
from adaptive_spec.control.explanation import Considered
from adaptive_spec.control.publication import Publisher
from adaptive_spec.control.sweep import Sweep
from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.domain.policy import Mode
from adaptive_spec.domain.staircase import Boundary, Segment
from adaptive_spec.models.model_set import ModelSet


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
    policy_time_s: float | None
    """When the latest policy was made, None before this process made one."""
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
    """By the control arm where `measured_gain_error` is known, else the estimate: against the forecast of the launch K."""
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
    """Requests in the latest decode step, 0 before the first."""
    k_switches: Mapping[str, int] = field(default_factory=dict)
    """Changes of the K that was run, by reason."""
    limited_steps: int = 0
    """Steps whose K was not the one that the policy asked for."""
    switch_s: float | None = None
    """Seconds that a change of K costs, None while too few were measured."""
    observe_only: bool = False
    """The mode is shadow, though another was asked for, because the engine runs none of the policies made for it."""
    measured_gain_error: float | None = None
    """Standard error of the gain that the control arm measured; None: `measured_gain` is an estimate."""
    estimated_gain: float | None = None
    """Measured goodput of recent steps against the forecast of the launch K in the same steps."""
    reached_tokens: tuple[int, ...] = ()
    """Verified draft tokens of which all before were accepted, by position."""
    accept_lens: tuple[int, ...] = ()
    """Requests of steps with K > 0 by accepted draft tokens 0, 1, ..., max_k."""
    run_steps: Mapping[tuple[int, int], int] = field(default_factory=dict)
    """Steps by (upper end of the bucket of batch sizes: 1, 2, 4, ...; K that was run), for every K of the engine."""
    slo_requests: Mapping[str, int] = field(default_factory=dict)
    """Requests that ended, by whether their time per output token was within the target ("within", "beyond")."""
    slo_tpot_s: float | None = None
    """The target, seconds per output token; None: there is none."""
    last_k: int | None = None
    """K that the latest decode step ran, whoever chose it; None before the first."""
    context: int = 0
    """Context bucket of the latest decode step."""
    considered: Considered | None = None
    """What the last decision was made of, None before the first."""


def build_snapshot(
    now_s: float, mode: Mode, reason: str, observe_only: bool, k_by_batch_size: Mapping[int, int], *,
    info: EngineInfo, models: ModelSet, counters: Counters, publisher: Publisher, sweep: Sweep, considered: Considered | None,
    last_k: int | None, control_gain: tuple[float, float] | None,
) -> Snapshot:  # fmt: skip
    """The snapshot of a controller made of these parts. mode, reason: as shown (shadow when `observe_only`).

    control_gain: see `ControlArm.gain`.
    """
    fit, quality = models.staircase, models.acceptance.reliability
    predicted_gain, estimated_gain = counters.gains()
    measured_gain, gain_error = control_gain or (estimated_gain, None)
    return Snapshot(
        time_s=now_s, mode=mode, observe_only=observe_only,
        reason=reason, engine=info.name, launch_k=info.launch_k,
        policy_version=publisher.version, policy_time_s=publisher.time_s, k_by_batch_size=k_by_batch_size,
        segments=fit.segments if fit else (), boundaries=fit.boundaries if fit else (),
        latency_points=tuple(zip(fit.tokens.tolist(), fit.mean_s.tolist(), fit.weight.tolist(), strict=True)) if fit else (),
        latency_mape=fit.mape if fit else None,
        stage_histograms={name: h.data() for name, h in counters.stages.items()},
        predicted_step_s_total=counters.predicted_s, measured_step_s_total=counters.measured_s,
        draft_tokens=tuple(counters.draft.tolist()), verified_tokens=tuple(counters.verified.tolist()),
        accepted_tokens=tuple(counters.accepted.tolist()), expected_accepted_tokens=counters.expected_accepted,
        output_tokens=counters.output_tokens, decode_steps=counters.steps, goodput_tokens_per_s=counters.goodput(),
        calibration_kind=models.acceptance.kind, calibration_error=quality.ece, calibration_brier=quality.brier,
        calibration_log_loss=quality.log_loss, calibration_curve=quality.curve(),
        drift_events=dict(counters.drift), swaps=dict(counters.swaps),
        predicted_gain=predicted_gain, measured_gain=measured_gain,
        measured_gain_error=gain_error, estimated_gain=estimated_gain,
        observations=counters.observations, dropped=dict(counters.dropped),
        refit_histograms={name: h.data() for name, h in counters.refits.items()},
        sweep_steps=counters.sweep_steps, sweep_progress=sweep.progress if mode is Mode.SWEEP else 1.0, sweep_s=counters.sweep_s,
        probe_share=counters.probe_lost_s / counters.decode_s if counters.decode_s > 0.0 else 0.0,
        events=tuple(counters.events), batch_size=models.batch_size,
        k_switches=dict(counters.k_switches), limited_steps=counters.limited_steps, switch_s=models.switch_cost.measured_s,
        reached_tokens=tuple(counters.reached.tolist()), accept_lens=tuple(counters.accept_lens.tolist()),
        run_steps={
            (2**i, k): int(counters.run_steps[i, k]) for i in range(batch_bucket(info.max_batch) + 1) for k in _run_k(info)
        },
        context=models.context, considered=considered, last_k=last_k,
        slo_requests=dict(counters.requests), slo_tpot_s=None if models.token_times is None else models.token_times.target_s,
    )  # fmt: skip


def _run_k(info: EngineInfo) -> list[int]:
    """K that steps can have: the candidates and the launch K."""
    return sorted({*info.candidates, min(info.launch_k, info.max_k)})
