"""The sidecar process: waits for an engine, runs its session, serves HTTP, writes checkpoint and profile."""

from __future__ import annotations

import logging
import os
import queue
import signal
import subprocess
import threading
import time
from dataclasses import replace
from functools import partial

from adaptive_spec import __version__
from adaptive_spec.config.settings import SidecarSettings
from adaptive_spec.control.controller import Controller
from adaptive_spec.sidecar.certificates import Certificates
from adaptive_spec.sidecar.grafana import Annotator
from adaptive_spec.sidecar.history import History
from adaptive_spec.sidecar.http_server import WebServer
from adaptive_spec.sidecar.own_files import OwnFiles
from adaptive_spec.sidecar.profile_plots import start_plots
from adaptive_spec.sidecar.session import Session, waiting_engine
from adaptive_spec.sidecar.view import CurrentView, View
from adaptive_spec.storage.profile import check_writable
from adaptive_spec.storage.profile_store import ProfileStore
from adaptive_spec.storage.profile_store_worker import StoreWorker
from adaptive_spec.storage.signature import read_key
from adaptive_spec.wire.engine_report import read_report

VIEW_INTERVAL_S = 0.25
BEAT_INTERVAL_S = 1.0
FOLLOW_INTERVAL_S = 0.25
FIRST_CHECKPOINT_S = 1.0
"""Seconds until a session's first checkpoint: a sidecar that is killed at once again has little to learn again."""
PROFILE_INTERVAL_S = 60.0
PLOTS_INTERVAL_S = 600.0
STORE_INTERVAL_S = 600.0

log = logging.getLogger(__name__)


