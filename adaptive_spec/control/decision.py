"""The decision: which K every batch size gets, when that changes, and when a change is taken back.

    propose   best K by forecast goodput, within k_min..k_max, where the gain exceeds `min_gain` and the uncertainty
    adopt     make the proposed table the table; a change that matters is a swap, and is watched
    follow    compare the steps after a swap with what the previous table would have given; roll back if it would have been better

A swap waits after the one before: `min_dwell_s`, twice as long for every swap lately (exponential backoff), drift or not. Where
times or acceptance keep changing, what is known of them is worth little, and the table holds. So it does while all plans become
slower and faster in turn: a K must then gain more than that (`Forecast.unrest`). A batch size that is served for the
first time does not wait: its K was extrapolated until then.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adaptive_spec.config.settings import PolicySettings
from adaptive_spec.control.explanation import Considered
from adaptive_spec.control.guard_rails import SwapWatch, Table, better_table, hurdles, table_for, within_target
from adaptive_spec.control.switching import charge_switches
from adaptive_spec.domain.allowed import runnable_table, verified_rails, within_rails
from adaptive_spec.domain.arrays import Bools, Floats
from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.domain.step_record import StepRecord
from adaptive_spec.models.goodput import Forecast
from adaptive_spec.models.model_set import Traffic

ROLLBACK_HOLD_S = 30.0
"""A K that was rolled back is not chosen again for so long."""
SWAP_MEMORY_S = 30.0
"""Time constant with which swaps are forgotten: five swaps a minute at most in the long run, at the default dwell."""
EVERY_SIZE = 64
"""Batch sizes up to it are all shown: a bounded number of series, whatever the engine's largest batch."""
ASKED_FOR = ("sweep", "command")
"""Reasons of swaps that were to come: they are not watched, and no later swap waits because of them."""
USED_SHARE = 0.02
"""A batch size with a smaller share of recent steps does not make a change of the table a swap."""


@dataclass(frozen=True)
class Proposal:
    """A table to adopt. previous: the present one. goodput: 0 outside k_min..k_max, [batches, contexts, K + 1].

    swap: the reason (sweep, command, drift or gain) when K changes for recent traffic; None: it does not.
    """

    table: Table
    previous: Table
    goodput: Floats
    swap: str | None


