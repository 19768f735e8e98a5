"""A thread that calls the profile store, so that the sidecar's loop never waits for storage."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.storage.profile import Profile
from adaptive_spec.storage.profile_store import ProfileStore, StoredProfile

FETCH_PATIENCE_S = 10.0
"""Seconds an engine waits for the store before it starts without."""
CLOSE_PATIENCE_S = 5.0
"""Seconds that `close` waits for a profile being saved."""
OUTCOMES = (
    ("fetch", "found"), ("fetch", "none"), ("fetch", "failed"), ("fetch", "late"),
    ("save", "done"), ("save", "failed"), ("save", "replaced"),
)  # fmt: skip

log = logging.getLogger(__name__)


class StoreWorker:
    """Fetches once per engine and saves the newest profile it is given.

    counts: by (operation, result). fetch late: no answer within FETCH_PATIENCE_S. save replaced: a newer profile came before the
    saving of this one began.
    """

    def __init__(self, store: ProfileStore) -> None:
        self.store = store
        self.counts = dict.fromkeys(OUTCOMES, 0)
        self._changed = threading.Condition()
        self._wanted: tuple[EngineInfo, Callable[[Profile], object]] | None = None
        self._asked: EngineInfo | None = None
        self._asked_s = 0.0
        self._answered = False
        self._found: StoredProfile | None = None
        self._upload: tuple[EngineInfo, Profile] | None = None
        self._busy = self._closing = False
        threading.Thread(
            target=self._work, name="profile store", daemon=True
        ).start()  # daemon: a hung mount must not keep the process running

    def ask(self, info: EngineInfo, usable: Callable[[Profile], object], now_s: float) -> tuple[StoredProfile | None] | None:
        """Begin a fetch at the first call. Return None while it runs, at most FETCH_PATIENCE_S, then (profile or None,).

        info, usable: see `ProfileStore.load`. now_s: seconds of any clock, the same at each call.
        """
        engine = replace(info, pid=0)
        with self._changed:
            if engine != self._asked:
                self._asked, self._asked_s, self._answered, self._found = engine, now_s, False, None
                self._wanted = (engine, usable)
                self._changed.notify_all()
            if not self._answered and now_s - self._asked_s < FETCH_PATIENCE_S:
                return None
            if not self._answered:
                self._answered = True
                self.counts["fetch", "late"] += 1
                log.warning("profile store %s: no answer within %g s", self.store.shown, FETCH_PATIENCE_S)
            return (self._found,)

    def forget(self) -> None:
        """Make the next `ask` begin a new fetch."""
        with self._changed:
            self._asked = self._found = None

    def save(self, info: EngineInfo, profile: Profile) -> None:
        """Give a profile to the thread. Does not wait."""
        with self._changed:
            if self._upload is not None:
                self.counts["save", "replaced"] += 1
            self._upload = (info, profile)
            self._changed.notify_all()

    def summary(self) -> Mapping[tuple[str, str], int]:
        with self._changed:
            return dict(self.counts)

    def close(self, patience_s: float = CLOSE_PATIENCE_S) -> None:
        """End the thread after the profile it was given is saved; wait at most patience_s seconds for that."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: not self._busy and self._upload is None, patience_s):
                log.warning("profile store %s: too slow: the last profile may not be saved", self.store.shown)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._wanted is not None or self._upload is not None or self._closing)
                if self._closing and self._upload is None:
                    return
                wanted, self._wanted = self._wanted, None
                upload = None
                if wanted is None:
                    upload, self._upload = self._upload, None
                self._busy = True
            if wanted is not None:
                self._fetch(*wanted)
            elif upload is not None:
                self._save(*upload)

    def _fetch(self, info: EngineInfo, usable: Callable[[Profile], object]) -> None:
        found = None
        try:
            found = self.store.load(info, time.time(), usable)
            result = "none" if found is None else "found"
        except Exception as error:  # each storage has its own exceptions
            result = "failed"
            log.warning("profile store %s: cannot be read: %s", self.store.shown, self.store.reason(error))
            self.store.drop_connection()
        with self._changed:
            if info != self._asked or self._answered:
                return  # already counted as late, or the engine has changed
            self.counts["fetch", result] += 1
            self._answered, self._found = True, found

    def _save(self, info: EngineInfo, profile: Profile) -> None:
        try:
            self.store.save(info, profile, time.time())
            result = "done"
        except Exception as error:  # each storage has its own exceptions
            result = "failed"
            if not self.counts["save", "failed"]:
                log.warning(
                    "profile store %s: cannot be written: %s; from now on only counted",
                    self.store.shown,
                    self.store.reason(error),
                )
            self.store.drop_connection()
        with self._changed:
            self.counts["save", result] += 1