class Sidecar:
    """The sidecar's loop. `run` returns after SIGTERM or SIGINT, when checkpoint and profile are written.

    Raises BadInput for what the operator must correct: a folder, the port, the token file, a ring of another version.
    """

    def __init__(self, settings: SidecarSettings) -> None:
        self.settings = settings
        self._own_files = OwnFiles(settings.runtime_dir, settings.control_token_file)
        try:
            check_writable(settings.profile_dir)
            self._store = _store_worker(settings)
            self._annotator = Annotator.of(settings.grafana)
            self._current_view = CurrentView(time.monotonic())
            certificates = _certificates(settings)
            self._web = WebServer(
                self._current_view, settings.host, settings.port, self._own_files.token, settings.allowed_hosts, certificates
            )
        except BaseException:
            self._own_files.close()
            raise
        self._stop = threading.Event()
        self._session: Session | None = None
        self._history = History()
        self._plots: subprocess.Popen[bytes] | None = None
        self._checkpoint_s: float | None = None
        self._swept = False
        self._next: dict[str, float] = {}

    def run(self) -> None:
        """Run the loop until SIGTERM or SIGINT."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop.set())
        self._own_files.announce(self._web.url, self.settings.certfile)
        log.info("adaptive-spec %s, pid %d, serving on %s", __version__, os.getpid(), self._web.url)
        log.info("waiting for an engine in %s", self.settings.runtime_dir)
        try:
            while not self._stop.is_set():
                self._run_once()
        finally:
            self._close_session()
            if self._store:
                self._store.close()
            if self._annotator:
                self._annotator.close()
            self._web.close()
            self._own_files.close()
        log.info("stopped")

    def _run_once(self) -> None:
        now_s = time.monotonic()
        if self._due("follow", FOLLOW_INTERVAL_S, now_s):
            self._own_files.keep()
            if self._session is None:
                self._open_session(now_s)
            elif not self._session.follow_engine():
                log.info("another engine has replaced %s", self._session.info.model)
                self._close_session()
            else:
                self._session.keep_page()
        learnt = self._session.run_once() if self._session else 0
        answered = self._answer_commands()
        if self._due("view", VIEW_INTERVAL_S, now_s) or answered:
            self._update_view()
        for command in answered:
            command.set()
        if self._session:
            self._write_files(self._session, now_s)
        self._current_view.heartbeat_s = time.monotonic()
        if self._due("beat", BEAT_INTERVAL_S, now_s):
            self._own_files.beat()
        if not learnt:
            self._stop.wait(self.settings.poll_interval_s)

    def _open_session(self, now_s: float) -> None:
        stored = None
        if self._store and (info := waiting_engine(self.settings)):
            fresh = partial(Controller, self.settings.controller, info)
            answer = self._store.ask(info, lambda profile: fresh().restore_profile(*profile), now_s)
            if answer is None:
                return
            stored = answer[0]
        self._session = Session.open(self.settings, stored)
        if self._session:
            if self._store:
                self._store.forget()
            if self._annotator:
                self._annotator.begin()
            self._history = History()
            self._swept = self._session.origin in ("profile", "store")
            self._next["checkpoint"] = now_s + min(FIRST_CHECKPOINT_S, self.settings.checkpoint_interval_s)
            self._next["profile"] = now_s + PROFILE_INTERVAL_S
            self._next["store"] = now_s + STORE_INTERVAL_S

    def _close_session(self) -> None:
        session, self._session = self._session, None
        if session:
            session.checkpoint()
            session.view(None)
            if session.swept and session.save_profile() and self._store:
                self._store.save(session.info, session.profile())
            session.close()
        if self._plots:
            self._plots.kill()
            self._plots.wait()
            self._plots = None
        self._current_view.view = View(time.monotonic())

    def _answer_commands(self) -> list[threading.Event]:
        """Carry out the queued commands; returns their `done` events, to be set once the current view shows the result."""
        answered: list[threading.Event] = []
        while True:
            try:
                command = self._web.commands.get_nowait()
            except queue.Empty:
                return answered
            command.answer = self._session.command(command.name, command.k) if self._session else "no engine is attached"
            answered.append(command.done)

    def _update_view(self) -> None:
        report = read_report(self.settings.runtime_dir)
        view = self._session.view(self._checkpoint_s) if self._session else View(time.monotonic())
        attached = view.attached and (report is None or view.info is None or report.pid != view.info.pid or report.records_come)
        self._history.add(view.snapshot, view.time_s)
        store = self._store.summary() if self._store else None
        view = replace(view, report=report, attached=attached, history=self._history.points, store=store)
        if (annotator := self._annotator) is not None:
            if view.snapshot and view.info:
                annotator.offer(view.snapshot, view.info, time.monotonic())
            counts = annotator.counts
            view = replace(view, annotations_sent=counts.sent, annotations_dropped=dict(counts.dropped))
        self._current_view.view = view

    def _write_files(self, session: Session, now_s: float) -> None:
        """Write checkpoint, profile, stored profile and plots, each at its interval."""
        if self._due("checkpoint", self.settings.checkpoint_interval_s, now_s) and session.checkpoint():
            self._checkpoint_s = now_s
        just_swept = session.swept and not self._swept
        self._swept |= just_swept
        if session.swept and (self._due("profile", PROFILE_INTERVAL_S, now_s) or just_swept) and session.save_profile():
            if self._store and (self._due("store", STORE_INTERVAL_S, now_s) or just_swept):
                self._store.save(session.info, session.profile())
            if self._plots and self._plots.poll() is not None:
                self._plots = None
            snapshot = self._current_view.view.snapshot
            if self._plots is None and snapshot and (self._due("plots", PLOTS_INTERVAL_S, now_s) or just_swept):
                self._plots = start_plots(session.profile_folder, snapshot)

    def _due(self, what: str, interval_s: float, now_s: float) -> bool:
        if now_s < self._next.get(what, 0.0):
            return False
        self._next[what] = now_s + interval_s
        return True


def _store_worker(settings: SidecarSettings) -> StoreWorker | None:
    """Open the profile store, None when there is none. Raises BadInput."""
    if settings.profile_store is None:
        return None
    key = read_key(settings.profile_store_key_file) if settings.profile_store_key_file else None
    return StoreWorker(ProfileStore(settings.profile_store, key))


def _certificates(settings: SidecarSettings) -> Certificates | None:
    """Read the certificate, None when there is none. Raises BadInput."""
    return Certificates(settings.certfile, settings.keyfile, settings.client_ca) if settings.certfile else None


def run_sidecar(settings: SidecarSettings) -> None:
    """Run a sidecar in this process until SIGTERM or SIGINT. Raises BadInput."""
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s")
    Sidecar(settings).run()
