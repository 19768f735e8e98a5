"""Tensor-parallel ranks run the same K: every change of the policy in use reaches all of them before the same step.

Rank 0 alone reads the sidecar's page. What it decides travels as one more entry of the list of requests that SGLang broadcasts to
all ranks in every loop of its scheduler, so there is no collective of ours: a rank either has the entry, or it waits in SGLang's
own broadcast. Answers travel the other way through a key-value store (`rank_notes`), outside the steps. Only rank 0 reads them.

    begin           rank 0, once all ranks have stated equal terms: `Steering.steers` from now on
    offer           a policy, to be decoded and tried; every rank answers
    use             rank 0, once every rank has answered yes: the policy acts until the forward pass stated
    none            the page is stale, or no policy acts: K of the fallback
    leave           for good, with the reason

A rank states a failure in the store; rank 0 then sends `leave`. Until it arrives all ranks go on alike: K follows from the
policy in use, SGLang's number of the forward pass, batch size and KV tokens, which are equal on all ranks, and it is decided
outside the hooks that may fail (`Guard.around`, `first`). A rank 0 that sends nothing more ends the policy in use by its last
forward pass, on all ranks alike. No call here waits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.domain.policy import Policy
from adaptive_spec.engine_side.planner import Planner
from adaptive_spec.engine_side.tap import EngineTap
from adaptive_spec.wire.policy_page import decode_policy, encode_policy
from adaptive_spec.wire.ring import RingWriter

MARK = "adaptive-spec"
"""First element of a message. Messages are tuples of builtin types: a rank needs nothing of ours to unpickle one."""
LEASE_PASSES = 4096
"""Forward passes that `use` holds for; renewed at half. At 100 passes a second, a rank 0 that sends nothing more steers 40 s."""
LOOK_S = 0.005
"""Seconds between looks at page and notes: the scheduler of an idle server loops without a pause."""
COUNTED_S = 0.1
"""Most that one loop counts towards a timeout: while one rank is stopped all of them wait for it, and that is no late answer."""

log = logging.getLogger("sglang.adaptive_spec")


class Message(NamedTuple):
    """kind: see the module. serial: of the policy. until: forward pass at which `use` ends. text: reason. data: the policy."""

    mark: str
    kind: str
    serial: int = 0
    until: int = 0
    text: str = ""
    data: bytes = b""


class View(NamedTuple):
    """What rank 0 has read. terms: by rank, None where not stated. answers: last ones of ranks 1 and up. failed: "" if none."""

    terms: tuple[int | None, ...]
    answers: tuple[int, ...] = ()
    failed: str = ""


class Notes(Protocol):
    """The store, by way of a thread: no method waits.

    view: rank 0 only, the newest. waiting: rank 0 is waiting for answers. answer: serial of an offer this rank can follow,
    negative if it cannot. fail: this rank has failed.
    """

    waiting: bool

    @property
    def view(self) -> View: ...

    def answer(self, number: int) -> None: ...

    def fail(self, reason: str) -> None: ...

    def end(self) -> None: ...


class _Known(NamedTuple):
    serial: int
    policy: Policy


class Steering:
    """One rank's part. timeout_s: for the terms of all ranks and for their answers. check: raises if it cannot follow a policy.

    steers: rank 0 has begun, so all ranks have the same settings. left: why the ranks left, "" while they have not. left stays.
    adopted: policies taken into use. refused: offers that some rank could not follow. forward_pass: SGLang's number of the last.
    """

    def __init__(self, rank: int, timeout_s: float = 60.0, check: Callable[[Policy], None] = lambda _: None) -> None:
        self._rank, self._timeout_s, self._check = rank, timeout_s, check
        self._notes: Notes | None = None
        self._offered: _Known | None = None
        self._accepted: _Known | None = None
        self._acting = False
        self._until = 0
        self.forward_pass = 0
        self.steers = False
        self.left = ""
        self.on_leave: Callable[[], None] = lambda: None
        """Called once, when the ranks have left. Its exceptions are logged."""
        self.adopted = self.refused = 0
        self._failure = ""
        # Rank 0 only.
        self._serial = self._ready = 0  # of the newest offer; of the newest that all have answered
        self._offered_version: int | None = None
        self._own_answer = 0
        self._looked_s = -1e9
        self._waited_s = 0.0

    def join(self, notes: Notes) -> None:
        """This rank has stated its terms; rank 0 waits for those of the others."""
        self._notes = notes

    def fail(self, reason: str) -> None:
        """This rank cannot go on: make all ranks leave. Until they do, it goes on like them."""
        if self._failure or self.left:
            return
        self._failure = reason
        if self._rank and self._notes is not None:
            self._notes.fail(f"rank {self._rank}: {reason}")

    @property
    def policy(self) -> Policy | None:
        """What all ranks act on in the step of `forward_pass`, None for the fallback."""
        acts = self._acting and not self.left and self._accepted is not None and self.forward_pass < self._until
        return self._accepted.policy if acts and self._accepted is not None else None

    # -- rank 0 --------------------------------------------------------------------------------------------------------

    def outgoing(self, newest: Callable[[], Policy | None], now_s: float) -> Message | None:
        """Once per loop of the scheduler: what to send to all ranks, this one included. newest: the page's policy."""
        notes = self._notes
        if notes is None or self.left or now_s < self._looked_s + LOOK_S:
            return None
        ran_s, self._looked_s = min(now_s - self._looked_s, COUNTED_S), now_s
        try:
            message = self._decide(notes, newest, ran_s)
        except Exception as error:
            self.fail(f"rank 0: {type(error).__name__}: {error}")
            message = self._leaving(self._failure)
        return message

    def _decide(self, notes: Notes, newest: Callable[[], Policy | None], ran_s: float) -> Message | None:
        view = notes.view
        failed = self._failure or view.failed
        if failed:
            return self._leaving(failed)
        if not self.steers:
            self._waited_s += ran_s
            return self._begin(view)
        self._answered(notes, view, ran_s)
        if self._failure:
            return self._leaving(self._failure)
        policy = newest()
        if policy is None:
            return Message(MARK, "none") if self._acting else None
        if self._ready and not (self._acting and self._accepted is not None and self._accepted.serial == self._ready):
            return self._use(self._ready)
        if not notes.waiting and policy.version != self._offered_version:
            self._serial += 1
            self._offered_version, self._own_answer, self._waited_s, notes.waiting = policy.version, 0, 0.0, True
            return Message(MARK, "offer", self._serial, data=encode_policy(policy))
        due = self._acting and self.forward_pass >= self._until - LEASE_PASSES // 2
        return self._use(self._ready) if due else None

    def _begin(self, view: View) -> Message | None:
        missing = [str(rank) for rank, terms in enumerate(view.terms) if terms is None]
        cannot = [str(rank) for rank, terms in enumerate(view.terms) if terms == 0]
        if cannot:
            return self._leaving(f"a hook failed while the server started on rank {', '.join(cannot)}")
        if missing:
            reason = f"rank {', '.join(missing)} did not answer within {self._timeout_s:g} s: is the plugin switched on there?"
            return self._leaving(reason) if self._waited_s > self._timeout_s else None
        if len(set(view.terms)) > 1:
            return self._leaving("the ranks' settings or versions differ")
        return Message(MARK, "begin")

    def _answered(self, notes: Notes, view: View, ran_s: float) -> None:
        """See whether all ranks have answered the open offer."""
        if not notes.waiting:
            return
        answers = (self._own_answer, *view.answers)
        if -self._serial in answers:
            self.refused += 1
            notes.waiting = False
        elif len(answers) == len(view.terms) and all(answer == self._serial for answer in answers):
            self._ready, notes.waiting = self._serial, False
        else:
            self._waited_s += ran_s
            if self._waited_s > self._timeout_s:
                late = [str(rank) for rank, answer in enumerate(answers) if answer != self._serial]
                self.fail(f"rank {', '.join(late)} did not answer a policy within {self._timeout_s:g} s")

    def _use(self, serial: int) -> Message:
        return Message(MARK, "use", serial, self.forward_pass + LEASE_PASSES)

    def _leaving(self, reason: str) -> Message | None:
        """Tell all ranks, if they have begun; else nobody waits for this one."""
        if self.steers:
            return Message(MARK, "leave", text=reason)
        self._leave(reason)
        return None

    # -- every rank ----------------------------------------------------------------------------------------------------

    def incoming(self, message: Sequence[Any]) -> None:
        """A message, on every rank in the same loop of the scheduler. Never raises."""
        _, kind, serial, until, text, data = message
        if self.left:
            return
        if kind == "use":
            if self._offered is not None and self._offered.serial == serial:
                self._accepted, self._offered = self._offered, None
                self.adopted += 1
            self._acting, self._until = True, until
            if self._accepted is None or self._accepted.serial != serial:
                self._acting = False
                self.fail(f"policy {serial} was put to use and is not known")
        elif kind == "none":
            self._acting = False
        elif kind == "begin":
            self.steers = True
        elif kind == "offer":
            self._answer(serial, data)
        elif kind == "leave":
            self._leave(text)

    def _answer(self, serial: int, data: bytes) -> None:
        answer = serial
        try:
            policy = decode_policy(data)
            self._check(policy)
            self._offered = _Known(serial, policy)
        except Exception as error:
            log.warning("adaptive-spec: this rank cannot follow a policy: %s: %s", type(error).__name__, error)
            answer, self._offered = -serial, None
        self._own_answer = answer
        if self._notes is not None:
            self._notes.answer(answer)

    def _leave(self, reason: str) -> None:
        self.left, self._acting = reason, False
        try:
            log.error("adaptive-spec: the ranks leave K to the fallback for good: %s", reason)
            if self._notes is not None:
                self._notes.end()
            self.on_leave()
        except Exception:
            log.exception("adaptive-spec: the ranks' leaving could not be reported")


