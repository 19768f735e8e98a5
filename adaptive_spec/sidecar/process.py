"""The sidecar process: follows the engines of one server, serves HTTP, carries out commands.

One engine, in `runtime_dir`; of a server with data parallelism one for each data-parallel rank, in `runtime_dir/dp-N`. Each rank
has its own models, learnt from its own steps: ranks have their own batches, and a step's time and acceptance are those of a
batch. What they share is the prior: a rank that sweeps continues from the models of the first rank that has swept, and all begin
from the same profile.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from adaptive_spec import __version__
from adaptive_spec.config.settings import SidecarSettings
from adaptive_spec.errors import BadInput
from adaptive_spec.runtime_folder import dp_rank_dirs, role_is_held
from adaptive_spec.sidecar.certificates import Certificates
from adaptive_spec.sidecar.engine_follower import EngineFollower, Intervals
from adaptive_spec.sidecar.grafana import Annotator
from adaptive_spec.sidecar.http_server import WebServer
from adaptive_spec.sidecar.own_files import OwnFiles
from adaptive_spec.sidecar.server_metrics import ServerMetrics
from adaptive_spec.sidecar.view import CurrentView
from adaptive_spec.storage.profile import check_writable
from adaptive_spec.storage.profile_store import ProfileStore
from adaptive_spec.storage.profile_store_worker import StoreWorker
from adaptive_spec.storage.signature import read_key

VIEW_INTERVAL_S = 0.25
BEAT_INTERVAL_S = 1.0
FOLLOW_INTERVAL_S = 0.25
MOST_DP_RANKS = 64
"""Data-parallel ranks that one sidecar follows; those beyond are named in the log and run without it."""
RELOADED = ("controller", "checkpoint_interval_s", "poll_interval_s", "log_level")
"""Settings that SIGHUP changes. The others belong to what is open: folders, ports, clients, keys."""

log = logging.getLogger(__name__)


class Sidecar:
    """The sidecar's loop. `run` returns after SIGTERM or SIGINT, when checkpoint and profile are written.

    Raises BadInput for what the operator must correct: a folder, the port, the token file, a ring of another version.
    """

    def __init__(self, settings: SidecarSettings, read_again: Callable[[], SidecarSettings] | None = None) -> None:
        self.settings = settings
        self._read_again = read_again or (lambda: settings)
        self._reload = threading.Event()
        self._own_files = OwnFiles(settings.runtime_dir, settings.control_token_file)
        try:
            check_writable(settings.profile_dir)
            self._store = _store_worker(settings)
            self._annotator = Annotator.of(settings.grafana)
            self._server_metrics = ServerMetrics.of(settings)
            self._current_view = CurrentView(time.monotonic())
            certificates = _certificates(settings)
            self._web = WebServer(
                self._current_view, settings.host, settings.port, self._own_files.token, settings.allowed_hosts, certificates
            )
        except BaseException:
            self._own_files.close()
            raise
        self._stop = threading.Event()
        self._engines: dict[int | None, EngineFollower] = {None: EngineFollower(settings, self._store)}
        """By data-parallel rank, ascending; None: the engine of a server without data parallelism."""
        self._intervals = Intervals()
        self._too_many = False

    def run(self) -> None:
        """Run the loop until SIGTERM or SIGINT."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop.set())
        signal.signal(signal.SIGHUP, lambda *_: self._reload.set())
        self._own_files.announce(self._web.url, self.settings.certfile)
        log.info("adaptive-spec %s, pid %d, serving on %s", __version__, os.getpid(), self._web.url)
        log.info("waiting for an engine in %s", self.settings.runtime_dir)
        try:
            while not self._stop.is_set():
                self._run_once()
        finally:
            self._close_engines()
            if self._store:
                self._store.close()
            if self._annotator:
                self._annotator.close()
            if self._server_metrics:
                self._server_metrics.close()
            self._web.close()
            self._own_files.close()
        log.info("stopped")

    def _take_settings(self) -> None:
        """Read the settings again: take those of `RELOADED`, refuse the others in a line each. Never ends the sidecar."""
        self._reload.clear()
        try:
            new = self._read_again()
        except BadInput as error:
            log.error("SIGHUP: %s; the settings stay as they were", " ".join(str(error).split()))
            return
        changed = [name for name in SidecarSettings.model_fields if getattr(new, name) != getattr(self.settings, name)]
        for name in (name for name in changed if name not in RELOADED):
            log.warning("SIGHUP: %s: cannot be changed while the sidecar runs; restart it", name)
        taken = {name: getattr(new, name) for name in changed if name in RELOADED}
        self.settings = self.settings.model_copy(update=taken)
        set_log_level(self.settings.log_level)
        for engine in self._engines.values():
            engine.take_settings(taken)
        log.info("SIGHUP: settings read again, changed: %s", ", ".join(taken) or "none")

    def _run_once(self) -> None:
        now_s = time.monotonic()
        if self._reload.is_set():
            self._take_settings()
        due = self._intervals.due
        if due("follow", FOLLOW_INTERVAL_S, now_s):
            self._own_files.keep()
            self._find_dp_ranks()
            self._drop_those_of_before()
            for rank, engine in self._engines.items():
                if rank is not None or len(self._engines) == 1 or engine.alive:
                    engine.follow(now_s)
            self._share_prior()
        learnt = sum([engine.run_once() for engine in self._engines.values()])
        answered = self._answer_commands()
        if due("view", VIEW_INTERVAL_S, now_s) or answered:
            self._update_view()
        for command in answered:
            command.set()
        writer = self._profile_writer()
        for engine in self._engines.values():
            engine.write_files(now_s, profile=engine is writer)
        self._current_view.heartbeat_s = time.monotonic()
        if due("beat", BEAT_INTERVAL_S, now_s):
            self._own_files.beat()
        if not learnt:
            self._stop.wait(self.settings.poll_interval_s)

    def _first(self) -> EngineFollower:
        """The engine of a server without data parallelism, else that of the first rank."""
        alone, *ranks = self._engines.values()
        return alone if not ranks or alone.alive else ranks[0]

    def _find_dp_ranks(self) -> None:
        """Follow each data-parallel rank whose engine runs. One that has ended is followed further: it may be started again."""
        for rank, folder in dp_rank_dirs(self.settings.runtime_dir).items():
            if rank in self._engines or not role_is_held(folder, "engine"):
                continue
            if len(self._engines) > MOST_DP_RANKS:
                if not self._too_many:
                    self._too_many = True
                    log.error("more than %d data-parallel ranks: those beyond run without this sidecar", MOST_DP_RANKS)
                return
            log.info("data-parallel rank %d: waiting for its engine in %s", rank, folder)
            # A store answers for one engine at a time; the other ranks have the prior of this one.
            store = self._store if len(self._engines) == 1 else None
            self._engines[rank] = EngineFollower(self.settings.model_copy(update={"runtime_dir": folder}), store, rank)
        ordered = sorted(self._engines.items(), key=lambda one: -1 if one[0] is None else one[0])
        self._engines = dict(ordered)

    def _drop_those_of_before(self) -> None:
        """Forget what a server left that ran with data parallelism before and now runs without it, or the other way round."""
        if len(self._engines) == 1:
            return
        if self._engines[None].alive:
            gone = [rank for rank, one in self._engines.items() if rank is not None and not one.alive]
            for rank in gone:
                self._engines.pop(rank).close(profile=False)
        else:
            self._engines[None].close(profile=False)

    def _share_prior(self) -> None:
        ranks = [engine for engine in self._engines.values() if engine.dp_rank is not None]
        swept = next((engine for engine in ranks if engine.swept), None)
        if swept is not None:
            for engine in ranks:
                if engine is not swept and not engine.swept:
                    engine.take_prior(swept)

    def _profile_writer(self) -> EngineFollower | None:
        """Ranks have one profile, since they are the same engine on the same hardware: the first that has swept writes it."""
        return next((engine for engine in self._engines.values() if engine.swept), None)

    def _close_engines(self) -> None:
        writer = self._profile_writer()
        for engine in self._engines.values():
            engine.close(profile=engine is writer)

    def _answer_commands(self) -> list[threading.Event]:
        """Carry out the queued commands; returns their `done` events, to be set once the current view shows the result."""
        answered: list[threading.Event] = []
        while True:
            try:
                command = self._web.commands.get_nowait()
            except queue.Empty:
                return answered
            command.answer = self._command(command.name, command.k)
            answered.append(command.done)

    def _command(self, name: str, k: int | None) -> str:
        """Carry out a command on every data-parallel rank that there is; returns why it was refused, "" if it was not."""
        engines = [engine for engine in self._engines.values() if engine.session is not None]
        if not engines:
            return "no engine is attached"
        refused = {engine.dp_rank: reason for engine in engines if (reason := engine.command(name, k))}
        if len(engines) == 1:
            return next(iter(refused.values()), "")
        return "; ".join(f"dp_rank {rank}: {reason}" for rank, reason in refused.items())

    def _update_view(self) -> None:
        views = {rank: engine.view() for rank, engine in self._engines.items()}
        first = self._first().dp_rank
        view = replace(views[first], store=self._store.summary() if self._store else None)
        if (annotator := self._annotator) is not None:
            if view.snapshot and view.info:
                annotator.offer(view.snapshot, view.info, time.monotonic(), view.session)
            counts = annotator.counts
            view = replace(view, annotations_sent=counts.sent, annotations_dropped=dict(counts.dropped))
        if self._server_metrics:
            self._server_metrics.want(not any(one.records_come for one in views.values()))
            view = replace(view, server_reported=self._server_metrics.newest(time.monotonic()))
        if first is not None:
            ranks = {rank: one for rank, one in views.items() if rank is not None}
            view = replace(view, dp_ranks=ranks | {first: view})
        self._current_view.view = view


def _store_worker(settings: SidecarSettings) -> StoreWorker | None:
    """Open the profile store, None when there is none. Raises BadInput."""
    if settings.profile_store is None:
        return None
    key = read_key(settings.profile_store_key_file) if settings.profile_store_key_file else None
    return StoreWorker(ProfileStore(settings.profile_store, key))


def _certificates(settings: SidecarSettings) -> Certificates | None:
    """Read the certificate, None when there is none. Raises BadInput."""
    return Certificates(settings.certfile, settings.keyfile, settings.client_ca) if settings.certfile else None


def set_log_level(name: str) -> None:
    """Set the least severe line that is printed. Of other packages only warnings: at debug some write URLs with their secrets."""
    level = logging.getLevelNamesMapping()[name.upper()]
    logging.getLogger("adaptive_spec").setLevel(level)
    logging.getLogger().setLevel(max(level, logging.WARNING))


def run_sidecar(settings: SidecarSettings, read_again: Callable[[], SidecarSettings] | None = None) -> None:
    """Run a sidecar in this process until SIGTERM or SIGINT. read_again: reads the settings after SIGHUP. Raises BadInput."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    set_log_level(settings.log_level)
    Sidecar(settings, read_again).run()
