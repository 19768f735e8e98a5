"""Keeps in bounds what SGLang leaves behind at every switch of K: a log line, and an entry in a list that is never cut.

SGLang's `apply_runtime_state` records a switch with `RuntimeContext.override`, which appends (source, fields) to a list that
every `/server_info` replays in order: 248 bytes and 0.7 us a switch. SGLang's own policy logs its moves too, and moves whenever
the counts it is fed say so, also while its K is not used. Nothing of SGLang's files is changed; failures are counted and never
detach the plugin.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, MutableSequence
from typing import Any

log = logging.getLogger("sglang.adaptive_spec")

LINES_AT_ONCE = 5
"""Lines of a kind that are logged in each interval, so that a quiet server logs as without the plugin."""
LINE_INTERVAL_S = 30.0
"""At the 0.05 switches a step of a served model at 20 ms a step, about 75 lines would come in this time."""

LOGGERS = {
    "sglang.srt.speculative.eagle_worker_v2": "Switch adaptive runtime state",
    "sglang.srt.speculative.adaptive_spec_params": "Adaptive spec params updated",
}
"""Begin of the lines that are limited, by the logger they come from."""


class LimitLines(logging.Filter):
    """Lets LINES_AT_ONCE lines with a certain begin pass in each interval; the first of the next says how many were left out.

    Other lines pass. begin: how they start. clock: monotonic seconds.
    """

    def __init__(self, begin: str, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._begin, self._clock = begin, clock
        self._interval_ends_s = -1.0
        self._left = LINES_AT_ONCE
        self.dropped = 0

    def filter(self, record: logging.LogRecord) -> bool:
        if not isinstance(record.msg, str) or not record.msg.startswith(self._begin):
            return True
        now_s = self._clock()
        if now_s >= self._interval_ends_s:
            self._interval_ends_s, self._left = now_s + LINE_INTERVAL_S, LINES_AT_ONCE
            if self.dropped:
                record.msg += f" ({self.dropped} lines like this one were left out before it by adaptive-spec)"
                self.dropped = 0
        if self._left == 0:
            self.dropped += 1
            return False
        self._left -= 1
        return True


def limit_lines() -> None:
    """Add the filters to SGLang's loggers, once a process."""
    for name, begin in LOGGERS.items():
        logger = logging.getLogger(name)
        if not any(isinstance(found, LimitLines) for found in logger.filters):
            logger.addFilter(LimitLines(begin))


def drop_overridden(entries: MutableSequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Remove the entries before the last one that it overrides: same source, no field that the last one does not set.

    Replaying the list gives the same values as before. Constant time a switch: one entry is removed.
    """
    while len(entries) >= 2 and entries[-2][0] == entries[-1][0] and entries[-2][1].keys() <= entries[-1][1].keys():
        del entries[-2]


class SwitchUpkeep:
    """Called after each switch. failures: times that SGLang's list could not be used; the first is logged, and no more tried."""

    def __init__(self) -> None:
        self.failures = 0
        self._entries: Callable[[], MutableSequence[tuple[str, Mapping[str, Any]]]] | None = _sglangs_entries

    def __call__(self) -> None:
        if self._entries is None:
            return
        try:
            drop_overridden(self._entries())
        except Exception as error:
            self.failures, self._entries = self.failures + 1, None
            log.warning("adaptive-spec: SGLang's list of configuration changes is not kept short: %r", error)


def _sglangs_entries() -> MutableSequence[tuple[str, Mapping[str, Any]]]:
    from sglang.srt.runtime_context import get_context

    entries: MutableSequence[tuple[str, Mapping[str, Any]]] = get_context()._overrides_log
    return entries
