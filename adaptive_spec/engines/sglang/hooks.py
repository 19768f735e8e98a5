"""Where the plugin takes hold in SGLang, and the guard that keeps every fault of ours from SGLang.

A hook is a pair `before(...) -> note` and `after(note, result, ...)` around one function of SGLang, which is always called
exactly once with the arguments it was given. Whatever of ours raises is counted and left out. A hook that fails
`FAILURES_IN_A_ROW` times in a row, or once while the server starts, closes the guard: from then on SGLang's functions are called
and nothing else.
"""

from __future__ import annotations

import inspect
import logging
import math
import os
import pkgutil
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

TESTED_VERSIONS = ("0.5.23",)
FAILURES_IN_A_ROW = 8
FAULT_VARIABLE = "ADAPTIVE_SPEC_INJECT_FAULT"
"""For tests: hooks that raise, `draft` or `draft/after`, separated by commas; `@FILE`: they stand in a file, which may change, as
`draft:3` with how often."""

_SPECULATIVE = "sglang.srt.speculative."
_EAGLE = _SPECULATIVE + "eagle_worker_v2."
_DSPARK = _SPECULATIVE + "dspark_components."
_RESULTS = "sglang.srt.managers.scheduler_components.batch_result_processor."

log = logging.getLogger("sglang.adaptive_spec")


class Target(NamedTuple):
    """One function of SGLang: our name for the hook, its dotted path, parameters it must have."""

    hook: str
    path: str
    parameters: tuple[str, ...]


TARGETS = (
    Target("worker", "sglang.srt.speculative.spec_info.SpeculativeAlgorithm.create_worker", ("self", "server_args")),
    Target("controller", _SPECULATIVE + "adaptive_runtime_state.AdaptiveController.__init__", ("self", "worker", "policy")),
    Target("attach", _EAGLE + "EAGLEWorkerV2.init_cuda_graphs", ("self",)),
    Target("step", _EAGLE + "EAGLEWorkerV2.forward_batch_generation", ("self", "batch")),
    Target("draft", _EAGLE + "EagleDraftWorker.draft", ("self", "batch")),
    Target("draft_forward", _EAGLE + "EagleDraftWorker.draft_forward", ("self", "forward_batch")),
    Target("verify", _EAGLE + "EAGLEWorkerV2.verify", ("self", "batch")),
    Target("draft_extend", _EAGLE + "EagleDraftWorker._draft_extend_for_decode", ("self", "batch", "batch_result")),
    Target("results", _RESULTS + "SchedulerBatchResultProcessor._resolve_spec_v2_tokens", ("self", "result", "batch")),
)
"""All of them, or the plugin leaves SGLang alone."""
DSPARK_TARGETS = (
    Target("attach", _DSPARK + "dspark_worker_v2.DSparkWorkerV2.init_cuda_graphs", ("self",)),
    Target("plan", _DSPARK + "dspark_planner.DSparkVerifyPlanner.prepare_verify_budget", ("self", "batch")),
    Target("step", _DSPARK + "dspark_worker_v2.DSparkWorkerV2.forward_batch_generation", ("self", "batch")),
    Target("draft", _DSPARK + "dspark_draft.DraftBlockProposer.propose", ("self", "batch")),
    Target("verify", _DSPARK + "dspark_verify.TargetVerifyExecutor.run_compact", ("self", "batch", "layout")),
    Target("verify_all", _DSPARK + "dspark_verify.TargetVerifyExecutor.run_non_compact", ("self", "batch")),
)
"""For DSPARK in place of EAGLE's, hooked when SGLang has chosen DSPARK, or the plugin leaves such a server alone."""
MEETING = frozenset({"step", "plan"})
"""Hooks in which ranks meet."""
ONCE = frozenset({"worker", "controller", "attach"})
"""Hooks that run while the server starts: one failure there is final, for a half attached plugin is none."""

NEEDED = (
    *(_SPECULATIVE + "adaptive_spec_params." + name for name in ("adaptive_unsupported_reason",)),
    *(_SPECULATIVE + "adaptive_runtime_state." + name for name in ("AdaptiveSpecPolicy", "AdaptiveController.init_states")),
    "sglang.srt.runtime_context.get_parallel",
    "sglang.srt.plugins.hook_registry.HookRegistry",
)
"""What is used but not hooked."""
DSPARK_NEEDED = (
    *(_DSPARK + "dspark_planner.DSparkVerifyPlanner." + name for name in (
        "is_compact_mode", "is_verify_all", "mode_value", "schedules_verify_budget", "set_forced_budget_frac",
    )),
    _DSPARK + "dspark_sps.SpsAdditiveCostTable",
    _DSPARK + "dspark_sts.DSparkStsCalibration",
    "sglang.srt.runtime_context.attn_dp_enabled_of",
)  # fmt: skip


