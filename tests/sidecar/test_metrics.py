from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from adaptive_spec.config.settings import ControllerSettings, SidecarSettings
from adaptive_spec.control.controller import Controller
from adaptive_spec.control.counters import DROP_REASONS, SWAP_REASONS, Event, HistogramData
from adaptive_spec.control.k_switches import REASONS
from adaptive_spec.control.snapshot import Snapshot
from adaptive_spec.domain.policy import Granularity, Mode
from adaptive_spec.domain.staircase import Boundary, Segment
from adaptive_spec.models.model_set import REFITTED
from adaptive_spec.sidecar.metrics import metrics_registry
from adaptive_spec.sidecar.session import Session
from adaptive_spec.sidecar.view import CALLS, CurrentView, View
from tests.support.numbers_engine import NumbersEngine, engine_info
from tests.support.simulated_server import SimulatedServer, staircase
from tests.support.simulated_server import engine_info as simulated_info

CONTRACT = {
    "tile_boundary_tokens": ("gauge", {"boundary"}),
    "tile_jump_ratio": ("gauge", {"boundary"}),
    "latency_segment_intercept_seconds": ("gauge", {"segment"}),
    "latency_segment_slope_seconds_per_token": ("gauge", {"segment"}),
    "step_duration_seconds": ("histogram", {"stage"}),
    "predicted_step_seconds_total": ("counter", set()),
    "measured_step_seconds_total": ("counter", set()),
    "draft_tokens_total": ("counter", {"position"}),
    "verified_tokens_total": ("counter", {"position"}),
    "accepted_tokens_total": ("counter", {"position"}),
    "expected_accepted_tokens_total": ("counter", set()),
    "output_tokens_total": ("counter", set()),
    "decode_steps_total": ("counter", set()),
    "calibration_error_ratio": ("gauge", set()),
    "calibration_brier_ratio": ("gauge", set()),
    "calibration_log_loss": ("gauge", set()),
    "calibration_curve_probability": ("gauge", {"score"}),
    "drift_events_total": ("counter", {"signal"}),
    "policy_version": ("gauge", set()),
    "policy_age_seconds": ("gauge", set()),
    "policy_draft_tokens": ("gauge", {"batch_size"}),
    "policy_swaps_total": ("counter", {"reason"}),
    "k_switches_total": ("counter", {"reason"}),
    "plan_limited_steps_total": ("counter", set()),
    "k_switch_cost_seconds": ("gauge", set()),
    "policy_predicted_gain_ratio": ("gauge", set()),
    "policy_measured_gain_ratio": ("gauge", set()),
    "observations_total": ("counter", set()),
    "observations_dropped_total": ("counter", {"reason"}),
    "refit_duration_seconds": ("histogram", {"model"}),
    "mode": ("gauge", {"mode"}),
    "engine_attached": ("gauge", set()),
    "build_info": ("gauge", {"version", "python"}),
    "engine_info": ("gauge", {"engine"}),
}

HISTOGRAM = HistogramData((0.001, 0.002), (3, 1, 2), 0.0123)
SNAPSHOT = Snapshot(
    time_s=5.0, mode=Mode.ACTIVE, reason="sweep done", engine="test", launch_k=2, policy_version=7, policy_time_s=4.0,
    k_by_batch_size={1: 4, 2: 3}, segments=(Segment(1, 6, 1e-3, 2e-6), Segment(7, 12, 1.5e-3, 3e-6)),
    boundaries=(Boundary(6, 1.5),), latency_points=((1, 1e-3, 4.0),), latency_mape=0.01, stage_histograms={"verify": HISTOGRAM},
    predicted_step_s_total=1.5, measured_step_s_total=1.6, draft_tokens=(40, 30), verified_tokens=(40, 20),
    accepted_tokens=(30, 10), expected_accepted_tokens=39.5,
    output_tokens=60, decode_steps=20, goodput_tokens_per_s=100.0, calibration_kind="chain",
    calibration_error=0.02, calibration_brier=0.2, calibration_log_loss=0.5, calibration_curve=((0.5, 0.45, 0.5, 9),),
    drift_events={"latency": 1}, swaps={"sweep": 1, "gain": 2}, predicted_gain=0.2, measured_gain=-0.1, observations=20,
    dropped={"lost": 3}, refit_histograms={"all": HISTOGRAM}, sweep_steps=12, sweep_progress=1.0, sweep_s=0.5, probe_share=0.001,
    events=(Event(1.0, "swap", "K 2 to 3"),), k_switches={"trial": 4}, limited_steps=7, switch_s=0.0003,
    estimated_gain=-0.1, reached_tokens=(40, 15), accept_lens=(5, 2, 3), run_steps={(1, 0): 0, (1, 2): 4},
)  # fmt: skip


