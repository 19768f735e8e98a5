"""The contents of /status.json, /explain.json and /history.json."""

from __future__ import annotations

import os
from typing import Any

from adaptive_spec import __version__
from adaptive_spec.domain.policy import Mode
from adaptive_spec.sidecar.history import INTERVAL_S, HistoryPoint
from adaptive_spec.sidecar.view import View

SHOWN_OF_A_RANK = (
    "mode", "reason", "engine_attached", "engine_pid", "policy_version", "k_by_batch_size", "batch_size", "last_k",
    "goodput_tokens_per_s", "decode_steps", "output_tokens", "origin",
)  # fmt: skip
"""Of each data-parallel rank in /status.json; the whole of it is at /status.json?dp_rank=N."""


def view_of_rank(view: View, dp_rank: int | None) -> View:
    """Return the view of a data-parallel rank, None: the given one. Raises ValueError, one line, for a rank that there is not."""
    if dp_rank is None:
        return view
    if dp_rank not in view.dp_ranks:
        there = ", ".join(str(rank) for rank in view.dp_ranks) or "none: the server runs without data parallelism"
        raise ValueError(f"dp_rank: must be one of the server's ({there}), got {dp_rank}")
    return view.dp_ranks[dp_rank]


def status_document(view: View, heartbeat_s: float, now_s: float) -> dict[str, Any]:
    """Return the contents of /status.json, described in docs/architecture.md. Times are in seconds, `_ms` in milliseconds."""
    document = _of_engine(view, heartbeat_s, now_s)
    if view.dp_ranks:
        ranks = {rank: _of_engine(one, heartbeat_s, now_s) for rank, one in view.dp_ranks.items()}
        document["dp_ranks"] = {str(rank): {key: one.get(key) for key in SHOWN_OF_A_RANK} for rank, one in ranks.items()}
    return document


def _of_engine(view: View, heartbeat_s: float, now_s: float) -> dict[str, Any]:
    info, s = view.info, view.snapshot
    document: dict[str, Any] = {
        "version": __version__,
        "mode": Mode.FALLBACK.value,
        "reason": "reading the records of the engine" if info else "waiting for an engine",
        "policy_version": 0,
        "k_by_batch_size": {},
        "boundaries": [],
        "sidecar_pid": os.getpid(),
        "engine_pid": info.pid if info else None,
        "engine_attached": view.attached,
        "policy_ignored": view.policy_ignored,
        "loop_age_s": round(now_s - heartbeat_s, 3),
        "failures": dict(view.failures),
        "origin": view.origin,
        "profile_store": None if view.store is None else {f"{what} {result}": n for (what, result), n in view.store.items()},
    }
    if (server := view.server_reported) is not None:
        document["server_reported"] = {
            "url": server.url, "accept_length": server.accept_length, "accept_rate": server.accept_rate,
            "running_requests": server.running_requests, "tokens_per_s": server.tokens_per_s,
            "age_s": round(now_s - server.time_s, 3), "failure": server.failure,
        }  # fmt: skip
    if (report := view.report) is not None:
        document["engine_report"] = {
            "pid": report.pid, "engine": report.engine, "state": report.state, "reason": report.reason,
            "failures": dict(report.failures), "counters": dict(report.counters),
            "level": report.level,
        }  # fmt: skip
        if not info and report.reason:
            document["reason"] = report.reason
    if info:
        document["engine"] = {
            "name": info.name, "model": info.model, "gpu": info.gpu, "tp": info.tp, "launch_k": info.launch_k,
            "candidates": list(info.candidates), "max_batch": info.max_batch, "granularity": info.granularity.value,
            "allowed_from": {str(b): list(ks) for b, ks in info.allowed_ranges()},
        }  # fmt: skip
    if not s:
        return document
    why = report.reason if s.observe_only and report is not None and report.state == "observing" else ""
    if view.policy_ignored:
        why = "the engine does not follow the policy page: see the runbook PolicyIgnored"
    document |= {
        "mode": s.mode.value,
        "reason": f"{s.reason} ({why})" if why else s.reason,
        "policy_version": s.policy_version,
        "policy_age_s": round(now_s - s.policy_time_s, 3) if s.policy_version and s.policy_time_s is not None else None,
        "k_by_batch_size": {str(b): k for b, k in s.k_by_batch_size.items()},
        "batch_size": s.batch_size or None,
        "last_k": s.last_k,
        "slo_tpot_ms": None if s.slo_tpot_s is None else 1e3 * s.slo_tpot_s,
        "slo_requests": dict(s.slo_requests),
        "boundaries": [b.tokens for b in s.boundaries],
        "jump_ratios": [b.jump_ratio for b in s.boundaries],
        "segments": [
            {"first": p.first, "last": p.last, "intercept_ms": 1e3 * p.intercept_s,
             "slope_ms_per_token": 1e3 * p.slope_s_per_token}
            for p in s.segments
        ],
        "latency_points": [[tokens, 1e3 * mean, weight] for tokens, mean, weight in s.latency_points],
        "latency_mape": s.latency_mape,
        "calibration": {
            "kind": s.calibration_kind, "ece": s.calibration_error, "brier": s.calibration_brier,
            "log_loss": s.calibration_log_loss,
            "curve": [list(row) for row in s.calibration_curve],
        },
        "goodput_tokens_per_s": s.goodput_tokens_per_s,
        "decode_steps": s.decode_steps,
        "output_tokens": s.output_tokens,
        "draft_tokens": list(s.draft_tokens),
        "verified_tokens": list(s.verified_tokens),
        "accepted_tokens": list(s.accepted_tokens),
        "expected_accepted_tokens": s.expected_accepted_tokens,
        "drift_events": dict(s.drift_events),
        "swaps": dict(s.swaps),
        "k_switches": dict(s.k_switches),
        "plan_limited_steps": s.limited_steps,
        "k_switch_ms": None if s.switch_s is None else 1e3 * s.switch_s,
        "predicted_gain": s.predicted_gain,
        "measured_gain": s.measured_gain,
        "measured_gain_error": s.measured_gain_error,
        "estimated_gain": s.estimated_gain,
        "gain_over_no_speculation": view.gain_over_no_speculation,
        "observations": s.observations,
        "dropped": dict(s.dropped),
        "sweep": {"steps": s.sweep_steps, "progress": s.sweep_progress, "duration_s": s.sweep_s},
        "probe_share": s.probe_share,
        "events": [
            {"id": e.id, "time_s": e.time_s, "age_s": round(now_s - e.time_s, 1), "kind": e.kind, "text": e.text}
            for e in s.events
        ],
    }  # fmt: skip
    return document


