"""Prometheus metrics. One collector reads an immutable view, so a scrape never sees a partial update."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from adaptive_spec import __version__
from adaptive_spec.control.counters import DROP_REASONS, SWAP_REASONS, Histogram, HistogramData
from adaptive_spec.control.k_switches import REASONS
from adaptive_spec.control.snapshot import Snapshot
from adaptive_spec.domain.policy import Mode
from adaptive_spec.models.model_set import REFITTED
from adaptive_spec.sidecar.server_metrics import ServerReported
from adaptive_spec.sidecar.view import CALLS, CurrentView, View
from adaptive_spec.wire.engine_report import STATES

PREFIX = "adaptive_spec_"
Rows = Iterable[tuple[tuple[str, ...], float]]


class SnapshotCollector(Collector):
    """All metrics of this project, from the current view. A value that is not known yet is left out, not exported as 0."""

    def __init__(self, current_view: CurrentView) -> None:
        self._current_view = current_view

    def collect(self) -> Iterable[Metric]:
        view = self._current_view.view
        if not view.dp_ranks:
            return _of_engine(view, None)
        families: dict[str, Metric] = {}
        for rank, one in view.dp_ranks.items():
            for metric in _of_engine(one, rank):
                known = families.setdefault(metric.name, metric)
                if known is not metric:
                    known.samples.extend(metric.samples)
        return families.values()

    def describe(self) -> Iterable[Metric]:
        return ()


def metrics_registry(current_view: CurrentView) -> CollectorRegistry:
    """Return a registry with the metrics of this project and those of the process (`process_*`)."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(SnapshotCollector(current_view))
    ProcessCollector(registry=registry)
    return registry


def _of_engine(view: View, dp_rank: int | None) -> Iterable[Metric]:
    family = _Families(view, dp_rank)
    yield from _about_sidecar(family, view)
    yield from _about_server(_Families(view, None), view.server_reported)
    if (snapshot := view.snapshot) is not None:
        yield from _about_latency(family, snapshot)
        yield from _about_tokens(family, snapshot)
        yield from _about_calibration(family, snapshot)
        yield from _about_policy(family, snapshot)
        yield from _about_learning(family, snapshot)


class _Families:
    """Builds metric families with the constant labels model, gpu and tp, once an engine is attached, and with data parallelism
    dp_rank.
    """

    def __init__(self, view: View, dp_rank: int | None) -> None:
        info = view.info
        self._constant = {"model": info.model, "gpu": info.gpu, "tp": str(info.tp)} if info else {}
        if dp_rank is not None:
            self._constant["dp_rank"] = str(dp_rank)

    def gauge(self, name: str, text: str, rows: Rows, labels: tuple[str, ...] = ()) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, text, labels=(*labels, *self._constant))
        for values, number in rows:
            family.add_metric([*values, *self._constant.values()], number)
        return family

    def counter(self, name: str, text: str, rows: Rows, labels: tuple[str, ...] = ()) -> Metric:
        family = CounterMetricFamily(PREFIX + name, text, labels=(*labels, *self._constant))
        for values, number in rows:
            family.add_metric([*values, *self._constant.values()], number)
        return family

    def lengths(self, name: str, text: str, counts: tuple[int, ...]) -> Metric:
        """Histogram of whole numbers 0, 1, ...: one bucket each."""
        family = HistogramMetricFamily(PREFIX + name, text, labels=tuple(self._constant))
        if counts:
            sums = [float(sum(counts[: i + 1])) for i in range(len(counts))]
            buckets = [*((f"{i}.0", n) for i, n in enumerate(sums)), ("+Inf", sums[-1])]
            family.add_metric([*self._constant.values()], buckets, float(sum(i * n for i, n in enumerate(counts))))
        return family

    def histogram(self, name: str, text: str, rows: Mapping[str, HistogramData], label: str) -> Metric:
        # refit_duration_seconds has its own label `model` (which model was refitted), so it cannot carry the engine's as well.
        constant = {key: value for key, value in self._constant.items() if key != label}
        family = HistogramMetricFamily(PREFIX + name, text, labels=(label, *constant))
        for value, data in rows.items():
            buckets, total = [], 0
            for edge, count in zip((*(f"{e:g}" for e in data.edges_s), "+Inf"), data.counts, strict=True):
                total += count
                buckets.append((edge, float(total)))
            family.add_metric([value, *constant.values()], buckets, data.sum_s)
        return family