def carried(result: list[Any]) -> tuple[list[Any], list[Any]]:
    """Split what SGLang has broadcast into its own requests and our messages."""
    messages = [entry for entry in result if isinstance(entry, tuple) and len(entry) == 6 and entry[0] == MARK]
    return ([entry for entry in result if not any(entry is m for m in messages)], messages) if messages else (result, messages)


def try_policy(info: EngineInfo) -> Callable[[Policy], None]:
    """A check of a policy: what a tap of this engine does with it, on a planner of its own."""

    def check(policy: Policy) -> None:
        planner = Planner(info.launch_k, max(info.candidates or (info.launch_k,)))
        planner.adopt(replace(policy, trials=()))
        for batch_size in (1, info.max_batch):
            planner.draft_length(batch_size, 1)

    return check


class RankedTap(EngineTap):
    """The tap of one rank. Rank 0 writes the ring and reads the page; all of them act on what `steering` says."""

    def __init__(
        self, runtime_dir: Path | str, info: EngineInfo, ring: RingWriter | None, steering: Steering, max_age_s: float = 30.0
    ) -> None:
        super().__init__(runtime_dir, info, ring, max_age_s)
        self.steering = steering

    def page_policy(self, now_ns: int) -> Policy | None:
        """What the sidecar's page says; rank 0 only."""
        return super().newest_policy(now_ns)

    def newest_policy(self, now_ns: int) -> Policy | None:
        return self.steering.policy
