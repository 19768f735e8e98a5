"""The sidecar process: waits for an engine, runs its session, serves HTTP, writes checkpoint and profile."""

from __future__ import annotations

import json
import logging
import os
import queue
import secrets
import signal
import subprocess
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from adaptive_spec import __version__
from adaptive_spec.client.sidecar import ADDRESS_NAME, TOKEN_NAME, own_token
from adaptive_spec.config.settings import SidecarSettings
from adaptive_spec.control.controller import Controller
from adaptive_spec.engine_side.tap import PAGE_NAME
from adaptive_spec.errors import BadInput
from adaptive_spec.runtime_folder import RoleLock, make_runtime_dir, remove_temporary_files
from adaptive_spec.sidecar.grafana import Annotator
from adaptive_spec.sidecar.history import History
from adaptive_spec.sidecar.http_server import WebServer
from adaptive_spec.sidecar.profile_plots import start_plots
from adaptive_spec.sidecar.session import CHECKPOINT, Session, waiting_engine
from adaptive_spec.sidecar.view import CurrentView, View
from adaptive_spec.storage.archive import write_atomically
from adaptive_spec.storage.profile import check_writable
from adaptive_spec.storage.profile_store import ProfileStore
from adaptive_spec.storage.profile_store_worker import StoreWorker
from adaptive_spec.storage.signature import read_key
from adaptive_spec.wire.engine_report import read_report

VIEW_INTERVAL_S = 0.25
FOLLOW_INTERVAL_S = 0.25
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
        self._role = _take_role(settings.runtime_dir)
        check_writable(settings.profile_dir)
        self._store = _store_worker(settings)
        self._annotator = Annotator.of(settings.grafana)
        self._current_view = CurrentView(time.monotonic())
        self._web = WebServer(self._current_view, settings.host, settings.port, _control_token(settings))
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
        address = self.settings.runtime_dir / ADDRESS_NAME
        write_atomically(address, json.dumps({"url": self._web.url, "pid": os.getpid()}).encode())
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
            address.unlink(missing_ok=True)
            self._role.release()
        log.info("stopped")

    def _run_once(self) -> None:
        now_s = time.monotonic()
        if self._session is None:
            if self._due("follow", FOLLOW_INTERVAL_S, now_s):
                self._open_session(now_s)
        elif self._due("follow", FOLLOW_INTERVAL_S, now_s) and not self._session.follow_engine():
            log.info("another engine has replaced %s", self._session.info.model)
            self._close_session()
        learnt = self._session.run_once() if self._session else 0
        answered = self._answer_commands()
        if self._due("view", VIEW_INTERVAL_S, now_s) or answered:
            self._update_view()
        for command in answered:
            command.set()
        if self._session:
            self._write_files(self._session, now_s)
        self._current_view.heartbeat_s = time.monotonic()
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
            self._history = History()
            self._swept = self._session.origin in ("profile", "store")
            self._next["checkpoint"] = now_s + self.settings.checkpoint_interval_s
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


def _take_role(folder: Path) -> RoleLock:
    """Make the runtime folder and take the role `sidecar` in it. Raises BadInput when it is not ours alone, or has a sidecar."""
    try:
        make_runtime_dir(folder)
        role = RoleLock.acquire(folder, "sidecar")
    except BlockingIOError as error:
        raise BadInput(f"runtime_dir: '{folder}': {error.strerror}; must be a folder of one engine and one sidecar") from error
    except OSError as error:
        wanted = "" if "must be" in (error.strerror or "") else "; must be a writable folder"
        raise BadInput(f"runtime_dir: '{folder}': {error.strerror}{wanted}") from error
    (folder / ADDRESS_NAME).unlink(missing_ok=True)  # of a sidecar that was killed: another program may use its port now
    remove_temporary_files(folder, (PAGE_NAME, f"{CHECKPOINT}.npz", ADDRESS_NAME, TOKEN_NAME))
    return role


def _store_worker(settings: SidecarSettings) -> StoreWorker | None:
    """Open the profile store, None when there is none. Raises BadInput."""
    if settings.profile_store is None:
        return None
    key = read_key(settings.profile_store_key_file) if settings.profile_store_key_file else None
    return StoreWorker(ProfileStore(settings.profile_store, key))


def _control_token(settings: SidecarSettings) -> str:
    """Return the control token: from control_token_file, else from a file in runtime_dir, made at the first start and kept."""
    path = settings.control_token_file
    try:
        if path is not None:
            token = path.read_text().strip()
            if not token:
                raise BadInput(f"control_token_file: '{path}': file is empty; must contain a token")
            return token
        path = settings.runtime_dir / TOKEN_NAME
        if kept := own_token(path):
            return kept
        token = secrets.token_urlsafe(32)
        write_atomically(path, token.encode() + b"\n")
        return token
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise BadInput(f"control_token_file: '{path}': {reason}") from error


def run_sidecar(settings: SidecarSettings) -> None:
    """Run a sidecar in this process until SIGTERM or SIGINT. Raises BadInput."""
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s")
    Sidecar(settings).run()