def explain_document(view: View, batch_size: int | None, now_s: float) -> dict[str, Any]:
    """Return the contents of /explain.json: why a batch size (None: that of the latest step) has its K.

    Raises ValueError, with one line that says why, for a batch size the engine does not have and before the first decision.
    """
    s = view.snapshot
    if s is None or s.considered is None:
        why = "no engine is attached" if s is None else f"mode {s.mode.value}: {s.reason}"
        raise ValueError(f"nothing was decided yet ({why})")
    batch_size = max(s.batch_size, 1) if batch_size is None else batch_size
    if not 1 <= batch_size <= s.considered.max_batch:
        raise ValueError(f"batch: must be in 1..{s.considered.max_batch}, got {batch_size}")
    e = s.considered.explain(batch_size, s.context)
    in_force = s.k_by_batch_size.get(batch_size)
    note = ""
    if s.mode is not Mode.ACTIVE:
        note = f"mode {s.mode.value} ({s.reason}): the last decision does not set K"
    elif in_force not in (None, e.wanted):
        note = f"K {in_force} stays in force until enough time has passed since the last swap (min_dwell_s)"
    return {
        "batch_size": e.batch_size, "mode": s.mode.value, "k": e.wanted, "k_before": e.before, "k_in_force": in_force,
        "note": note, "launch_k": s.launch_k, "decided_age_s": round(now_s - e.time_s, 1),
        "kv_tokens_per_request": e.kv_per_request,
        "k_switch_ms": 1e3 * e.switch_s if e.switch_s else None,
        "plans": [
            {
                "k": p.k, "expected_tokens": p.tokens, "stage_ms": {name: 1e3 * seconds for name, seconds in p.stage_s.items()},
                "step_ms": 1e3 * p.step_s, "goodput_tokens_per_s": p.goodput,
                "goodput_error_tokens_per_s": p.goodput * p.goodput_error, "k_switches_tokens_per_s": p.switches_tokens_per_s,
                "gain": p.gain, "hurdle": p.hurdle, "verdict": p.verdict,
            }
            for p in e.plans
        ],
    }  # fmt: skip


def history_document(view: View, now_s: float) -> dict[str, Any]:
    """Return the contents of /history.json: one list per field of `HistoryPoint`, oldest first, with ages instead of times."""
    columns: dict[str, Any] = {"age_s": [round(now_s - point.time_s, 1) for point in view.history]}
    for name in HistoryPoint._fields[1:]:
        columns[name] = [getattr(point, name) for point in view.history]
    return {"interval_s": INTERVAL_S, **columns}
