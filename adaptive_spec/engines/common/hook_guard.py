"""The guard around every hook: a failure of the plugin never reaches the engine.

A hook is a pair `before(...) -> note` and `after(note, result, ...)` around one function of the engine, which is always called
exactly once, with the arguments it was given. An exception of the pair is counted and dropped. A hook that fails
`FAILURES_IN_A_ROW` times in a row, or once while the server starts, closes the guard: the engine's functions are still called,
the hooks are not. A hook of a group that may fail alone (`Guard.optional`) ends that group only: its hooks, and those of the
groups that need it, are no longer called, and the others go on.
"""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

FAILURES_IN_A_ROW = 8
FAULT_VARIABLE = "ADAPTIVE_SPEC_INJECT_FAULT"
"""For tests: comma-separated hooks that raise, such as `draft` or `draft/after`, or `draft:3` to raise three times. `@FILE`: read
them from a file, which may change."""

ONCE = frozenset({"scheduler", "worker", "controller", "attach"})
"""Hooks that run once, while the server starts. One failure there detaches the plugin: it cannot be attached in part."""


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
    """Counts failures by hook.

    engine: its name, "SGLang" or "vLLM"; its logger's name begins with it. closed: None, or why hooks are no longer called.
    on_close: called once, must not raise.
    """

    def __init__(self, engine: str, faults: str | None = None) -> None:
        self._engine = engine
        self._log = logging.getLogger(f"{engine.lower()}.adaptive_spec")
        text = os.environ.get(FAULT_VARIABLE, "") if faults is None else faults
        self._faults = InjectedFaults(text) if text else None
        self._row: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.closed: str | None = None
        self.on_close: Callable[[], None] = lambda: None
        self.groups: Mapping[str, str] = {}
        """Group of each hook."""
        self.optional: Sequence[str] = ()
        """Groups that may fail alone; each needs those before it."""
        self.lost: dict[str, str] = {}
        """Groups whose hooks are no longer called, and why."""
        self.on_lose: Callable[[str], None] = lambda group: None
        """Called with each group that is lost, once; must not raise."""

    def close(self, reason: str) -> None:
        """Stop calling hooks, and log why."""
        if self.closed is None:
            self.closed = reason
            self._log.error("adaptive-spec: detached, %s runs without the plugin: %s", self._engine, reason)
            self.on_close()

    def lose(self, group: str, reason: str) -> None:
        """Stop calling the hooks of an optional group and of those that need it, and log why in one line."""
        if group in self.lost:
            return
        self._log.error("adaptive-spec: continues without %s: %s", group, reason)
        for name in self.optional[self.optional.index(group) :]:
            if name not in self.lost:
                self.lost[name] = reason
                self.on_lose(name)

    def failed(self, hook: str, part: str = "") -> None:
        """Count a failure, inside an `except` block; the first of each hook is logged with its traceback.

        part: of the hook. Failures in a row are those of one part: the success of another does not end the row.
        """
        row = hook + part
        self.failures[hook] += 1
        self._row[row] += 1
        if self.failures[hook] == 1:
            self._log.exception("adaptive-spec: hook %s failed; further failures are only counted", hook)
        if hook in ONCE:
            self.close(f"hook {hook} failed while the server started")
        elif self._row[row] >= FAILURES_IN_A_ROW:
            reason = f"hook {hook} failed {FAILURES_IN_A_ROW} times in a row"
            group = self.groups.get(hook, "")
            if group in self.optional:
                self.lose(group, reason)
            else:
                self.close(reason)

    def part(self, hook: str, call: Callable[..., Any], *args: Any) -> Any:
        """Call a part of a hook that may fail without the rest: its result, None when it failed or its group is lost."""
        if self.groups.get(hook, "") in self.lost:
            return None
        part = "/" + getattr(call, "__name__", "")
        try:
            self.fault(hook)
            result = call(*args)
        except Exception:
            self.failed(hook, part)
            return None
        self._row[hook + part] = 0
        return result

    def fault(self, name: str) -> None:
        """Raise if a test asked for it."""
        if self._faults is not None and self._faults.due(name):
            raise RuntimeError(f"fault injected into {name} by {FAULT_VARIABLE}")

    def around(
        self, hook: str, before: Before | None, after: After | None, first: Callable[..., None] | None = None
    ) -> Callable[..., Any]:
        """Return a hook around a function of the engine: `wrapper(original, *args, **kwargs)`.

        first: called before all else, also when the guard is closed: what all ranks must decide alike, whatever fails on one.
        """

        def wrapper(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if first is not None:
                try:
                    first(*args, **kwargs)
                except Exception:
                    self.failed(hook)
            note, went_well = None, self.closed is None
            if self.lost and self.groups.get(hook, "") in self.lost:
                went_well = False
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
