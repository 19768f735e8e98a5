"""Follows the engine of one folder: opens its session when it comes, writes its files, closes it when another engine replaces it.

A server with data parallelism has one folder, ring and page for each data-parallel rank, `{runtime_dir}/dp-N`, and one sidecar,
with one follower for each of them.
"""

from __future__ import annotations

import logging
import subprocess
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from adaptive_spec.config.settings import SidecarSettings
from adaptive_spec.runtime_folder import role_is_held
from adaptive_spec.sidecar.history import History
from adaptive_spec.sidecar.profile_plots import start_plots
from adaptive_spec.sidecar.session import Session, waiting_engine
from adaptive_spec.sidecar.usable import check_profile
from adaptive_spec.sidecar.view import View
from adaptive_spec.storage.profile_store_worker import StoreWorker
from adaptive_spec.wire.engine_report import read_report

FIRST_CHECKPOINT_S = 1.0
"""Seconds until a session's first checkpoint: a sidecar that is killed at once again has little to learn again."""
PROFILE_INTERVAL_S = 60.0
PLOTS_INTERVAL_S = 600.0
STORE_INTERVAL_S = 600.0

log = logging.getLogger(__name__)


class Intervals:
    """When something was last due, by name."""

    def __init__(self) -> None:
        self._next: dict[str, float] = {}

    def due(self, what: str, interval_s: float, now_s: float) -> bool:
        """Whether it is due; then it is due again after interval_s seconds."""
        if now_s < self._next.get(what, 0.0):
            return False
        self._next[what] = now_s + interval_s
        return True

    def put_off(self, what: str, interval_s: float, now_s: float) -> None:
        self._next[what] = now_s + interval_s


class EngineFollower:
    """See the module. settings: with the folder of the engine as runtime_dir. session: None while there is no engine.

    dp_rank: the data-parallel rank, None for a server without. Only the thread of the sidecar's loop uses it.
    """

    def __init__(self, settings: SidecarSettings, store: StoreWorker | None, dp_rank: int | None = None) -> None:
        self.settings, self.dp_rank = settings, dp_rank
        self.session: Session | None = None
        self._store = store
        self._history = History()
        self._plots: subprocess.Popen[bytes] | None = None
        self._checkpoint_s: float | None = None
        self._swept = False
        self._intervals = Intervals()

    @property
    def swept(self) -> bool:
        """Whether its models can be a prior for other ranks."""
        return self.session is not None and self.session.swept

    @property
    def alive(self) -> bool:
        """Whether a process holds the role `engine` in the folder."""
        return bool(role_is_held(self.settings.runtime_dir, "engine"))

    def follow(self, now_s: float) -> None:
        """Open the session of an engine that has come, close that of one that was replaced. Raises BadInput as `Session.open`."""
        if self.session is None:
            self._open(now_s)
        elif not self.session.follow_engine():
            log.info("another engine has replaced %s", self.session.info.model)
            self.close()
        else:
            self.session.keep_page()

    def run_once(self) -> int:
        """Learn new records and publish; returns how many were learnt."""
        return self.session.run_once() if self.session else 0

    def command(self, name: str, k: int | None) -> str:
        return self.session.command(name, k) if self.session else "no engine is attached"

    def view(self) -> View:
        """Return the state for the HTTP threads, without what belongs to the whole sidecar."""
        report = read_report(self.settings.runtime_dir)
        view = self.session.view(self._checkpoint_s) if self.session else View(time.monotonic())
        attached = view.attached and (report is None or view.info is None or report.pid != view.info.pid or report.records_come)
        self._history.add(view.snapshot, view.time_s)
        return replace(view, report=report, attached=attached, history=self._history.points)

    def write_files(self, now_s: float, *, profile: bool = True) -> None:
        """Write checkpoint, profile, stored profile and plots, each at its interval. profile: all but the checkpoint too."""
        session, due = self.session, self._intervals.due
        if session is None:
            return
        if due("checkpoint", self.settings.checkpoint_interval_s, now_s) and session.checkpoint():
            self._checkpoint_s = now_s
        just_swept = session.swept and not self._swept
        self._swept |= just_swept
        if profile and session.swept and (due("profile", PROFILE_INTERVAL_S, now_s) or just_swept) and session.save_profile():
            if self._store and (due("store", STORE_INTERVAL_S, now_s) or just_swept):
                self._store.save(session.info, session.profile())
            if self._plots and self._plots.poll() is not None:
                self._plots = None
            snapshot = session.snapshot
            if self._plots is None and snapshot and (due("plots", PLOTS_INTERVAL_S, now_s) or just_swept):
                self._plots = start_plots(session.profile_folder, snapshot)

    def take_prior(self, other: EngineFollower) -> None:
        """Begin again with the models of another rank of the same server, in place of a sweep."""
        if self.session is not None and other.session is not None and self.session.take_prior(other.session):
            self._swept = True
            log.info("data-parallel rank %s continues from the models of rank %s", self.dp_rank, other.dp_rank)

    def take_settings(self, changed: Mapping[str, Any]) -> None:
        """Take new settings. Those of the controller begin with a new session, which continues from the checkpoint."""
        again = "controller" in changed and self.session is not None
        if again:
            self.close(profile=False)
        self.settings = self.settings.model_copy(update=dict(changed))
        if again:
            self._open(time.monotonic())

    def close(self, *, profile: bool = True) -> None:
        """Write checkpoint and profile, and close the session."""
        session, self.session = self.session, None
        if session:
            session.checkpoint()
            session.view(None)
            if profile and session.swept and session.save_profile() and self._store:
                self._store.save(session.info, session.profile())
            session.close()
        if self._plots:
            self._plots.kill()
            self._plots.wait()
            self._plots = None

    def _open(self, now_s: float) -> None:
        stored = None
        if self._store and (info := waiting_engine(self.settings)):
            usable = partial(check_profile, settings=self.settings.controller, info=info)
            answer = self._store.ask(info, usable, now_s)
            if answer is None:
                return
            stored = answer[0]
        self.session = Session.open(self.settings, stored)
        if self.session:
            if self._store:
                self._store.forget()
            self._history = History()
            self._swept = self.session.origin in ("profile", "store")
            put_off = self._intervals.put_off
            put_off("checkpoint", min(FIRST_CHECKPOINT_S, self.settings.checkpoint_interval_s), now_s)
            put_off("profile", PROFILE_INTERVAL_S, now_s)
            put_off("store", STORE_INTERVAL_S, now_s)
