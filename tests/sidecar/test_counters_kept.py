"""Counters over crashes of the sidecar: they never go back, and they account for every record."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread

import pytest
from prometheus_client import generate_latest

from adaptive_spec.config.settings import SidecarSettings
from adaptive_spec.sidecar.counters_page import COUNTERS_NAME
from adaptive_spec.sidecar.metrics import metrics_registry
from adaptive_spec.sidecar.session import Session
from adaptive_spec.sidecar.view import CurrentView
from tests.support.counter_series import Series, accounted, counters_of, went_back
from tests.support.numbers_engine import NumbersEngine, engine_info
from tests.support.processes import SidecarProcess


@pytest.fixture
def settings(tmp_path: Path) -> SidecarSettings:
    return SidecarSettings(runtime_dir=tmp_path / "run", profile_dir=tmp_path / "profiles")


def _open(settings: SidecarSettings) -> Session:
    session = Session.open(settings)
    assert session is not None
    return session


def _shown(session: Session) -> Series:
    current_view = CurrentView(0.0)
    current_view.view = session.view(None)
    return counters_of(generate_latest(metrics_registry(current_view)).decode())


@pytest.mark.parametrize("seed", range(3))
def test_crashes_at_random_moments(settings: SidecarSettings, seed: int) -> None:
    """A session that is dropped without a word is what kill -9 leaves behind."""
    choose = random.Random(seed)
    engine = NumbersEngine(settings.runtime_dir)
    session = _open(settings)
    before: Series = {}
    crashes = relearnt = 0
    for _ in range(160):
        for _ in range(choose.randrange(30)):
            engine.step()
        what = choose.random()
        if what < 0.7:
            session.run_once()
        if choose.random() < 0.3:
            after = _shown(session)
            assert went_back(before, after) == []
            before = after or before
        if what > 0.97:
            session.checkpoint()
        elif what > 0.88:
            crashes += 1
            session.close()
            if choose.random() < 0.2:
                for _ in range(1200):  # more than the ring holds: some records are lost
                    engine.step()
            session = _open(settings)
            relearnt += session.ring.position < session._counted_to
    while session.run_once():
        pass
    after = _shown(session)
    assert went_back(before, after) == []
    assert crashes > 5
    assert relearnt > 2
    assert accounted(after) == engine.steps
    assert after["adaptive_spec_decode_steps_total", (("gpu", "cpu"), ("model", "numbers"), ("tp", "1"))] <= engine.steps
    session.close()
    engine.close()


def test_records_behind_the_checkpoint_are_learnt_again_and_not_counted_again(settings: SidecarSettings) -> None:
    engine = NumbersEngine(settings.runtime_dir)
    session = _open(settings)
    for _ in range(300):
        engine.step()
    session.run_once()
    session.checkpoint()
    for _ in range(200):
        engine.step()
    session.run_once()
    before, waiting = _shown(session), session.controller.models.acceptance.waiting_steps
    assert waiting > 0, "labels that are not learnt yet"
    expected = session.controller.counters.expected_accepted
    scored = session.controller.models.acceptance.learn()
    exact = expected + sum(score.expected + score.unscored for score in scored)
    session.close()
    for _ in range(50):
        engine.step()
    session = _open(settings)
    assert session.origin == "checkpoint"
    assert session.view(None).snapshot is None, "nothing is shown before the backlog is read"
    assert session.run_once() == 200
    assert session.controller.models.steps == 200, "learnt again"
    assert session.controller.counters.steps == 500, "not counted again"
    assert session.controller.counters.expected_accepted == pytest.approx(exact, rel=0.02), "each label counts once"
    assert session.run_once() == 50
    after = _shown(session)
    assert went_back(before, after) == []
    assert accounted(after) == 550
    session.close()
    engine.close()


def test_an_engine_that_restarts_loses_no_record(settings: SidecarSettings) -> None:
    engine = NumbersEngine(settings.runtime_dir)
    session = _open(settings)
    for _ in range(700):
        engine.step()
    engine.close()
    again = NumbersEngine(settings.runtime_dir, replace(engine.info, pid=1))
    for _ in range(40):
        again.step()
    assert session.follow_engine()
    session.run_once()
    assert session.controller.counters.records == 740
    session.view(None)
    session.close()
    for _ in range(10):
        again.step()
    session = _open(settings)
    while session.run_once():
        pass
    assert session.controller.counters.records == 750
    session.close()
    again.close()


def test_the_same_series_continue_with_another_configuration_of_the_engine_and_others_begin_at_0(
    settings: SidecarSettings,
) -> None:
    def run(engine: NumbersEngine) -> Series:
        for _ in range(100):
            engine.step()
        session = _open(settings)
        while session.run_once():
            pass
        shown = _shown(session)
        session.close()
        engine.close()
        return shown

    first = run(NumbersEngine(settings.runtime_dir))
    fewer_k = replace(engine_info(max_batch=16), candidates=(0, 1, 2))
    second = run(NumbersEngine(settings.runtime_dir, fewer_k))
    by_k = tuple(f"adaptive_spec_{what}" for what in ("request_accepted_tokens", "reached_tokens", "run_k_steps"))
    kept = {name: v for name, v in first.items() if name in second and not name[0].startswith(by_k)}
    gone = {name for name, _ in first if not any(name == other for other, _ in second)}
    assert gone == set()
    assert went_back(kept, second) == [], "those by K begin at 0, all others continue"
    assert accounted(second) == 200
    other = run(NumbersEngine(settings.runtime_dir, engine_info("other")))
    assert accounted(other) == 100
    back = run(NumbersEngine(settings.runtime_dir))
    assert accounted(back) == 100, "a reset to 0 is what rate() knows; the last value of this series is not known any more"


@pytest.mark.parametrize("content", [b"nonsense", None])
def test_without_a_usable_page_the_counters_of_the_checkpoint_continue(settings: SidecarSettings, content: bytes | None) -> None:
    engine = NumbersEngine(settings.runtime_dir)
    session = _open(settings)
    for _ in range(100):
        engine.step()
    session.run_once()
    session.view(None)
    session.checkpoint()
    session.close()
    page = settings.runtime_dir / COUNTERS_NAME
    page.unlink()
    if content is not None:
        page.write_bytes(content)
        page.chmod(0o600)
    session = _open(settings)
    session.run_once()
    assert session.controller.counters.records == 100
    session.close()
    engine.close()


def test_kill_9_under_load(tmp_path: Path) -> None:
    """Every scrape of every process, at random moments: no counter ever goes back."""
    runtime_dir, choose = tmp_path / "run", random.Random(5)
    engine = NumbersEngine(runtime_dir)
    stop = Event()

    def drive() -> None:
        while not stop.is_set():
            engine.step()
            stop.wait(0.002)

    thread = Thread(target=drive)
    before: Series = {}
    try:
        for life in range(3):
            with SidecarProcess(runtime_dir, tmp_path / "profiles") as sidecar:
                if life == 0:
                    sidecar.wait_status(lambda status: status["engine_attached"], "the sidecar to attach")
                    thread.start()  # what is written before a first sidecar comes is not its own to account for
                sidecar.wait_status(lambda status: status.get("decode_steps"), "records to be shown")
                end_s = time.monotonic() + choose.uniform(0.0, 2.5)
                while time.monotonic() < end_s:
                    after = counters_of(sidecar.get("/metrics"))
                    assert went_back(before, after) == [], f"in life {life}"
                    before = after
                sidecar.kill()
        stop.set()
        thread.join()
        with SidecarProcess(runtime_dir, tmp_path / "profiles") as sidecar:
            sidecar.wait_status(
                lambda status: status.get("observations", 0) + sum(status.get("dropped", {}).values()) == engine.steps,
                "every record to be accounted for",
            )
            assert went_back(before, counters_of(sidecar.get("/metrics"))) == []
    finally:
        stop.set()
        if thread.ident is not None:
            thread.join()
        engine.close()
