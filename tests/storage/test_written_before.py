"""Files of the version before the packages (November 2026) still load: `tests/written_before`.

Made by a sidecar beside `NumbersEngine` with seed 0 for 13 s, `adaptive-spec record` of 8 s, and SIGTERM.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from adaptive_spec.config.settings import ControllerSettings
from adaptive_spec.control.controller import Controller
from adaptive_spec.domain.policy import Mode
from adaptive_spec.storage.archive import load_archive
from adaptive_spec.storage.profile import load_profile
from adaptive_spec.storage.trace import load_trace
from tests.support.numbers_engine import engine_info, verify_s

FOLDER = Path(__file__).parents[1] / "written_before"


def test_checkpoint() -> None:
    archive = load_archive(FOLDER / "checkpoint.npz", "checkpoint")
    controller = Controller(ControllerSettings(), engine_info())
    controller.restore(archive.arrays)
    snapshot = controller.snapshot(0.0)
    assert controller.mode is Mode.ACTIVE
    assert snapshot.decode_steps > 5000
    assert [b.tokens for b in snapshot.boundaries][:3] == [6, 12, 18]
    assert snapshot.output_tokens > snapshot.decode_steps


def test_profile() -> None:
    profile = load_profile(FOLDER / "profiles" / "numbers_cpu_tp1", engine_info())
    assert profile is not None
    controller = Controller(ControllerSettings(), engine_info())
    controller.restore_profile(profile.latency, profile.calibration)
    fit = controller.models.verify.fit
    assert fit is not None
    predicted, _ = fit.predict(np.array([5, 11]))
    np.testing.assert_allclose(predicted, [verify_s(5), verify_s(11)], rtol=0.03)


def test_trace() -> None:
    trace = load_trace(FOLDER / "trace.npz")
    assert trace.info.model == "numbers"
    assert len(trace.records) > 1000
    assert all(record.invalid_reason() is None for record in trace.records)