def _families(view: View, openmetrics: bool = False) -> dict[str, Metric]:
    current_view = CurrentView(0.0)
    current_view.view = view
    registry = metrics_registry(current_view)
    if openmetrics:
        # prometheus_client leaves this pair of functions untyped.
        text = generate_openmetrics(registry).decode()  # type: ignore[no-untyped-call]
        return {m.name: m for m in parse_openmetrics(text)}  # type: ignore[no-untyped-call]
    return {m.name: m for m in text_string_to_metric_families(generate_latest(registry).decode())}


def _value(families: dict[str, Metric], sample: str, **labels: str) -> float:
    family = families["adaptive_spec_" + sample.removesuffix("_total").removesuffix("_bucket").removesuffix("_count")]
    found = [s for s in family.samples if s.name == f"adaptive_spec_{sample}" and labels.items() <= s.labels.items()]
    assert len(found) == 1, found
    return float(found[0].value)


@pytest.mark.parametrize("openmetrics", [False, True])
def test_every_name_of_the_contract(openmetrics: bool) -> None:
    families = _families(View(5.0, SNAPSHOT, engine_info(), True), openmetrics)
    for name, (kind, labels) in CONTRACT.items():
        # refit_duration_seconds has its own label `model`, so not the engine's.
        constant = {key: value for key, value in {"model": "numbers", "gpu": "cpu", "tp": "1"}.items() if key not in labels}
        family = families["adaptive_spec_" + name.removesuffix("_total")]
        assert family.type == kind, name
        assert family.samples, name
        for sample in family.samples:
            assert constant.items() <= sample.labels.items()
            assert sample.labels.keys() - constant.keys() - {"le"} == labels, name
            if kind == "counter":
                assert sample.name == f"adaptive_spec_{name}"


def test_values() -> None:
    families = _families(View(5.0, SNAPSHOT, engine_info(), True, {"refit": 2}))
    assert _value(families, "tile_boundary_tokens", boundary="0") == 6
    assert _value(families, "tile_jump_ratio", boundary="0") == 1.5
    assert _value(families, "latency_segment_slope_seconds_per_token", segment="1") == 3e-6
    assert _value(families, "accepted_tokens_total", position="2") == 10
    assert _value(families, "policy_draft_tokens", batch_size="2") == 3
    assert _value(families, "policy_swaps_total", reason="gain") == 2
    assert _value(families, "k_switches_total", reason="trial") == 4
    assert _value(families, "k_switches_total", reason="allowed") == 0, "every reason from the start"
    assert _value(families, "plan_limited_steps_total") == 7
    assert _value(families, "reached_tokens_total", position="2") == 15
    assert _value(families, "request_accepted_tokens_count") == 10
    assert _value(families, "request_accepted_tokens_bucket", le="1.0") == 7
    assert _value(families, "run_k_steps_total", batch_size="1", k="0") == 0, "every batch size and K from the start"
    assert _value(families, "run_k_steps_total", batch_size="1", k="2") == 4
    assert _value(families, "k_switch_cost_seconds") == 0.0003
    assert _value(families, "policy_measured_gain_ratio") == -0.1
    assert _value(families, "drift_events_total", signal="latency") == 1
    assert _value(families, "drift_events_total", signal="calibration") == 0
    assert _value(families, "observations_dropped_total", reason="lost") == 3
    assert _value(families, "calibration_curve_probability", score="0.500") == 0.45
    assert _value(families, "controller_failures_total", call="refit") == 2
    assert [_value(families, "mode", mode=m.value) for m in Mode] == [float(m is Mode.ACTIVE) for m in Mode]
    assert _value(families, "step_duration_seconds_bucket", stage="verify", le="0.002") == 4
    assert _value(families, "step_duration_seconds_bucket", stage="verify", le="+Inf") == 6
    assert _value(families, "step_duration_seconds_count", stage="verify") == 6


