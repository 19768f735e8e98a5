"""The store's thread: it fetches, saves and counts, and the loop never waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.storage import profile_store_worker as store_worker
from adaptive_spec.storage.profile import Profile
from adaptive_spec.storage.profile_store import ProfileStore, StoredProfile
from adaptive_spec.storage.profile_store_worker import FETCH_PATIENCE_S, StoreWorker
from tests.support.processes import wait_for
from tests.support.store_writer import accept_any, number_of, numbered
from tests.support.wire import engine

INFO = engine()


class HeldStore(ProfileStore):
    """Answers when it is let go; raises what it is told to."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.go = threading.Event()
        self.error: Exception | None = None

    def load(self, info: EngineInfo, now_s: float, usable: Callable[[Profile], object]) -> StoredProfile | None:
        self.go.wait(10)
        if self.error:
            raise self.error
        return super().load(info, now_s, usable)

    def save(self, info: EngineInfo, profile: Profile, now_s: float) -> str:
        self.go.wait(10)
        if self.error:
            raise self.error
        return super().save(info, profile, now_s)


@pytest.fixture
def held(tmp_path: Path) -> Iterator[HeldStore]:
    store = HeldStore(f"{tmp_path}/store")
    yield store
    store.go.set()


def _answer(worker: StoreWorker) -> StoredProfile | None:
    answer: tuple[StoredProfile | None] = wait_for(lambda: worker.ask(INFO, accept_any, 1.0), "the store")
    return answer[0]


def _counted(worker: StoreWorker) -> dict[str, int]:
    return {" ".join(what): n for what, n in worker.summary().items() if n}


def test_the_worker_fetches_and_saves(held: HeldStore) -> None:
    worker = StoreWorker(held)
    assert worker.ask(INFO, accept_any, 0.0) is None, "the loop goes on meanwhile"
    held.go.set()
    assert _answer(worker) is None
    worker.save(INFO, numbered(7))
    worker.close()
    assert _counted(worker) == {"fetch none": 1, "save done": 1}
    again = StoreWorker(held)
    assert number_of(_answer(again)) == 7
    assert _counted(again) == {"fetch found": 1}
    again.forget()
    held.save(INFO, numbered(8), time.time())
    assert number_of(_answer(again)) == 8
    again.close()


def test_the_loop_does_not_wait_for_a_hung_store(held: HeldStore, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = StoreWorker(held)
    assert worker.ask(INFO, accept_any, 0.0) is None
    assert worker.ask(INFO, accept_any, FETCH_PATIENCE_S - 0.1) is None
    assert worker.ask(INFO, accept_any, FETCH_PATIENCE_S) == (None,)
    for number in range(3):
        worker.save(INFO, numbered(number))
    worker.close(0.01)
    assert _counted(worker) == {"fetch late": 1, "save replaced": 2}
    held.go.set()
    wait_for(lambda: _counted(worker).get("save done"), "the newest to be saved")
    assert number_of(ProfileStore.load(held, INFO, time.time(), accept_any)) == 2
    assert _counted(worker) == {"fetch late": 1, "save replaced": 2, "save done": 1}, "a late answer is not counted twice"


def _has_failed(worker: StoreWorker, times: int) -> bool:
    return _counted(worker).get("save failed") == times


def test_failures_are_counted_and_logged_once(held: HeldStore, caplog: pytest.LogCaptureFixture) -> None:
    held.error = RuntimeError("no\ncredentials")
    held.go.set()
    worker = StoreWorker(held)
    assert _answer(worker) is None
    for failures in (1, 2):
        worker.save(INFO, numbered(1))
        wait_for(partial(_has_failed, worker, failures), "the failure")
    worker.close()
    assert _counted(worker) == {"fetch failed": 1, "save failed": 2}
    assert caplog.text.count("cannot be written: no credentials") == 1
    assert tuple(worker.summary()) == store_worker.OUTCOMES