def _one(value: float | None) -> Rows:
    return [] if value is None else [((), float(value))]


def _by_position(values: Iterable[float]) -> Rows:
    return [((str(position),), value) for position, value in enumerate(values, start=1)]


def _by_name(values: Mapping[str, float]) -> Rows:
    return [((name,), value) for name, value in values.items()]


def _about_sidecar(family: _Families, view: View) -> Iterable[Metric]:
    mode = view.snapshot.mode if view.snapshot else Mode.FALLBACK
    yield family.gauge(
        "mode",
        "1 for the current mode of the controller, 0 for the others.",
        [((m.value,), float(m is mode)) for m in Mode],
        ("mode",),
    )
    yield family.gauge(
        "engine_attached", "1 while an engine's ring is open and its process is alive, else 0.", _one(view.attached)
    )
    yield family.gauge(
        "build_info",
        "Always 1; the labels give the versions of adaptive-spec and Python.",
        [((__version__, platform.python_version()), 1.0)],
        ("version", "python"),
    )
    names = [((view.info.name,), 1.0)] if view.info else []
    yield family.gauge(
        "engine_info", "Always 1, once there is an engine; the label is its name: sglang, vllm, ...", names, ("engine",)
    )
    yield family.counter(
        "controller_failures",
        "Controller calls that raised. A failed `observe` costs its record, others the policy until a refit succeeds.",
        _by_name({**dict.fromkeys(CALLS, 0), **view.failures}),
        ("call",),
    )
    text = "1 when the engine has run 256 steps in a row without a policy although one that acts was offered, else 0."
    yield family.gauge("policy_ignored", text, _one(view.policy_ignored))
    text = "Measured goodput over that of the same server without speculation, minus 1; absent where that was not measured."
    yield family.gauge("gain_over_no_speculation_ratio", text, _one(view.gain_over_no_speculation))
    report = view.report
    states = [((state,), float(state == report.state)) for state in STATES] if report else []
    yield family.gauge(
        "engine_state", "1 for the state that the engine reports in engine.json, 0 for the others.", states, ("state",)
    )
    text = "What the plugin does: 0 reports only, 1 counts and K, 2 stage times too, 3 confidences too."
    yield family.gauge("engine_level", text, _one(report.level if report else None))
    text = "Plugin calls that raised an exception inside the engine; the engine continued without them."
    yield family.counter("engine_failures", text, _by_name(report.failures if report else {}), ("hook",))
    text = "Events counted by the engine: unusable records and pages, policies adopted, steps without a fresh policy, SPS swaps."
    yield family.counter("engine_events", text, _by_name(report.counters if report else {}), ("event",))
    text = "Operations of the profile store, by result."
    yield family.counter("profile_store_operations", text, (view.store or {}).items(), ("operation", "result"))
    yield family.counter("annotations", "Annotations written to Grafana.", _one(view.annotations_sent))
    text = "Annotations that were not written to Grafana."
    yield family.counter("annotations_dropped", text, _by_name(view.annotations_dropped), ("reason",))
    age = None if view.checkpoint_s is None else max(time.monotonic() - view.checkpoint_s, 0.0)
    yield family.gauge("checkpoint_age_seconds", "Seconds since the last checkpoint.", _one(age))


def _about_server(family: _Families, server: ServerReported | None) -> Iterable[Metric]:
    """The server's own numbers: of the whole server, so without dp_rank."""
    own = server if server is not None and not server.failure else None
    note = "The server's own number, not measured by adaptive-spec; only while the plugin gives no records."
    text = f"Tokens per request and verification, bonus token included. {note}"
    yield family.gauge("server_reported_accept_length_tokens", text, _one(own.accept_length if own else None))
    text = f"Accepted / proposed draft tokens, 0..1. {note}"
    yield family.gauge("server_reported_accept_ratio", text, _one(own.accept_rate if own else None))
    text = f"Requests that run. {note}"
    yield family.gauge("server_reported_running_requests", text, _one(own.running_requests if own else None))
    text = f"Output tokens per second. {note}"
    yield family.gauge("server_reported_tokens_per_second", text, _one(own.tokens_per_s if own else None))
    age = max(time.monotonic() - own.time_s, 0.0) if own else None
    text = "Seconds since the server answered with its own numbers; only while the plugin gives no records."
    yield family.gauge("server_reported_age_seconds", text, _one(age))


