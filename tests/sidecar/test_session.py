from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import generate_latest

from adaptive_spec.config.settings import SidecarSettings
from adaptive_spec.control.controller import FAILED_RECORDS, FAILED_REFITS, Controller
from adaptive_spec.domain.policy import Mode
from adaptive_spec.domain.step_record import StepRecord
from adaptive_spec.engine_side.tap import PAGE_NAME, RING_NAME
from adaptive_spec.errors import BadInput
from adaptive_spec.sidecar.metrics import metrics_registry
from adaptive_spec.sidecar.session import Session, waiting_engine
from adaptive_spec.sidecar.usable import check_checkpoint, check_profile
from adaptive_spec.sidecar.view import CurrentView
from adaptive_spec.storage.archive import load_archive
from adaptive_spec.wire.policy_page import PolicyPageReader
from adaptive_spec.wire.ring import RingReader, RingWriter
from tests.support.models_anew import fits, metrics_of, models_anew, same_models, thinned
from tests.support.numbers_engine import NumbersEngine, engine_info


@pytest.fixture
def settings(tmp_path: Path) -> SidecarSettings:
    return SidecarSettings(runtime_dir=tmp_path / "run", profile_dir=tmp_path / "profiles")


@pytest.fixture
def engine(settings: SidecarSettings) -> Iterator[NumbersEngine]:
    engine = NumbersEngine(settings.runtime_dir)
    yield engine
    engine.close()


def _open(settings: SidecarSettings) -> Session:
    session = Session.open(settings)
    assert session is not None
    return session


def _swept(session: Session, engine: NumbersEngine) -> Session:
    """Alternate engine steps and iterations of the session until the sweep is over."""
    for _ in range(200):
        for _ in range(20):
            engine.step()
        session.run_once()
        session.view(None)
        if session.swept:
            return session
    raise AssertionError("the sweep does not end")


def _acting(settings: SidecarSettings) -> bool:
    with PolicyPageReader.open(settings.runtime_dir / PAGE_NAME) as page:
        policy = page.poll(time.monotonic_ns())
        assert policy is not None
        return policy.acting


def test_no_engine_no_session(settings: SidecarSettings) -> None:
    assert Session.open(settings) is None


def test_sweep_then_policy(settings: SidecarSettings, engine: NumbersEngine) -> None:
    session = _swept(_open(settings), engine)
    view = session.view(None)
    assert view.snapshot is not None
    assert view.snapshot.mode is Mode.ACTIVE
    assert [b.tokens for b in view.snapshot.boundaries][:3] == [6, 12, 18]
    assert view.attached
    assert not view.failures
    assert view.snapshot.observations == engine.steps
    assert _acting(settings)
    session.close()


def test_lost_records_are_counted(settings: SidecarSettings, engine: NumbersEngine) -> None:
    session = _open(settings)
    session.run_once()
    for _ in range(1024 + 100):
        engine.step()
    while session.run_once():
        pass
    snapshot = session.view(None).snapshot
    assert snapshot is not None
    assert snapshot.dropped["lost"] == 100
    assert snapshot.observations == 1024
    session.close()


def test_checkpoint_is_continued_where_it_was(settings: SidecarSettings, engine: NumbersEngine) -> None:
    session = _swept(_open(settings), engine)
    assert session.checkpoint()
    before = session.view(None).snapshot
    version = session.page.last_version
    session.close()  # as after kill -9: nothing else is written
    for _ in range(30):
        engine.step()
    session = _open(settings)
    assert session.origin == "checkpoint"
    while session.run_once():
        pass
    after = session.view(None).snapshot
    assert before is not None
    assert after is not None
    assert after.mode is Mode.ACTIVE
    assert after.observations == before.observations + 30
    assert after.boundaries
    assert session.page.last_version >= version
    session.close()


def test_damaged_checkpoint_is_set_aside(
    settings: SidecarSettings, engine: NumbersEngine, caplog: pytest.LogCaptureFixture
) -> None:
    session = _open(settings)
    session.checkpoint()
    version = session.page.last_version
    session.close()
    path = settings.runtime_dir / "checkpoint.npz"
    path.write_bytes(path.read_bytes()[:100])
    session = _open(settings)
    assert session.origin == "sweep"
    assert not path.exists()
    assert (settings.runtime_dir / "checkpoint.npz.damaged-1").stat().st_size == 100
    assert "checkpoint.npz is damaged" in caplog.text
    assert session.page.last_version > version
    session.close()