def missing_targets(targets: Sequence[Target] = TARGETS, needed: Sequence[str] = NEEDED) -> list[str]:
    """Say of every target that is not there, or not with the parameters it must have, what is wrong. Empty: all is well."""
    wrong = []
    for target in targets:
        try:
            found = pkgutil.resolve_name(target.path)
            parameters = inspect.signature(found).parameters
        except Exception as error:
            wrong.append(f"{target.path}: {type(error).__name__}: {' '.join(str(error).split())[:120]}")
            continue
        lacking = [name for name in target.parameters if name not in parameters]
        if lacking:
            wrong.append(f"{target.path} has no parameter {', '.join(lacking)}")
    for path in needed:
        try:
            pkgutil.resolve_name(path)
        except Exception as error:
            wrong.append(f"{path}: {type(error).__name__}: {' '.join(str(error).split())[:120]}")
    return wrong


class InjectedFaults:
    """See FAULT_VARIABLE."""

    def __init__(self, text: str) -> None:
        self._file = text[1:] if text.startswith("@") else None
        self._text = ""
        self._left: dict[str, float] = {}
        self._read("" if self._file else text)

    def due(self, name: str) -> bool:
        if self._file is not None:
            with open(self._file, encoding="utf-8") as file:
                self._read(file.read())
        left = self._left.get(name, 0.0)
        self._left[name] = left - 1.0
        return left >= 1.0

    def _read(self, text: str) -> None:
        if text == self._text:
            return
        self._text, self._left = text, {}
        for entry in text.split(","):
            name, _, times = entry.strip().partition(":")
            self._left[name] = float(times) if times else math.inf


Before = Callable[..., Any]
After = Callable[..., None]


class Guard:
    """Counts failures by hook. closed: None, or why nothing of ours is called any more. on_close: told once, must not raise.

    lockstep: this is one of several ranks. Then the hooks of `MEETING` are called even when the guard is closed: the other ranks
    wait for this one in them, and K stays what they agreed on until all of them have gone back to the launch K.
    """

    def __init__(self, faults: str | None = None) -> None:
        text = os.environ.get(FAULT_VARIABLE, "") if faults is None else faults
        self._faults = InjectedFaults(text) if text else None
        self._row: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.closed: str | None = None
        self.lockstep = False
        self.on_close: Callable[[], None] = lambda: None

    def close(self, reason: str) -> None:
        """Stop calling anything of ours."""
        if self.closed is None:
            self.closed = reason
            log.error("adaptive-spec: detached, SGLang goes on by itself: %s", reason)
            self.on_close()

    def failed(self, hook: str) -> None:
        """Count a failure, inside an `except` block; the first of each hook is logged with its traceback."""
        self.failures[hook] += 1
        self._row[hook] += 1
        if self.failures[hook] == 1:
            log.exception("adaptive-spec: hook %s failed; further failures are only counted", hook)
        if hook in ONCE:
            self.close(f"hook {hook} failed while the server started")
        elif self._row[hook] >= FAILURES_IN_A_ROW:
            self.close(f"hook {hook} failed {FAILURES_IN_A_ROW} times in a row")

    def fault(self, name: str) -> None:
        """Raise if a test asked for it."""
        if self._faults is not None and self._faults.due(name):
            raise RuntimeError(f"fault injected into {name} by {FAULT_VARIABLE}")

    def around(self, hook: str, before: Before | None, after: After | None) -> Callable[..., Any]:
        """Return an AROUND hook for SGLang: `wrapper(original, *args, **kwargs)`."""

        def wrapper(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            note, went_well = None, self.closed is None or (self.lockstep and hook in MEETING)
            if went_well:
                try:
                    self.fault(hook)
                    if before is not None:
                        note = before(*args, **kwargs)
                except Exception:
                    went_well = False
                    self.failed(hook)
            result = original(*args, **kwargs)
            if went_well and after is not None:
                try:
                    self.fault(hook + "/after")
                    after(note, result, *args, **kwargs)
                except Exception:
                    went_well = False
                    self.failed(hook)
            if went_well and self._row[hook]:
                self._row[hook] = 0
            return result

        return wrapper
