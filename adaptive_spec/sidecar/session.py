"""One attached engine: its ring, its policy page and its controller. Only the thread of the sidecar's loop uses it."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ParamSpec

from adaptive_spec.config.settings import SidecarSettings
from adaptive_spec.control.controller import Controller
from adaptive_spec.control.counters import Counters
from adaptive_spec.control.snapshot import Snapshot
from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.domain.policy import Mode, Policy
from adaptive_spec.domain.step_record import StepFlag, StepRecord
from adaptive_spec.engine_side.tap import LOOK_STEPS, PAGE_NAME, RING_NAME
from adaptive_spec.errors import BadInput
from adaptive_spec.runtime_folder import role_is_held
from adaptive_spec.sidecar.counters_page import COUNTERS_NAME, CountersPage, KeptCounters, labels_of
from adaptive_spec.sidecar.own_files import CHECKPOINT_NAME
from adaptive_spec.sidecar.starting_models import (
    CHECKPOINT,
    checkpoint_key,
    gain_over_no_speculation,
    has_checkpoint,
    start_controller,
)
from adaptive_spec.sidecar.swap_reasons import SwapReasons
from adaptive_spec.sidecar.usable import check_checkpoint, check_profile
from adaptive_spec.sidecar.view import View
from adaptive_spec.storage.archive import save_archive
from adaptive_spec.storage.profile import (
    PLOTS,
    PROFILE_FILES,
    Profile,
    identity,
    identity_meta,
    save_profile,
)
from adaptive_spec.storage.profile_store import StoredProfile
from adaptive_spec.wire.liveness import process_alive
from adaptive_spec.wire.policy_page import PolicyPage, payload_bytes
from adaptive_spec.wire.ring import RingLayoutError, RingReader
from adaptive_spec.wire.shared_file import make_place, said_aside

NO_MODELS = Profile({}, {})
POLL_RECORDS = 512
"""Most records learnt in one iteration, so that a long backlog does not delay the heartbeat."""
SILENT_S = 5.0
"""Seconds since its last record in which an engine without a role counts as alive, whatever its pid says."""
DROPS = ("lost", "torn", "invalid")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
STEADY_NS = 1_000_000_000
"""Without a heartbeat for as long, steps before the next one are no fault of the engine: the shortest max_age_s is 1 s."""
IGNORED_STEPS = 4 * LOOK_STEPS
"""Steps in a row without a policy, while one is offered, that are a fault: the engine looks for a new page every LOOK_STEPS."""

log = logging.getLogger(__name__)
_numbers = itertools.count(1)
"""Of the sessions of this process."""
Arguments = ParamSpec("Arguments")


class Session:
    """Reads records from the ring, passes them to the controller and publishes its policies.

    When a controller call raises, it is counted, logged the first time, and a policy that does not act is published: an error
    here may cost speed, never a request.

    Records that a killed sidecar counted after its last checkpoint are learnt again and not counted again. Nothing is shown
    before the records that waited at the start are read.

    The log says after which record of the ring each refit (level debug) and each command ran. Together with a trace of the same
    records this reproduces the models exactly.
    """

    def __init__(
        self, settings: SidecarSettings, ring: RingReader, page: PolicyPage, controller: Controller, origin: str
    ) -> None:
        """Use open files. Callers use `open`."""
        self.settings, self.ring, self.page, self.controller = settings, ring, page, controller
        self.origin = origin
        self._number = next(_numbers)
        self._counters_page = CountersPage(settings.runtime_dir / COUNTERS_NAME)
        self._counted_to = 0
        """Records of the ring below this index are counted already."""
        self._backlog_to = ring.cursor
        self._good: tuple[Profile, int, int] | None = None
        """The models that were last found usable, and generation and position of the ring that they were learnt to."""
        self._forgotten = 0
        self.failures: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()
        self._record_s = -SILENT_S
        self.ignored_steps = 0
        self._beaten_ns = self._steady_ns = 0
        self._snapshot: Snapshot | None = None
        self._prior_refused = False
        self._over_none = gain_over_no_speculation(settings, ring.info)
        self._swap_reasons = SwapReasons()

    @classmethod
    def open(cls, settings: SidecarSettings, stored: StoredProfile | None = None) -> Session | None:
        """Attach to the engine in the runtime directory; None when there is none yet.

        Models come from the checkpoint, else from the newer of the profile and `stored`, else from a sweep.
        Raises BadInput for a ring that this version cannot read and when another sidecar holds the page.
        """
        ring = _open_ring(settings.runtime_dir / RING_NAME)
        if ring is None:
            return None
        info = ring.info
        try:
            capacity = payload_bytes(info.max_batch, info.max_k)
            page = PolicyPage.create_or_open(settings.runtime_dir / PAGE_NAME, capacity, info.digest)
        except OSError as error:
            ring.close()
            if error.errno in DISK_FULL:
                log.error("policy page: cannot be made: %s; trying again", error.strerror)
                return None
            raise BadInput(f"runtime_dir: {error.strerror or error}; must be a folder of one engine and one sidecar") from error
        log.info("attached to %s (pid %d)", identity(info), info.pid)
        controller, origin, position = start_controller(settings, ring, stored)
        if position is not None:
            ring.seek(position)
        controller.resume_version(page.last_version)
        session = cls(settings, ring, page, controller, origin)
        session._continue_counters()
        session._beat()
        session._publish(session._guarded("tick", controller.tick, time.monotonic()))
        return session

    @property
    def info(self) -> EngineInfo:
        return self.ring.info

    @property
    def snapshot(self) -> Snapshot | None:
        """That of the last `view`."""
        return self._snapshot

    @property
    def profile_folder(self) -> Path:
        return self.settings.profile_dir / self.info.profile_name

    @property
    def caught_up(self) -> bool:
        """Whether the records that waited at the start are read."""
        return self.ring.position >= max(self._backlog_to, self._counted_to)

    @property
    def swept(self) -> bool:
        """Whether the sweep is over and there are measurements to save as a profile."""
        return self._snapshot is not None and self._snapshot.mode is not Mode.SWEEP and bool(self._snapshot.latency_points)

    def run_once(self) -> int:
        """One iteration of the loop: learn new records, refit when due, publish, write the heartbeat. Returns records learnt."""
        if self.ring.position < self._counted_to:
            return self._relearn()
        records = self.ring.poll(POLL_RECORDS)
        now_s = time.monotonic()
        controller = self.controller
        for record in records:
            self._publish(self._learn(record, now_s))
            if self._over_none is not None:
                self._over_none.observe(record)
        if records:
            self._record_s = now_s
            self._count_ignored(records)
        for reason in DROPS:
            count = getattr(self.ring, reason) - self._dropped[reason]
            if count:
                self._dropped[reason] += count
                controller.note_dropped(reason, count)
        if controller.refit_due(now_s):
            self._publish(self._guarded("refit", controller.refit, now_s, self._stopwatch))
            log.debug("refit after record %d", self.ring.position)
        elif not records:
            self._publish(self._guarded("tick", controller.tick, now_s))
        if controller.models_forgotten != self._forgotten:
            self._forgotten = controller.models_forgotten
            self._done("set_aside", self._set_files_aside)
        self._beat()
        return len(records)

    def _set_files_aside(self) -> None:
        """The models could not be fitted and are forgotten: what was kept of them is not to come back."""
        self._good = None
        for path in (self.settings.runtime_dir / CHECKPOINT_NAME, self.profile_folder):
            if os.path.lexists(path):
                log.warning("%s: its models could not be fitted; %s", path, said_aside(path))

    def _relearn(self) -> int:
        """As `run_once`, for records that are counted already. Returns records learnt."""
        records = self.ring.poll(POLL_RECORDS, self._counted_to)
        for record in records:
            self._done("relearn", partial(self.controller.relearn, record))
        for reason in DROPS:
            self._dropped[reason] = getattr(self.ring, reason)
        if (lost := self.ring.position - self._counted_to) >= 0:
            self.controller.note_dropped("lost", lost)  # among those behind the counted ones
            self._done("relearn", self.controller.end_relearning)
        self._beat()
        return max(len(records), 1)

    def _continue_counters(self) -> None:
        """Take over what the sidecar before had counted, from the page or the checkpoint, whichever has more."""
        self._counted_to = self.ring.position
        kept = None
        try:
            kept = self._counters_page.load()
            if kept is not None and kept.labels == labels_of(self.info):
                self._continue_from(kept)
            elif kept is not None:  # other series, which begin at 0: the checkpoint may have less than was shown of them
                self.controller.counters = Counters(self.info.max_k)
        except Exception:  # whatever it holds
            self._count_failure("counters")

    def _continue_from(self, kept: KeptCounters) -> None:
        counters = Counters(self.info.max_k)
        counters.restore(kept.counters)
        if counters.records < self.controller.counters.records:
            return  # the page could not be written lately
        self.controller.counters = counters
        # Of another ring: its engine restarted meanwhile, and what this one has lost already was never counted.
        self._counted_to = min(kept.position, self._backlog_to) if kept.generation == self.ring.generation else 0
        self.ring.seek(min(self.ring.position, self._counted_to) if self._counted_to else 0)
        if self.ring.position < self._counted_to:
            self.controller.begin_relearning(kept.waiting)

    def _keep_counters(self) -> None:
        controller = self.controller
        kept = KeptCounters(
            labels_of(self.info), self.ring.generation, self.ring.position, controller.models.acceptance.waiting_steps,
            controller.counters.state(),
        )  # fmt: skip
        self._done("counters", partial(self._counters_page.save, kept))

    def command(self, name: str, k: int | None) -> str:
        """Carry out an operator's command; returns "" or, in one line, why it was refused."""
        try:
            policy = self.controller.command(name, time.monotonic(), k)
        except ValueError as error:
            return str(error)
        except Exception:
            self._count_failure("command")
            self._fall_back("command")
            return f"{name}: failed inside the sidecar, see its log; no policy acts"
        log.info("command: %s%s, after record %d", name, "" if k is None else f" {k}", self.ring.position)
        self._publish(policy)
        return ""

    def keep_page(self) -> None:
        """Make the page again when it was deleted or damaged; the engine opens the new one. A failure is counted and logged."""
        if not self.page.in_place() and self._done("page", self.page.renew):
            log.warning("policy page in %s: was deleted or damaged, and is made again", self.settings.runtime_dir)

    def _beat(self) -> None:
        now_ns = time.monotonic_ns()
        if now_ns - self._beaten_ns > STEADY_NS:
            self._steady_ns = now_ns
        self._beaten_ns = now_ns
        with suppress(OSError):  # `keep_page` makes the page again, and counts when it cannot
            self.page.heartbeat(now_ns)

    def _count_ignored(self, records: list[StepRecord]) -> None:
        """Count the newest steps in a row that ran without a policy although one that acts was offered all the while."""
        policy = self.page.policy
        if policy is None or not policy.acting:
            self.ignored_steps = 0
            return
        for record in records:
            if record.time_ns >= self._steady_ns:  # not the backlog of a time without a heartbeat
                self.ignored_steps = self.ignored_steps + 1 if record.flags & StepFlag.FALLBACK else 0

    @property
    def policy_ignored(self) -> bool:
        """Whether the engine does not follow the page: a fault that neither side sees alone."""
        return self.ignored_steps >= IGNORED_STEPS

    def follow_engine(self) -> bool:
        """Switch to the ring of a restarted engine. False: it is another engine, and this session is over."""
        if not self.ring.replaced():
            return True
        self._read_rest()
        try:
            ring = _open_ring(self.ring.path)
        except BadInput as error:  # damage or a replaced file; its engine makes it again
            _log_once(self.ring.path, f"{error}; waiting for the engine to make it again")
            return True
        if ring is None:
            return True  # replaced once more meanwhile: tried again at the next call
        if replace(ring.info, pid=0) != replace(self.info, pid=0):
            ring.close()
            return False
        what = "made its ring again" if ring.info.pid == self.info.pid else "restarted"
        log.info("engine %s (pid %d), continuing with the same models", what, ring.info.pid)
        self.ring.close()
        self.ring = ring
        self._dropped.clear()
        self._counted_to = self._backlog_to = 0
        return True

    def _read_rest(self) -> None:
        """Learn what is left in the ring: one full ring at most, should its engine still write."""
        for _ in range(2 * (self.ring.slots // POLL_RECORDS + 2)):
            if not self.run_once():
                break

    def attached(self, now_s: float) -> bool:
        """Whether the engine is alive: it holds its role in the folder.

        Where no engine ever took the role, as with a ring that was written without a tap: it wrote a record lately or runs.
        """
        held = role_is_held(self.settings.runtime_dir, "engine")
        return held if held is not None else now_s - self._record_s < SILENT_S or process_alive(self.info.pid)

    def view(self, checkpoint_s: float | None) -> View:
        """Return the state of this session for the HTTP thread, after its counters are on disk."""
        now_s = time.monotonic()
        if not self.caught_up:
            return View(now_s, None, self.info, self.attached(now_s), dict(self.failures), self.origin, checkpoint_s)
        try:
            snapshot = self.controller.snapshot(now_s)
            self._snapshot = replace(snapshot, events=self._swap_reasons.explain(snapshot))
        except Exception:
            self._count_failure("snapshot")
        self._keep_counters()
        return View(
            now_s, self._snapshot, self.info, self.attached(now_s), dict(self.failures), self.origin, checkpoint_s,
            policy_ignored=self.policy_ignored, gain_over_no_speculation=self._over_none.gain if self._over_none else None,
            session=self._number,
        )  # fmt: skip

    def take_prior(self, other: Session) -> bool:
        """Replace the models by those of another rank of the same server, and end the sweep. False: not possible, or no need.

        Only while this one sweeps, and the other one has swept: each rank's own measurements count for more than a prior.
        """
        here, there = self._snapshot, other.snapshot
        if here is None or here.mode is not Mode.SWEEP or self._prior_refused or there is None or there.observe_only:
            return False
        if not other.swept or replace(self.info, pid=0) != replace(other.info, pid=0):
            return False
        controller = Controller(self.settings.controller, self.info)
        profile = other.profile()
        try:
            check_profile(profile, self.settings.controller, self.info)
            controller.restore_profile(profile.latency, profile.calibration)
        except Exception:
            self._prior_refused = True
            self._count_failure("prior")
            return False
        controller.counters = self.controller.counters
        controller.resume_version(self.page.last_version)
        self.controller, self.origin, self._good, self._forgotten = controller, "profile", None, 0
        self._publish(self._guarded("tick", controller.tick, time.monotonic()))
        self.view(None)
        return True

    def checkpoint(self) -> bool:
        """Write the checkpoint, with the models as they are or, when those cannot be used, as they last could.

        False: it failed; the failure is counted and logged.
        """
        return self._done("checkpoint", self._write_checkpoint)

    def _write_checkpoint(self) -> None:
        controller, info = self.controller, self.info
        if controller.healthy:
            profile = self.profile()
            check_checkpoint(controller.state(profile), self.settings.controller, info)
            self._good = profile, self.ring.generation, self.ring.position
        profile, generation, position = self._good or (NO_MODELS, self.ring.generation, self.ring.position)
        meta = {
            **identity_meta(info),
            "configuration": checkpoint_key(info),
            "generation": str(generation),  # text: not every JSON reader keeps 64-bit integers exact
            "position": position,
        }
        make_place(self.settings.runtime_dir / CHECKPOINT_NAME)
        save_archive(self.settings.runtime_dir / CHECKPOINT_NAME, CHECKPOINT, controller.state(profile), meta)

    def save_profile(self) -> bool:
        """Write the profile, of models that can be used. False: they cannot, or it failed; that is counted and logged."""
        if not self.controller.healthy:
            return False
        return self._done("profile", self._write_profile)

    def _write_profile(self) -> None:
        profile = self.profile()
        check_profile(profile, self.settings.controller, self.info)
        for path in (self.profile_folder, self.profile_folder / PLOTS):
            make_place(path, for_folder=True)
        for name in PROFILE_FILES:
            make_place(self.profile_folder / name)
        save_profile(self.profile_folder, self.info, profile, self.controller.policy_summary())

    def profile(self) -> Profile:
        """Return what `save_profile` writes, as copies for another thread."""
        parts = self.controller.latency_state(), self.controller.calibration_state()
        return Profile(*({name: array.copy() for name, array in part.items()} for part in parts))

    def close(self) -> None:
        """Close ring and page; both files stay."""
        self.ring.close()
        self.page.close()
        self._counters_page.close()

    @contextmanager
    def _stopwatch(self, model: str) -> Iterator[None]:
        started_s = time.perf_counter()
        yield
        self.controller.note_refit(model, time.perf_counter() - started_s)

    def _learn(self, record: StepRecord, now_s: float) -> Policy | None:
        try:
            return self.controller.observe(record, now_s)
        except Exception:
            self._count_failure("observe")
            return self.controller.record_failed(now_s)

    def _guarded(
        self, call: str, function: Callable[Arguments, Policy | None], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Policy | None:
        try:
            return function(*args, **kwargs)
        except Exception:
            self._count_failure(call)
            self._fall_back(call)
            return None

    def _publish(self, policy: Policy | None) -> None:
        if policy is None:
            return
        try:
            self.page.publish(policy)
            self.controller.published()
        except Exception:
            self._count_failure("publish")
            self.controller.resume_version(self.page.last_version)
            self._fall_back_on_page(self.controller.publication_failed(time.monotonic()))

    def _fall_back(self, call: str) -> None:
        """Publish policies that do not act until a refit succeeds."""
        try:
            self._publish(self.controller.fail(f"{call} failed inside the sidecar", time.monotonic()))
        except Exception:
            self._count_failure("fail")
            self._fall_back_on_page(None)

    def _fall_back_on_page(self, policy: Policy | None) -> None:
        """Publish `policy`, which does not act; where that fails too, the page's own policy, no longer acting."""
        last = self.page.policy
        choices = [] if policy is None else [policy]
        if last is not None and last.acting:
            choices.append(replace(last, version=self.page.last_version + 1, mode=Mode.FALLBACK, acting=False, trials=()))
        for choice in choices:
            try:
                self.page.publish(choice)
            except Exception:
                self._count_failure("publish")
            else:
                break
        self.controller.resume_version(self.page.last_version)

    def _count_failure(self, call: str) -> None:
        self.failures[call] += 1
        if self.failures[call] == 1:
            error = sys.exception()
            if isinstance(error, OSError):  # a full disk or the like: where in our code does not matter
                log.error("%s failed: %s; further failures of this kind are only counted", call, error)
            else:
                log.exception("%s failed; further failures of this kind are only counted", call)

    def _done(self, call: str, write: Callable[[], None]) -> bool:
        try:
            write()
        except Exception:
            self._count_failure(call)
            return False
        return True


def _open_ring(path: Path) -> RingReader | None:
    """Return the ring, None when there is none, or something else in its place: its engine makes it again.

    Raises BadInput for a ring of another layout version.
    """
    try:
        return RingReader.open(path)
    except FileNotFoundError:
        return None
    except RingLayoutError as error:
        if error.field == "layout version":
            raise BadInput(f"runtime_dir: {error}") from error
        _log_once(path, f"{error}; waiting for the engine to make it again")
        return None
    except OSError as error:  # a link, a file that is not this user's alone
        _log_once(path, f"{path}: cannot be used as a ring: {error.strerror}; waiting for the engine to make it again")
        return None


def _log_once(path: Path, message: str) -> None:
    if _logged.get(path) != message:
        _logged[path] = message
        log.warning("%s", message)


_logged: dict[Path, str] = {}
"""The last message about each ring: one for each data-parallel rank."""


def waiting_engine(settings: SidecarSettings) -> EngineInfo | None:
    """Return the engine in the runtime directory, so that a profile can be looked for; None: no engine, or a checkpoint exists.

    Raises BadInput as `Session.open` does.
    """
    ring = _open_ring(settings.runtime_dir / RING_NAME)
    if ring is None:
        return None
    info = ring.info
    ring.close()
    return None if has_checkpoint(settings.runtime_dir, info) else info