def test_profile_skips_the_sweep(settings: SidecarSettings, engine: NumbersEngine, caplog: pytest.LogCaptureFixture) -> None:
    session = _swept(_open(settings), engine)
    assert session.save_profile()
    session.close()
    caplog.set_level(logging.INFO)
    session = _open(settings)
    assert session.origin == "profile"
    assert "already profiled, skipping warmup" in caplog.text
    assert session.view(None).snapshot is None, "records wait to be read"
    session.run_once()
    snapshot = session.view(None).snapshot
    assert snapshot is not None
    assert snapshot.mode is Mode.ACTIVE
    assert [b.tokens for b in snapshot.boundaries][:3] == [6, 12, 18]
    session.close()


@pytest.mark.parametrize("name", ["latency_model.npz", "calibration.npz", "policy.json"])
def test_damaged_profile_is_set_aside_and_the_sweep_runs(
    settings: SidecarSettings, engine: NumbersEngine, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    session = _swept(_open(settings), engine)
    session.save_profile()
    folder = session.profile_folder
    session.close()
    (folder / name).write_bytes(b"PK nonsense")
    session = _open(settings)
    assert session.origin == "sweep"
    assert not folder.exists()
    assert (folder.with_name(f"{folder.name}.damaged-1") / name).read_bytes() == b"PK nonsense"
    assert "cannot be used" in caplog.text
    session.close()


def test_a_profile_of_another_engine_is_called_foreign(
    settings: SidecarSettings, engine: NumbersEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """As when a folder was copied by hand and renamed: nothing in it is damaged."""
    session = _swept(_open(settings), engine)
    session.save_profile()
    folder = session.profile_folder
    session.close()
    engine.close()
    other = NumbersEngine(settings.runtime_dir, replace(engine.info, fingerprint=(("quantization", "fp8"),)))
    there = settings.profile_dir / other.info.profile_name
    assert there != folder
    folder.rename(there)
    session = _open(settings)
    assert session.origin == "sweep"
    assert not there.exists()
    assert sorted(path.name for path in there.with_name(f"{there.name}.foreign-1").glob("*.npz")) == [
        "calibration.npz", "latency_model.npz",
    ]  # fmt: skip
    assert not list(settings.profile_dir.glob("*.damaged-*"))
    assert "quantization: must be fp8, got None" in caplog.text
    session.close()
    other.close()


def test_each_session_has_a_number_of_its_own(settings: SidecarSettings, engine: NumbersEngine) -> None:
    """Ids of events are unique within one: what was sent of one session says nothing of those of the next."""
    numbers = []
    for _ in range(2):
        session = _open(settings)
        engine.step()
        session.run_once()
        numbers.append(session.view(None).session)
        session.close()
    assert 0 < numbers[0] < numbers[1]


OTHER_CONFIGURATIONS: list[dict[str, Any]] = [
    {"candidates": (0, 1, 2)}, {"candidates": (0, 1, 2, 3, 4, 5, 6)}, {"max_batch": 12}, {"max_batch": 4},
]  # fmt: skip


@pytest.mark.parametrize("changes", OTHER_CONFIGURATIONS)
def test_of_a_profile_of_another_configuration_what_fits_is_kept(
    settings: SidecarSettings, engine: NumbersEngine, changes: dict[str, Any]
) -> None:
    """Same model, GPU and TP, but other draft lengths or another largest batch: the staircase is the same."""
    session = _swept(_open(settings), engine)
    session.save_profile()
    session.checkpoint()
    folder, boundaries = session.profile_folder, session.controller.snapshot(0.0).boundaries
    draft_s, _ = session.controller.models.stages["draft"].predict(2, 4)
    session.close()
    engine.close()
    other = NumbersEngine(settings.runtime_dir, replace(engine.info, **changes))
    session = _open(settings)
    assert session.origin == "profile"
    assert folder.exists()
    session.run_once()
    session.controller.refit(time.monotonic())
    assert [b.tokens for b in session.controller.snapshot(0.0).boundaries] == [b.tokens for b in boundaries]
    again_s, _ = session.controller.models.stages["draft"].predict(2, 4)
    np.testing.assert_allclose(again_s[1:, 1:], draft_s[1:, 1:], rtol=0.05, err_msg="costs of drafting, by K and batch size")
    session.close()
    other.close()
    back = NumbersEngine(settings.runtime_dir, engine.info)
    session = _open(settings)
    assert session.origin == "checkpoint", "that of this engine, kept while the other one ran"
    assert not list(settings.runtime_dir.glob("*.damaged-*"))
    session.close()
    back.close()


def test_checkpoints_of_the_last_three_other_engines_are_kept(settings: SidecarSettings) -> None:
    for number in range(6):
        engine = NumbersEngine(settings.runtime_dir, engine_info(f"model {number}"))
        session = _open(settings)
        assert session.origin == "sweep"
        assert session.checkpoint()
        session.close()
        engine.close()
    assert len(list(settings.runtime_dir.glob("checkpoint-*.npz"))) == 3
    assert not list(settings.runtime_dir.glob("*.damaged-*"))
    for number, origin in ((3, "checkpoint"), (0, "sweep")):
        engine = NumbersEngine(settings.runtime_dir, engine_info(f"model {number}"))
        session = _open(settings)
        assert session.origin == origin
        session.close()
        engine.close()


def test_the_store_is_asked_when_only_another_engine_has_a_checkpoint(settings: SidecarSettings, engine: NumbersEngine) -> None:
    assert waiting_engine(settings) is not None
    session = _open(settings)
    session.checkpoint()
    session.close()
    assert waiting_engine(settings) is None, "its own checkpoint is better"
    engine.close()
    other = NumbersEngine(settings.runtime_dir, engine_info("other"))
    assert waiting_engine(settings) == other.info
    other.close()


def _broken(*_: Any, **__: Any) -> Any:
    raise ZeroDivisionError("an error in the sidecar")


@pytest.mark.parametrize("call", ["observe", "refit", "tick"])
def test_a_controller_error_puts_the_engine_on_its_launch_k(
    settings: SidecarSettings, engine: NumbersEngine, call: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    session = _swept(_open(settings), engine)
    assert _acting(settings)
    with monkeypatch.context() as patch:
        patch.setattr(session.controller, call, _broken)
        patch.setattr(session.controller, "refit_due", lambda now_s: call == "refit")  # whatever the time
        failures = FAILED_RECORDS if call == "observe" else 3
        for _ in range(failures):
            if call == "observe":
                engine.step()
            session.run_once()
        assert session.failures[call] == failures
        assert [r.getMessage().split(" ")[0] for r in caplog.records if r.levelname == "ERROR"] == [call], "once per kind"
        assert not _acting(settings)
        assert engine.step() == engine.info.launch_k
        view = session.view(None)
        assert view.snapshot is not None
        assert view.snapshot.mode is Mode.FALLBACK
        assert view.failures == {call: failures}
    if call == "observe":
        engine.step()
        session.run_once()
    session.controller.refit(time.monotonic() + 100.0)  # without the error the next refit returns to the mode before
    assert session.controller.mode is Mode.ACTIVE
    session.close()


def test_bad_records_cost_nothing_but_themselves(
    settings: SidecarSettings, engine: NumbersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = _swept(_open(settings), engine)
    observe, before = session.controller.models.observe, session.controller.counters.observations
    bad = []

    def sometimes(record: StepRecord) -> Any:
        if record.step % 20 == 0:
            bad.append(record.step)
            raise ZeroDivisionError("a poisonous record")
        return observe(record)

    monkeypatch.setattr(session.controller.models, "observe", sometimes)
    for _ in range(300):
        engine.step()
        session.run_once()
        assert _acting(settings)
    view = session.view(None)
    assert view.snapshot is not None
    assert view.snapshot.mode is Mode.ACTIVE
    assert len(bad) >= 14
    assert view.failures == {"observe": len(bad)}
    assert view.snapshot.dropped["failed"] == len(bad)
    assert view.snapshot.observations == before + 300 - len(bad)
    session.close()


def test_a_policy_that_cannot_be_published_falls_back_and_comes_back(
    settings: SidecarSettings, engine: NumbersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = _swept(_open(settings), engine)
    with monkeypatch.context() as patch:
        # An engine cannot execute it: a NaN in the forecast.
        forecast = session.controller.models.forecast
        assert forecast is not None
        patch.setattr(session.controller.models, "forecast", replace(forecast, verify_s=forecast.verify_s * float("nan")))
        session._publish(session.controller._publish(time.monotonic()))
        assert session.failures["publish"] >= 1
        assert not _acting(settings)
        assert session.controller.mode == "fallback"
    session._publish(session.controller.refit(time.monotonic() + 100.0))
    assert session.controller.mode == "active"
    assert _acting(settings)
    session.close()


def test_launch_k_even_when_the_controller_cannot_fall_back(
    settings: SidecarSettings, engine: NumbersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = _swept(_open(settings), engine)
    for call in ("tick", "refit", "fail"):  # which of the first two is due depends on the time
        monkeypatch.setattr(session.controller, call, _broken)
    while session.run_once():
        pass
    assert session.failures["fail"] >= 1
    assert not _acting(settings)
    session.close()


def test_commands(settings: SidecarSettings, engine: NumbersEngine) -> None:
    session = _swept(_open(settings), engine)
    assert session.command("pin", 3) == ""
    assert {engine.step() for _ in range(5)} == {3}
    assert "K 9 is not one of" in session.command("pin", 9)
    assert session.command("shadow", None) == ""
    assert {engine.step() for _ in range(5)} == {engine.info.launch_k}
    session.close()


def test_models_can_be_reproduced_from_trace_and_log(
    settings: SidecarSettings, engine: NumbersEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """Bit for bit, whatever the times of the refits and the sizes of the record batches."""
    caplog.set_level(logging.DEBUG)
    with RingReader.open(settings.runtime_dir / RING_NAME) as ring:
        session = _open(settings)
        records = []
        for turn in range(150):
            for _ in range(turn % 17):
                engine.step(1 + turn // 40)
            session.run_once()
            records += ring.poll()
            if turn == 100:
                session.command("pin", 3)
            time.sleep(0.005)
        session.command("unpin", None)
    fitted = fits(caplog.text)
    assert len([fit for fit in fitted if fit.command == "refit"]) >= 2
    assert [fit.command for fit in fitted if fit.command != "refit"] == ["pin", "unpin"]
    current_view = CurrentView(0.0)
    current_view.view = session.view(None)
    session.close()
    shown = metrics_of(generate_latest(metrics_registry(current_view)).decode())
    assert shown["tile_boundary_tokens"]
    assert same_models(shown, models_anew(records, fitted, engine.info, settings.controller), 0.0) == []
    fewer, moved = thinned(records, fitted, 20)
    assert len(same_models(shown, models_anew(fewer, moved, engine.info, settings.controller), 1e-6)) > 10


def test_restarted_engine_is_followed(settings: SidecarSettings, engine: NumbersEngine) -> None:
    session = _swept(_open(settings), engine)
    assert session.follow_engine()
    engine.close()
    again = NumbersEngine(settings.runtime_dir, replace(engine.info, pid=1))
    for _ in range(50):
        again.step()
    assert session.follow_engine()
    assert session.run_once() == 50
    view = session.view(None)
    assert view.snapshot is not None
    assert view.snapshot.mode is Mode.ACTIVE
    again.close()
    other = NumbersEngine(settings.runtime_dir, engine_info("other"))
    assert not session.follow_engine()
    session.close()
    other.close()


def test_ring_of_another_version(settings: SidecarSettings) -> None:
    settings.runtime_dir.mkdir()
    path = settings.runtime_dir / RING_NAME
    RingWriter.create(path, engine_info()).close()
    data = bytearray(path.read_bytes())
    data[8] += 1
    path.write_bytes(data)
    with pytest.raises(BadInput, match=r"runtime_dir: .*records\.ring: layout version: must be 2, got 3"):
        Session.open(settings)


def _link(path: Path) -> None:
    path.symlink_to(path.with_name("elsewhere"))


def _not_private(path: Path) -> None:
    RingWriter.create(path, engine_info()).close()
    path.chmod(0o666)


@pytest.mark.parametrize("make", [_link, os.mkfifo, Path.mkdir, _not_private])
def test_what_is_no_ring_is_waited_out_and_named(
    settings: SidecarSettings, make: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    settings.runtime_dir.mkdir(mode=0o700)
    path = settings.runtime_dir / RING_NAME
    make(path)
    for _ in range(3):
        assert waiting_engine(settings) is None
        assert Session.open(settings) is None
    assert caplog.text.count("waiting for the engine to make it again") == 1
    assert str(path) in caplog.text
    engine = NumbersEngine(settings.runtime_dir)
    _open(settings).close()
    engine.close()


@pytest.mark.parametrize("kind", ["checkpoint", "profile"])
def test_what_cannot_be_set_aside_stays_and_ends_nothing(
    settings: SidecarSettings, engine: NumbersEngine, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    session = _swept(_open(settings), engine)
    assert session.save_profile()
    if kind == "checkpoint":
        assert session.checkpoint()
        damaged = settings.runtime_dir / "checkpoint.npz"
    else:
        damaged = session.profile_folder / "latency_model.npz"
    session.close()
    damaged.write_bytes(b"nonsense")

    def read_only(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as context:
        context.setattr("adaptive_spec.wire.shared_file.os.rename", read_only)
        _open(settings).close()
    assert "cannot be set aside: Read-only file system" in caplog.text
    assert damaged.exists()


def test_one_sidecar_for_one_engine(settings: SidecarSettings, engine: NumbersEngine) -> None:
    session = _open(settings)
    with pytest.raises(BadInput, match="another sidecar is writing this policy page"):
        Session.open(settings)
    session.close()


def test_models_that_cannot_be_fitted_are_not_kept_and_in_the_end_set_aside(
    settings: SidecarSettings, engine: NumbersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = _swept(_open(settings), engine)
    assert session.save_profile()
    assert session.checkpoint()
    session.command("pin", 3)
    controller = session.controller
    monkeypatch.setattr(type(controller.models), "fit", _broken)
    session._guarded("refit", controller.refit, time.monotonic())
    assert not session.save_profile()
    assert session.checkpoint(), "what was asked for is kept, with the models as they last were good"
    fresh = Controller(settings.controller, engine.info)
    monkeypatch.undo()
    check_checkpoint(load_archive(settings.runtime_dir / "checkpoint.npz", "checkpoint").arrays, settings.controller, engine.info)
    fresh.restore(load_archive(settings.runtime_dir / "checkpoint.npz", "checkpoint").arrays)
    assert fresh.mode is Mode.PINNED
    monkeypatch.setattr(type(controller.models), "fit", _broken)
    for _ in range(FAILED_REFITS):
        session._guarded("refit", controller.refit, time.monotonic())
    session.run_once()
    assert not (settings.runtime_dir / "checkpoint.npz").exists()
    assert (settings.runtime_dir / "checkpoint.npz.damaged-1").exists()
    assert not session.profile_folder.exists()
    monkeypatch.undo()
    session.command("unpin", None)
    session._publish(controller.refit(time.monotonic() + 100.0))
    assert controller.mode is Mode.SWEEP
    _swept(session, engine)
    assert session.save_profile()
    session.close()


def test_a_profile_without_what_a_policy_needs_cannot_be_used(settings: SidecarSettings, engine: NumbersEngine) -> None:
    session = _swept(_open(settings), engine)
    good = session.profile()
    calibration = {key: array for key, array in good.calibration.items() if key != "losses"}
    with pytest.raises(ValueError, match="losses"):
        check_profile(good._replace(calibration=calibration), settings.controller, engine.info)
    empty = {key: array[:0] if key == "cells.rows" else array for key, array in good.latency.items()}
    with pytest.raises(ValueError, match="no measurements"):
        check_profile(good._replace(latency=empty), settings.controller, engine.info)
    check_profile(good, settings.controller, engine.info)
    session.close()


def test_at_most_three_files_are_set_aside(settings: SidecarSettings, engine: NumbersEngine) -> None:
    for number in range(1, 7):
        (settings.runtime_dir / "checkpoint.npz").write_bytes(b"%d" % number)
        _open(settings).close()
    aside = sorted(settings.runtime_dir.glob("checkpoint.npz.damaged-*"))
    assert [(path.name[-1], path.read_bytes()) for path in aside] == [("4", b"4"), ("5", b"5"), ("6", b"6")]
