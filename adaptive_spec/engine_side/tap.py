"""EngineTap: the one object an engine calls, three times a decode step:

    k = tap.begin_step(batch_size, kv_tokens, now_ns)      # draft k tokens per request
    verify_len = tap.verify_lengths(confidences)           # engines with ragged verification
    tap.end_step(...)                                      # writes the step's record

Regimes: a fresh policy that acts is executed; a fresh one that does not act (modes shadow and fallback) gives the launch K; with
no policy page, no policy on it, or a heartbeat older than max_age_s, the tap returns the launch K and the step is marked as
fallback, until the heartbeat is fresh again. No method raises or waits: a failure is counted and the launch K is returned. The
SGLang plugin lets SGLang's own policy decide instead of the launch K, unless its setting `fallback` is `launch`.
"""

from __future__ import annotations

import errno
import logging
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from adaptive_spec.domain.arrays import Float32s, Floats, Lengths, RequestIds
from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.domain.policy import Granularity, Policy
from adaptive_spec.domain.step_record import StepFlag
from adaptive_spec.engine_side.planner import Planner
from adaptive_spec.runtime_folder import RoleLock, check_runtime_dir, make_runtime_dir, remove_temporary_files
from adaptive_spec.wire.engine_report import REPORT_NAME
from adaptive_spec.wire.policy_page import PolicyPageReader
from adaptive_spec.wire.ring import MIN_SLOTS, RingWriter
from adaptive_spec.wire.shared_file import identity_at
from adaptive_spec.wire.slot import MAX_BATCH_LIMIT, MAX_K_LIMIT, SlotLayout

RING_NAME = "records.ring"
PAGE_NAME = "policy.page"
RING_BYTES_LIMIT = 32 << 20
"""Largest ring; a ring with large slots has fewer of them. A container's /dev/shm is often 64 MB."""
NEVER = 1 << 62
LOOK_STEPS = 64
"""Steps between checks for a new policy page, and of the ring."""
RETRY_STEPS = 1024
"""Steps between attempts to make a ring where that failed: an attempt on a full disk takes 50 microseconds."""

FOLDER_FAILS = (errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE)
"""Errors at the start that may pass: a read-only or full disk, no descriptors. The folder is then tried every RETRY_STEPS."""

_TRIAL, _FALLBACK, _LIMITED = int(StepFlag.TRIAL), int(StepFlag.FALLBACK), int(StepFlag.LIMITED)

log = logging.getLogger(__name__)


class TapCounters(NamedTuple):
    """Counts since the tap was opened.

    records_written, write_failures: records. page_failures: pages and policies that were refused. hook_failures: calls of
    the tap that failed inside. adoptions: policies adopted. fallback_steps: steps on the launch K for lack of a fresh policy.
    """

    records_written: int
    write_failures: int
    page_failures: int
    hook_failures: int
    adoptions: int
    fallback_steps: int


class BegunStep(NamedTuple):
    """What `begin_step` decided. An engine whose steps overlap passes it to `end_step`."""

    step: int
    k: int
    batch_size: int
    kv_tokens: int
    policy_version: int
    flags: int