class Decision:
    """Owns the K table [max_batch + 1, contexts] and the watch over its last swap. Every entry is allowed at its batch size.

    allowed: K that the engine runs and the guard rails leave, [max_batch + 1, max_k + 1]. verified: least and most draft tokens
    per request of a step that it may verify, see `verified_rails`.
    """

    def __init__(self, settings: PolicySettings, info: EngineInfo) -> None:
        self._settings, self._info = settings, info
        self.allowed: Bools = within_rails(info.allowed_mask(), settings.k_min, settings.k_max)
        self.verified = verified_rails(info.candidates, settings.k_min, settings.k_max)
        self._runnable = runnable_table(self.allowed)
        self.table = self.runnable(np.full((info.max_batch + 1, 1), info.launch_k, dtype=np.uint8))
        self._swap_time_s = -math.inf
        self._drift_time_s = -math.inf
        self._recent_swaps = 0.0
        self._served = np.zeros(info.max_batch + 1, dtype=np.bool_)
        """Batch sizes that were used when a table was proposed."""
        self._watch: SwapWatch | None = None
        self._banned: NDArray[np.bool_] | None = None
        self._banned_until_s = 0.0
        self.considered: Considered | None = None
        """What the last proposal was made of, None before the first."""

    def propose(self, forecast: Forecast, traffic: Traffic, now_s: float, first: bool) -> Proposal:
        """Best table by the forecast. first: take the best K everywhere, however small its gain."""
        rails = self._settings
        goodput = forecast.goodput * self.allowed[:, None, :]
        if rails.slo_tpot_ms is not None:
            goodput = within_target(goodput, forecast.seconds_per_token(), rails.slo_tpot_ms * 1e-3)
        worth = charge_switches(goodput, forecast.tokens_per_request, traffic.batches, traffic.crossings, forecast.switch_s)
        current = table_for(self.table, goodput.shape[1])
        banned = None if first else self._bans(goodput.shape, now_s)
        if first:
            hurdle = np.full_like(worth, forecast.unrest)
        else:
            hurdle = hurdles(forecast.uncertainty, current, rails.min_gain, forecast.unrest)
        wanted = self.runnable(better_table(worth, hurdle, current, banned))
        self.considered = Considered(now_s, rails, forecast, goodput, worth, hurdle, banned, current, wanted)
        used = traffic.batches > USED_SHARE * max(traffic.batches.sum(), 1e-9)
        new = used & ~self._served
        self._served |= used
        changed = (wanted != current)[:, min(traffic.context, wanted.shape[1] - 1)]
        if not changed[used].any():
            return Proposal(wanted, current, goodput, None)
        if first:
            return Proposal(wanted, current, goodput, "sweep")
        if now_s - self._swap_time_s < rails.min_dwell_s * 2.0 ** self._swaps_lately(now_s):
            if not changed[new].any():
                return Proposal(current, current, goodput, None)
            wanted = np.where(new[:, None], wanted, current)
        return Proposal(wanted, current, goodput, "drift" if self._drift_time_s > self._swap_time_s else "gain")

    def adopt(self, proposal: Proposal, traffic: Traffic, version: int, forecast_ratio: float, now_s: float) -> str:
        """Make the proposed table the table. Returns the swap in words, "" when it is none.

        version: of the policy that will carry it. forecast_ratio: see `SwapWatch`.
        """
        self.table = proposal.table
        if proposal.swap is None:
            return ""
        self._watch = None
        if proposal.swap in ASKED_FOR:
            self._drift_time_s = -math.inf  # of what drifted before, the table knows
        else:
            self._note_swap(now_s)
            self._watch = SwapWatch(proposal.previous, self.table, self._settings.rollback_loss, forecast_ratio, version)
        b, c = self.entry(traffic)
        old, new = int(proposal.previous[b, c]), int(self.table[b, c])
        if old == new:
            return f"K changed at other batch sizes: {proposal.swap}"
        before, after = proposal.goodput[b, c, old], proposal.goodput[b, c, new]
        gain = after / before - 1.0 if before > 0.0 else 0.0
        return f"K {old}→{new} at batch {b}: {proposal.swap}" + (f", {gain:+.1%} expected" if gain else "")

    def follow(self, record: StepRecord, context: int, forecast: Forecast, now_s: float) -> str:
        """Take an ordinary step of an active policy. Returns the rollback in words when the last swap failed, else ""."""
        watch = self._watch
        if watch is None or record.policy_version < watch.version:
            return ""
        row = min(record.batch_size, self._info.max_batch)
        if not watch.add(row, min(context, watch.changed.shape[1] - 1), record.output_tokens, record.step_s):
            return ""
        if not watch.failed(forecast.goodput):
            if watch.steps >= watch.MAX_STEPS:
                self._watch = None
            return ""
        self._watch = None
        self._banned = np.zeros((*watch.changed.shape, self._info.max_k + 1), dtype=bool)
        b, c = np.nonzero(watch.previous != watch.changed)
        self._banned[b, c, watch.changed[b, c]] = True
        self._banned_until_s = now_s + ROLLBACK_HOLD_S
        self.table = watch.previous
        self._note_swap(now_s)
        share, _ = watch.share(forecast.goodput)
        return f"rolled back at batch {row}: measured {share:.0%} of what the previous K would have given"

    def note_drift(self, now_s: float) -> None:
        """A drift was noticed: it is the reason of the next swap, and the last one is no longer watched."""
        self._drift_time_s = now_s
        self.stop_watching()

    def _swaps_lately(self, now_s: float) -> float:
        """Forgetting count of swaps."""
        return self._recent_swaps * math.exp(-max(now_s - self._swap_time_s, 0.0) / SWAP_MEMORY_S) if self._recent_swaps else 0.0

    def _note_swap(self, now_s: float) -> None:
        self._recent_swaps = self._swaps_lately(now_s) + 1.0
        self._swap_time_s = now_s

    def stop_watching(self) -> None:
        self._watch = None

    def pin(self, k: int) -> bool:
        """One K for every batch size, or what runs in its place where it is not allowed. Returns whether the table changed."""
        before, self.table = self.table, self.runnable(np.full_like(self.table, k))
        return not np.array_equal(before, self.table)

    def runnable(self, table: Table) -> Table:
        """The table with every K that is not in `allowed` at its batch size replaced, see `runnable_table`."""
        k = np.minimum(table, self._runnable.shape[1] - 1)
        return np.take_along_axis(self._runnable, k.astype(np.int64), axis=1)

    def entry(self, traffic: Traffic) -> tuple[int, int]:
        """Batch size and context bucket of the table for the last step."""
        return min(max(traffic.batch_size, 1), self._info.max_batch), min(traffic.context, self.table.shape[1] - 1)

    def k_by_batch_size(self, context: int, largest: int) -> dict[int, int]:
        """K of batch sizes 1..largest in a context bucket: all up to `EVERY_SIZE`, beyond it powers of two and the last one."""
        c = min(context, self.table.shape[1] - 1)
        last = min(largest, self._info.max_batch)
        sizes = [b for b in range(1, last + 1) if b <= EVERY_SIZE or b == last or b & (b - 1) == 0]
        return {b: int(self.table[b, c]) for b in sizes}

    def _bans(self, shape: tuple[int, ...], now_s: float) -> NDArray[np.bool_] | None:
        """Entries rolled back lately, [batches, contexts, K + 1]; None: none."""
        if now_s >= self._banned_until_s:
            self._banned = None
        if self._banned is not None and self._banned.shape != shape:
            self._banned = np.repeat(self._banned[:, :1], shape[1], axis=1)
        return self._banned