def _about_latency(family: _Families, s: Snapshot) -> Iterable[Metric]:
    ordinals = [(str(i), b) for i, b in enumerate(s.boundaries)]
    tokens = [((i,), float(b.tokens)) for i, b in ordinals]
    yield family.gauge("tile_boundary_tokens", "Tile boundary: last token count of the cheaper tile.", tokens, ("boundary",))
    ratios = [((i,), b.jump_ratio) for i, b in ordinals]
    yield family.gauge(
        "tile_jump_ratio", "Latency just above the tile boundary divided by the latency just below it.", ratios, ("boundary",)
    )
    intercepts = [((str(i),), piece.intercept_s) for i, piece in enumerate(s.segments)]
    text = "Verify latency of a segment, extrapolated to 0 tokens."
    yield family.gauge("latency_segment_intercept_seconds", text, intercepts, ("segment",))
    slopes = [((str(i),), piece.slope_s_per_token) for i, piece in enumerate(s.segments)]
    yield family.gauge(
        "latency_segment_slope_seconds_per_token", "Verify latency per token within a segment.", slopes, ("segment",)
    )
    firsts = [((str(i),), float(piece.first)) for i, piece in enumerate(s.segments)]
    yield family.gauge("latency_segment_first_tokens", "First token count of a segment.", firsts, ("segment",))
    lasts = [((str(i),), float(piece.last)) for i, piece in enumerate(s.segments)]
    yield family.gauge("latency_segment_last_tokens", "Last token count of a segment.", lasts, ("segment",))
    yield family.gauge("latency_error_ratio", "Mean absolute relative error of the latency fit.", _one(s.latency_mape))
    yield family.histogram("step_duration_seconds", "Measured stage times of decode steps.", s.stage_histograms, "stage")
    yield family.counter("predicted_step_seconds", "Sum of the predicted step times.", _one(s.predicted_step_s_total))
    yield family.counter(
        "measured_step_seconds",
        "Sum of the measured times of the steps in predicted_step_seconds_total.",
        _one(s.measured_step_s_total),
    )


def _about_tokens(family: _Families, s: Snapshot) -> Iterable[Metric]:
    position = ("position",)
    yield family.counter("draft_tokens", "Draft tokens proposed.", _by_position(s.draft_tokens), position)
    yield family.counter("verified_tokens", "Draft tokens verified.", _by_position(s.verified_tokens), position)
    yield family.counter("accepted_tokens", "Draft tokens accepted.", _by_position(s.accepted_tokens), position)
    text = "Draft tokens verified of which all before were accepted: accepted / reached is the acceptance given the one before."
    yield family.counter("reached_tokens", text, _by_position(s.reached_tokens), position)
    yield family.lengths(
        "request_accepted_tokens",
        "Accepted draft tokens per request and step, without the bonus token, in steps with K > 0. Its mean is accept_len: "
        "spec_accept_length of SGLang less 1.",
        s.accept_lens,
    )
    by_k = [((str(size), str(k)), float(n)) for (size, k), n in s.run_steps.items()]
    text = "Decode steps by the K that was run. batch_size: the power of two at or next above the requests of the step."
    yield family.counter("run_k_steps", text, by_k, ("batch_size", "k"))
    text = "Draft tokens that the calibration expected to be accepted."
    yield family.counter("expected_accepted_tokens", text, _one(s.expected_accepted_tokens))
    yield family.counter("output_tokens", "Output tokens, bonus tokens included.", _one(s.output_tokens))
    yield family.counter("decode_steps", "Decode steps of the engine.", _one(s.decode_steps))
    yield family.gauge(
        "goodput_tokens_per_second", "Output tokens per second of decode time, over recent steps.", _one(s.goodput_tokens_per_s)
    )


