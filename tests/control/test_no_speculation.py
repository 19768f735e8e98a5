"""The gain over no speculation, from the profile that a server without speculation has left."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from adaptive_spec.config.settings import ControllerSettings, SidecarSettings
from adaptive_spec.control.controller import Controller
from adaptive_spec.control.no_speculation import LEAST_STEPS, GainOverNoSpeculation, without_speculation
from adaptive_spec.domain.policy import Granularity
from adaptive_spec.domain.step_record import StepFlag, StepRecord
from adaptive_spec.sidecar.session import Session
from adaptive_spec.sidecar.status_document import status_document
from adaptive_spec.storage.profile import Profile, save_profile
from tests.control.test_without_speculation import _record
from tests.support.numbers_engine import NumbersEngine, engine_info

ENGINE = replace(engine_info(), fingerprint=(("draft", "d"), ("engine", "x"), ("speculative_algorithm", "EAGLE")))
SETTINGS = ControllerSettings(mode="shadow")


def _profile(batch_sizes: int = 8) -> Profile:
    controller = Controller(SETTINGS, without_speculation(ENGINE))
    for step in range(1, 600):
        controller.observe(_record(step, 1 + step % batch_sizes), 0.01 * step)
        controller.tick(0.01 * step)
    return Profile(controller.latency_state(), controller.calibration_state())


def _step(accepted: int, step_s: float, batch_size: int = 4, flags: int = 0) -> StepRecord:
    rows = np.full(batch_size, accepted, np.uint8)
    return StepRecord(
        1, 1, 100 * batch_size, 1, batch_size * 4, batch_size * 4, batch_size, 3, flags, 0.0, 0.5 * step_s, 0.0, step_s,
        np.full((batch_size, 3), 0.5, np.float32), np.full(batch_size, 3, np.uint8), rows, np.arange(batch_size, dtype=np.uint32),
    )  # fmt: skip


def test_it_is_the_same_engine_without_a_draft() -> None:
    plain = without_speculation(ENGINE)
    assert (plain.launch_k, plain.candidates, plain.granularity) == (0, (0,), Granularity.BATCH)
    assert plain.fingerprint == (("engine", "x"),)
    assert plain.profile_name == without_speculation(replace(ENGINE, candidates=(1, 3), pid=7)).profile_name
    assert plain.profile_name != ENGINE.profile_name


def test_the_gain_is_that_of_the_same_tokens() -> None:
    profile = _profile()
    against = GainOverNoSpeculation(SETTINGS, without_speculation(ENGINE), profile.latency, profile.calibration)
    plain_s = 1e-3 + 1e-4  # four requests are within the first tile
    for _ in range(LEAST_STEPS - 1):
        against.observe(_step(1, 2.0 * plain_s))
    assert against.gain is None
    against.observe(_step(1, 2.0 * plain_s))
    assert against.gain == pytest.approx(0.0, abs=0.03), "twice the tokens in twice the time"
    for _ in range(4000):
        against.observe(_step(2, 2.0 * plain_s))
    assert against.gain == pytest.approx(0.5, abs=0.04)
    before = against.gain
    against.observe(_step(2, 100.0, flags=int(StepFlag.DISTURBED)))
    assert against.gain == before


def test_batch_sizes_that_were_not_measured_do_not_count() -> None:
    profile = _profile(batch_sizes=2)
    against = GainOverNoSpeculation(SETTINGS, without_speculation(ENGINE), profile.latency, profile.calibration)
    for _ in range(2 * LEAST_STEPS):
        against.observe(_step(1, 1e-3, batch_size=4))
    assert against.gain is None


def test_a_session_shows_it(tmp_path: Path) -> None:
    plain = without_speculation(ENGINE)
    settings = SidecarSettings(runtime_dir=tmp_path / "run", profile_dir=tmp_path / "profiles", controller=SETTINGS)
    engine = NumbersEngine(settings.runtime_dir, ENGINE)
    try:
        for with_profile in (False, True):
            session = Session.open(settings)
            assert session is not None
            for _ in range(2 * LEAST_STEPS):
                engine.step(2)
            while session.run_once():
                pass
            view = session.view(None)
            gain = status_document(view, view.time_s, view.time_s)["gain_over_no_speculation"]
            assert (gain is not None) == with_profile
            session.close()
            save_profile(settings.profile_dir / plain.profile_name, plain, _profile(), {"candidates": [0], "table": []})
    finally:
        engine.close()