class EngineTap:
    """An engine's link to its sidecar; see the module. Not thread-safe: one tap for one decode loop.

    info: the engine. refused: why it may not use the folder, "" if it may. planner: executes the policies; others only read it.
    begun: what the last `begin_step` decided.
    """

    def __init__(self, runtime_dir: Path | str, info: EngineInfo, ring: RingWriter | None, max_age_s: float = 30.0) -> None:
        """Use an open ring (None: every record counts as failed). Engines call `open`."""
        self.refused = ""
        self.info = info
        candidates = info.candidates or (info.launch_k,)
        self._launch_k = max((c for c in candidates if c <= info.launch_k), default=min(candidates))
        allowed = replace(info, launch_k=self._launch_k, candidates=candidates).allowed_mask()
        self.planner = Planner(self._launch_k, max(candidates), allowed)
        self._ragged = info.granularity is Granularity.REQUEST
        self._ring = ring
        self._role: RoleLock | None = None
        self._wants_role = False
        self._folder = Path(runtime_dir)
        self._page_path = str(self._folder / PAGE_NAME)
        self._slots = 0
        self._ring_failed = ""
        self._ring_look_at = 0
        self._engine = info.digest
        self._page: PolicyPageReader | None = None
        self._max_age_s = max_age_s
        self._step = 0
        self._look_at = 0
        self._fallback = True
        self._written_before = 0
        self._page_failures = self._hook_failures = self._unrecorded = self._adoptions = self._fallback_steps = 0
        self.begun = BegunStep(0, self._launch_k, 0, 0, 0, _FALLBACK)

    @classmethod
    def open(cls, runtime_dir: Path | str, info: EngineInfo, max_age_s: float = 30.0, slots: int = 1024) -> EngineTap:
        """Create `{runtime_dir}/records.ring` (and the folder, 0700); check for `policy.page` in it now and then.

        max_age_s: age of the sidecar's heartbeat, seconds, beyond which the launch K is used. slots: records in the ring, fewer
        if they would exceed RING_BYTES_LIMIT. The tap holds the role `engine` of the folder until it is closed. A folder that
        other users can use, or that another engine uses, is refused: see `refuse`; one on a read-only or full disk is tried
        again. A ring that cannot be created is logged; the tap then still follows policies and tries again now and then. A ring
        that was deleted or damaged is made again.
        """
        tap = cls(runtime_dir, info, None, max_age_s)
        tap._slots = slots
        try:
            make_runtime_dir(tap._folder)
            tap._role = RoleLock.acquire(tap._folder, "engine")
        except Exception as error:
            tap._wants_role = isinstance(error, OSError) and error.errno in FOLDER_FAILS
            tap.refuse(getattr(error, "strerror", None) or str(error))
            return tap
        remove_temporary_files(tap._folder, (RING_NAME, REPORT_NAME))
        tap._make_ring(allocate=True)
        return tap

    def refuse(self, reason: str) -> None:
        """Neither record nor obey anything from now on, and log the reason: the folder is not this engine's own."""
        self.refused = reason
        self._look_at = NEVER
        log.warning("runtime_dir '%s': %s: this engine cannot be observed or steered", Path(self._page_path).parent, reason)

    def take_role(self, other: EngineTap) -> None:
        """Take over the role in the folder, or the refusal, from a tap that was opened."""
        self._role, other._role = other._role, None
        self._wants_role, other._wants_role = other._wants_role, False
        self._slots = other._slots
        if other.refused:
            self.refused, self._look_at = other.refused, NEVER

    @property
    def counters(self) -> TapCounters:
        """The counts so far."""
        ring, page = self._ring, self._page
        return TapCounters(
            self._written_before + (ring.written if ring is not None else 0),
            (ring.failed if ring is not None else 0) + self._unrecorded,
            self._page_failures + (page.failures if page is not None else 0),
            self._hook_failures,
            self._adoptions,
            self._fallback_steps,
        )

    @property
    def held_batch_size(self) -> int:
        """Batch size the engine should keep for a trial if it can, 0 for none."""
        try:
            return 0 if self._fallback else self.planner.held_batch_size
        except Exception:
            self._hook_failures += 1
            return 0

    def begin_step(self, batch_size: int, kv_tokens: int, now_ns: int) -> int:
        """Choose K of the coming step, one that the engine runs at this batch size.

        batch_size: requests in the step. kv_tokens: their tokens in the KV cache. now_ns: time.monotonic_ns().
        """
        self._step += 1
        k, version, flags = self._launch_k, 0, _FALLBACK
        self._fallback = True
        try:
            planner = self.planner
            policy = self.newest_policy(now_ns)
            if policy is not None:
                if policy is not planner.policy:
                    planner.adopt(policy)
                    self._adoptions += 1
                k = planner.draft_length(batch_size, kv_tokens)
                version, flags = planner.version, _TRIAL if planner.in_trial else _LIMITED if planner.limited else 0
                self._fallback = False
        except Exception:
            self._hook_failures += 1
        if self._fallback:
            self._fallback_steps += 1
        self.begun = BegunStep(self._step, k, batch_size, kv_tokens, version, flags)
        return k

    def newest_policy(self, now_ns: int) -> Policy | None:
        """Return the policy for the step just begun, None for the launch K. `begin_step` calls it once a step.

        An engine with several ranks overrides it, so that all ranks use the same policy in the same step.
        """
        if self._step >= self._look_at:
            self._check_page()
        return self._page.poll(now_ns) if self._page is not None else None

    def verify_lengths(self, confidences: Float32s, expected: Floats | None = None) -> Lengths:
        """Choose verify_len uint8 [b], draft tokens to verify per request, in the step just begun.

        confidences: float32 [b, k], the draft model's probability of each drafted token, in (0, 1]; 0.0 where unknown.
        expected: see `Planner.verify_lengths`.
        """
        try:
            if self._ragged and not self._fallback:
                return self.planner.verify_lengths(confidences, expected)
        except Exception:
            self._hook_failures += 1
        try:
            rows, k = confidences.shape
            return np.full(rows, k, dtype=np.uint8)
        except Exception:
            self._hook_failures += 1
        try:
            return np.full(min(self.begun.batch_size, self.info.max_batch), self.begun.k, dtype=np.uint8)
        except Exception:
            return np.zeros(0, dtype=np.uint8)

    def end_step(
        self, now_ns: int, num_tokens: int, padded_tokens: int, draft_s: float, verify_s: float, draft_extend_s: float,
        step_s: float, confidences: Float32s, verify_len: Lengths, accept_len: Lengths,
        request_ids: RequestIds, flags: int = 0, begun: BegunStep | None = None,
    ) -> None:  # fmt: skip
        """Write the record of a step: fields, units and array types of `StepRecord`; K is the columns of confidences.

        flags: the engine's own (DISTURBED, CENSORED, STEP_CHOICE); TRIAL, FALLBACK and LIMITED are added here. begun: the step
        that ends, by default the last one begun.
        """
        try:
            if self._step >= self._ring_look_at:
                self._check_ring()
            ring = self._ring
            if ring is None:
                self._unrecorded += 1
                return
            if begun is None:
                begun = self.begun
            ring.write_fields(
                begun.step, now_ns, begun.kv_tokens, begun.policy_version, num_tokens, padded_tokens, begun.batch_size,
                confidences.shape[1], flags | begun.flags, draft_s, verify_s, draft_extend_s, step_s,
                confidences, verify_len, accept_len, request_ids,
            )  # fmt: skip
        except Exception:
            self._hook_failures += 1

    def detach_ring(self) -> RingWriter | None:
        """Hand the ring over to another tap; this one records nothing from now on."""
        ring, self._ring = self._ring, None
        return ring

    def close(self) -> None:
        """Close ring and page. Later steps use the launch K and are not recorded."""
        ring, page, self._ring, self._page = self._ring, self._page, None, None
        self._look_at = NEVER
        try:
            if self._role is not None:
                self._role.release()
            if page is not None:
                self._page_failures += page.failures
                page.close()
            if ring is not None:
                ring.close()
        except Exception:
            self._hook_failures += 1

    def _make_ring(self, *, allocate: bool) -> None:
        """Make the ring. A failure is logged once for each reason."""
        try:
            layout = SlotLayout.of(min(self.info.max_batch, MAX_BATCH_LIMIT), min(max(self.info.max_k, 1), MAX_K_LIMIT))
            slots = min(self._slots, max(RING_BYTES_LIMIT // layout.slot_bytes - 1, MIN_SLOTS))
            self._ring = RingWriter.create(self._folder / RING_NAME, self.info, slots, allocate=allocate)
        except Exception as error:
            # Not the whole text of an OSError, which names a temporary file and is another one each time.
            reason = getattr(error, "strerror", None) or str(error)
            if self._ring_failed != reason:
                self._ring_failed = reason
                log.warning("record ring in %s: cannot be created, this engine cannot be observed: %s", self._folder, reason)

    def _check_ring(self) -> None:
        """Make the ring again, and its folder, where it was deleted or damaged. Only the tap that has the role does."""
        role, ring = self._role, self._ring
        self._ring_look_at = self._step + LOOK_STEPS
        if role is None and not self._wants_role:
            return
        if (role is None or not role.in_place) and not self._take_role_again(role):
            self._ring_look_at = self._step + RETRY_STEPS
            return
        if ring is not None and ring.in_place():
            return
        self._drop_ring()
        self._make_ring(allocate=False)  # inside a decode step: 32 MiB take 25 ms to allocate
        if self._ring is None:
            self._ring_look_at = self._step + RETRY_STEPS
        elif ring is not None:
            log.warning("record ring in %s: was deleted or damaged, and is made again", self._folder)

    def _take_role_again(self, role: RoleLock | None) -> bool:
        """Take the role after its file was deleted, or where it could not be taken at the start.

        False: not possible now; until it is, neither record nor obey anything.
        """
        try:
            make_runtime_dir(self._folder)
            if role is not None:
                role.release()
            self._role = RoleLock.acquire(self._folder, "engine", attempts=1)
        except OSError as error:
            # Another engine has it, or a reader looks at the lock in this moment, or the folder is another user's now.
            self._drop_ring()
            self._drop_page()
            if not self.refused:
                self.refuse(error.strerror or str(error))
            return False
        self._wants_role = False
        if self.refused:
            log.warning("runtime_dir '%s': is this engine's again", self._folder)
            self.refused, self._look_at = "", self._step
        return True

    def _drop_ring(self) -> None:
        ring, self._ring = self._ring, None
        if ring is not None:
            self._written_before += ring.written
            self._unrecorded += ring.failed
            ring.close()

    def _drop_page(self) -> None:
        page, self._page = self._page, None
        if page is not None:
            self._page_failures += page.failures
            page.close()

    def _check_page(self) -> None:
        """Open the policy page if there is one that is not open yet."""
        self._look_at = self._step + LOOK_STEPS
        if self.refused:
            return
        old = self._page
        identity = identity_at(self._page_path)
        if identity is None or (old is not None and identity == old.identity):
            return
        try:
            check_runtime_dir(self._folder)
            self._page = PolicyPageReader.open(self._page_path, self._max_age_s, self.planner.policy, self._engine)
        except (OSError, ValueError):
            self._page_failures += 1
            return
        if old is not None:
            self._page_failures += old.failures
            old.close()