def _about_calibration(family: _Families, s: Snapshot) -> Iterable[Metric]:
    yield family.gauge("calibration_error_ratio", "Expected calibration error (ECE), 0..1.", _one(s.calibration_error))
    yield family.gauge("calibration_brier_ratio", "Brier score, 0..1.", _one(s.calibration_brier))
    yield family.gauge(
        "calibration_log_loss", "Log loss of the calibration in use, nats per draft token.", _one(s.calibration_log_loss)
    )
    curve = [((f"{centre:.3f}",), calibrated) for centre, calibrated, _, _ in s.calibration_curve]
    yield family.gauge("calibration_curve_probability", "Calibrated P(accept) by cumulative score.", curve, ("score",))
    observed = [((f"{centre:.3f}",), seen) for centre, _, seen, _ in s.calibration_curve]
    yield family.gauge("calibration_observed_probability", "Observed acceptance by cumulative score.", observed, ("score",))
    events = {"latency": 0, "calibration": 0, **s.drift_events}
    yield family.counter("drift_events", "Drift events detected, by signal.", _by_name(events), ("signal",))


def _about_policy(family: _Families, s: Snapshot) -> Iterable[Metric]:
    yield family.gauge("policy_version", "Version of the newest policy.", _one(s.policy_version))
    age = max(time.monotonic() - s.policy_time_s, 0.0) if s.policy_version and s.policy_time_s is not None else None
    yield family.gauge("policy_age_seconds", "Seconds since the newest policy was published.", _one(age))
    by_batch = [((str(b),), float(k)) for b, k in s.k_by_batch_size.items()]
    yield family.gauge("policy_draft_tokens", "K of the policy by batch size.", by_batch, ("batch_size",))
    text = "Batch size of the newest decode step."
    yield family.gauge("batch_size_requests", text, _one(s.batch_size or None))
    swaps = {**dict.fromkeys(SWAP_REASONS, 0), **s.swaps}
    yield family.counter("policy_swaps", "Policy swaps, by reason.", _by_name(swaps), ("reason",))
    reasons: dict[str, float] = {**dict.fromkeys(REASONS, 0), **s.k_switches}
    yield family.counter("k_switches", "Changes of the K that was run, by reason.", _by_name(reasons), ("reason",))
    text = "Steps that ran another K than the policy asked for, because the engine does not run that one at this batch size."
    yield family.counter("plan_limited_steps", text, _one(s.limited_steps))
    text = "Extra time of the first step after a change of K; absent until enough changes were measured."
    yield family.gauge("k_switch_cost_seconds", text, _one(s.switch_s))
    requests: dict[str, float] = {"within": 0, "beyond": 0, **s.slo_requests}
    text = "Requests that ended, by whether their decode time per output token was within slo_tpot_ms; 0 without that target."
    yield family.counter("slo_requests", text, _by_name(requests), ("result",))
    text = "The target slo_tpot_ms for the time per output token of every request; absent without one."
    yield family.gauge("slo_target_seconds", text, _one(s.slo_tpot_s))
    text = "Predicted goodput gain over the launch K; 0 = no gain."
    yield family.gauge("policy_predicted_gain_ratio", text, _one(s.predicted_gain))
    text = "Goodput gain over the launch K, 0 = no gain: measured by the control arm while policy_measured_gain_error_ratio is "
    text += "present, else an estimate: against the forecast of the launch K."
    yield family.gauge("policy_measured_gain_ratio", text, _one(s.measured_gain))
    text = "Standard error of policy_measured_gain_ratio; absent while that is an estimate: too few steps of the control arm."
    yield family.gauge("policy_measured_gain_error_ratio", text, _one(s.measured_gain_error))
    text = "Estimate of the gain: measured goodput of recent steps against the forecast of the launch K in the same steps."
    yield family.gauge("policy_estimated_gain_ratio", text, _one(s.estimated_gain))


def _about_learning(family: _Families, s: Snapshot) -> Iterable[Metric]:
    yield family.counter("observations", "Step records that the models learnt from.", _one(s.observations))
    yield family.counter(
        "observations_dropped",
        "Step records that were lost, torn, invalid, or failed to be learnt.",
        _by_name({**dict.fromkeys(DROP_REASONS, 0), **s.dropped}),
        ("reason",),
    )
    refits = {**dict.fromkeys(REFITTED, Histogram().data()), **s.refit_histograms}
    yield family.histogram("refit_duration_seconds", "Duration of a refit, by model.", refits, "model")
    yield family.gauge("sweep_progress_ratio", "Progress of the cold-start sweep, 0..1; 1 = finished.", _one(s.sweep_progress))
    yield family.counter("sweep_steps", "Decode steps spent on sweeps.", _one(s.sweep_steps))
    yield family.gauge("probe_ratio", "Share of decode time lost to probing.", _one(s.probe_share))
