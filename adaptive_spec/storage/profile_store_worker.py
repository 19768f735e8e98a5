"""The profile store beside the loop: one thread that may wait for slow storage, so that the loop never does."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.errors import one_line
from adaptive_spec.storage.profile import Profile
from adaptive_spec.storage.profile_store import ProfileStore, StoredProfile

FETCH_PATIENCE_S = 10.0
CLOSE_PATIENCE_S = 5.0
OUTCOMES = (
    ("fetch", "found"), ("fetch", "none"), ("fetch", "failed"), ("fetch", "late"),
    ("save", "done"), ("save", "failed"), ("save", "replaced"),
)  # fmt: skip

log = logging.getLogger(__name__)


class StoreWorker:
    """Fetches once per engine, saves the newest profile it is given.

    counts: by (operation, result). fetch late: the answer came after 10 s, the engine was not kept waiting for it. save
    replaced: the storage was so slow that a newer profile took the place of one that had not been begun.
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
        threading.Thread(target=self._work, name="profile store", daemon=True).start()  # a hung mount must not keep us alive

    def ask(self, info: EngineInfo, usable: Callable[[Profile], object], now_s: float) -> tuple[StoredProfile | None] | None:
        """Return (profile or None,) once the store has answered or 10 s are over, until then None. Begins at the first call."""
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
                log.warning("the profile store %s has not answered within %g s", self.store.shown, FETCH_PATIENCE_S)
            return (self._found,)

    def forget(self) -> None:
        """Let the next `ask` fetch anew."""
        with self._changed:
            self._asked = self._found = None

    def save(self, info: EngineInfo, profile: Profile) -> None:
        """Hand over a profile; returns at once."""
        with self._changed:
            if self._upload is not None:
                self.counts["save", "replaced"] += 1
            self._upload = (info, profile)
            self._changed.notify_all()

    def summary(self) -> Mapping[tuple[str, str], int]:
        with self._changed:
            return dict(self.counts)

    def close(self, patience_s: float = CLOSE_PATIENCE_S) -> None:
        """Wait for what was handed over, but not for long."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: not self._busy and self._upload is None, patience_s):
                log.warning("the profile store %s is too slow: the last profile may not be there", self.store.shown)

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
        except Exception as error:  # every storage has errors of its own
            result = "failed"
            log.warning("the profile store %s cannot be read: %s", self.store.shown, one_line(error))
        with self._changed:
            if info != self._asked or self._answered:
                return  # it was counted as late, or another engine has come
            self.counts["fetch", result] += 1
            self._answered, self._found = True, found

    def _save(self, info: EngineInfo, profile: Profile) -> None:
        try:
            self.store.save(info, profile, time.time())
            result = "done"
        except Exception as error:  # every storage has errors of its own
            result = "failed"
            if not self.counts["save", "failed"]:
                log.warning("the profile store %s cannot be written: %s; now only counted", self.store.shown, one_line(error))
        with self._changed:
            self.counts["save", result] += 1