def test_unknown_is_left_out_and_never_zero() -> None:
    unknown = replace(
        SNAPSHOT, calibration_error=None, measured_gain=None, latency_mape=None, goodput_tokens_per_s=None, policy_version=0
    )
    families = _families(View(5.0, unknown, engine_info(), True))
    for name in ("calibration_error_ratio", "policy_measured_gain_ratio", "latency_error_ratio", "policy_age_seconds"):
        assert not families[f"adaptive_spec_{name}"].samples


def test_before_an_engine() -> None:
    families = _families(View(5.0))
    assert _value(families, "engine_attached") == 0
    assert _value(families, "mode", mode="fallback") == 1
    assert _value(families, "build_info") == 1
    assert "adaptive_spec_observations" not in families
    assert "process_resident_memory_bytes" in families


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian package prometheus) is not installed; CI has it")
@pytest.mark.parametrize("view", [View(5.0), View(5.0, SNAPSHOT, engine_info(), True, {"refit": 2}, "sweep", 4.0)])
def test_promtool_finds_nothing(view: View) -> None:
    current_view = CurrentView(0.0)
    current_view.view = view
    text = generate_latest(metrics_registry(current_view))
    result = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")


def test_a_version_without_a_time_has_no_age() -> None:
    """After a restart, before the first publication of this process."""
    families = _families(View(5.0, replace(SNAPSHOT, policy_time_s=None), engine_info(), True))
    assert not families["adaptive_spec_policy_age_seconds"].samples


def test_every_counter_has_a_series_before_its_first_event(tmp_path: Path) -> None:
    """Without one, increase() misses the first event."""
    engine = NumbersEngine(tmp_path / "run")
    session = Session.open(SidecarSettings(runtime_dir=tmp_path / "run", profile_dir=tmp_path / "profiles"))
    assert session is not None
    current_view = CurrentView(0.0)
    current_view.view = session.view(None)
    families = {f.name: f for f in metrics_registry(current_view).collect()}
    wanted = {
        "policy_swaps": ("reason", SWAP_REASONS), "observations_dropped": ("reason", DROP_REASONS),
        "controller_failures": ("call", CALLS), "drift_events": ("signal", ("latency", "calibration")),
        "k_switches": ("reason", REASONS), "slo_requests": ("result", ("within", "beyond")),
    }  # fmt: skip
    for name, (label, values) in wanted.items():
        samples = {s.labels[label]: s.value for s in families[f"adaptive_spec_{name}"].samples if s.name.endswith("_total")}
        assert samples == dict.fromkeys(values, 0.0), name
    refits = {s.labels["model"] for s in families["adaptive_spec_refit_duration_seconds"].samples}
    assert refits == set(REFITTED)
    for _ in range(5):
        engine.step()
    session.run_once()
    session.controller.refit(1.0, session._stopwatch)
    assert set(session.controller.counters.refits) == set(REFITTED)
    session.close()
    engine.close()


def test_batch_size_series_are_bounded_and_stay() -> None:
    info = replace(engine_info(max_batch=4096), holds_batch=False)
    controller = Controller(ControllerSettings(), info)
    record = SimulatedServer(simulated_info(Granularity.BATCH), staircase()).step()
    before: set[int] = set()
    for b in (1, 3, 40, 4096, 700, 1):
        rows = np.zeros(b, np.uint8)
        for _ in range(3):
            controller.observe(
                replace(
                    record, batch_size=b, k=0, num_tokens=b, padded_tokens=b, verify_len=rows, accept_len=rows,
                    confidences=np.zeros((b, 0), np.float32), request_ids=np.arange(b, dtype=np.uint32),
                ),
                0.0,
            )  # fmt: skip
        shown = set(controller.snapshot(0.0).k_by_batch_size)
        assert before <= shown
        assert min(b, 64) in shown
        before = shown
    assert len(before) <= 64 + 6
