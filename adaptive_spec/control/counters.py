"""Counters: everything that is counted, and the latest events, for metrics and the status page.

The controller owns the only `Counters`. They survive a warm restart; events do not.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from adaptive_spec.control.k_switches import REASONS, Reason
from adaptive_spec.domain.step_record import StepFlag, StepRecord
from adaptive_spec.models.acceptance.online import StepScore
from adaptive_spec.models.model_set import StepComparison

STEP_EDGES_S = (*tuple(round(m * 10.0**e, 10) for e in range(-5, 1) for m in (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)), 10.0)
STAGES = ("draft", "verify", "draft_extend", "step")
SWAP_REASONS = ("sweep", "gain", "drift", "rollback", "pin", "command")
DROP_REASONS = ("lost", "torn", "invalid", "failed")
WINDOW_STEPS = 256
"""Steps the current goodput and the gains are taken over."""
MAX_EVENTS = 100
BATCH_BUCKETS = 13
"""Buckets of batch sizes that steps are counted in by K: up to 1, 2, 4, ..., 4096 requests."""
LARGEST_COUNT = 1e18
"""Of a counter that is read from a file."""


@dataclass(frozen=True)
class HistogramData:
    """Histogram of seconds. counts: per bucket, not cumulative (upper bounds `edges_s`, last bucket +Inf). sum_s: their sum."""

    edges_s: tuple[float, ...]
    counts: tuple[int, ...]
    sum_s: float


@dataclass(frozen=True)
class Event:
    """An event for the operator. time_s: on the controller's clock. kind: swap, drift or mode. text: one line.

    id: 1, 2, ... in the order of the events; numbers of a controller's life are never used again, a warm restart included.
    """

    time_s: float
    kind: str
    text: str
    id: int = 0


class Histogram:
    """Counts of seconds per bucket."""

    def __init__(self, edges_s: tuple[float, ...] = STEP_EDGES_S) -> None:
        self.edges_s = edges_s
        self.counts = [0] * (len(edges_s) + 1)
        self.sum_s = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(self.edges_s, seconds)] += 1
        self.sum_s += seconds

    def data(self) -> HistogramData:
        return HistogramData(self.edges_s, tuple(self.counts), self.sum_s)


class Counters:
    """Counts what steps did. Position-indexed counters begin at draft position 1."""

    def __init__(self, max_k: int) -> None:
        self.draft = np.zeros(max_k, dtype=np.int64)
        self.verified = np.zeros(max_k, dtype=np.int64)
        self.accepted = np.zeros(max_k, dtype=np.int64)
        self.reached = np.zeros(max_k, dtype=np.int64)
        """Verified draft tokens of which all before were accepted: those that could be accepted."""
        self.accept_lens = np.zeros(max_k + 1, dtype=np.int64)
        """Requests of steps with K > 0 by accepted draft tokens."""
        self.run_steps = np.zeros((BATCH_BUCKETS, max_k + 1), dtype=np.int64)
        """Steps by bucket of batch sizes and by the K that was run."""
        self.expected_accepted = 0.0
        self.output_tokens = 0
        self.steps = 0
        self.observations = 0
        self.predicted_s = 0.0
        self.measured_s = 0.0
        self.decode_s = 0.0
        self.probe_lost_s = 0.0
        self.sweep_s = 0.0
        self.sweep_steps = 0
        """Trial steps that sweeps have planned."""
        self.drift: Counter[str] = Counter(latency=0, calibration=0)
        self.swaps: Counter[str] = Counter()
        self.k_switches: Counter[str] = Counter(dict.fromkeys(REASONS, 0))
        """Changes of the K that was run, by reason."""
        self.limited_steps = 0
        """Steps whose K was not the one that the policy asked for."""
        self.requests: Counter[str] = Counter(within=0, beyond=0)
        """Requests that ended within `slo_tpot_ms` and beyond it; counted only with such a target."""
        self.dropped: Counter[str] = Counter()
        self.stages = {stage: Histogram() for stage in STAGES}
        self.refits: dict[str, Histogram] = {}
        self.events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self.last_event_id = 0
        self.window: deque[tuple[int, float, float, float]] = deque(maxlen=WINDOW_STEPS)
        """(output tokens, step seconds, forecast goodput of the step's K and of the launch K) of ordinary steps."""

    def count(self, record: StepRecord) -> None:
        """Count one step's tokens and times."""
        self.observations += 1
        self.steps += 1
        self.output_tokens += record.output_tokens
        self.decode_s += record.step_s
        self.limited_steps += bool(record.flags & StepFlag.LIMITED)
        k = min(record.k, len(self.draft))
        self.run_steps[batch_bucket(record.batch_size), k] += 1
        if k:
            self.reached += _reaching(np.minimum(record.verify_len, record.accept_len.astype(np.int64) + 1), len(self.reached))
            self.accept_lens += np.bincount(np.minimum(record.accept_len, len(self.draft)), minlength=len(self.accept_lens))
            self.draft[:k] += record.batch_size
            self.verified += _reaching(record.verify_len, len(self.verified))
            self.accepted += _reaching(record.accept_len, len(self.accepted))
            self.stages["draft"].add(record.draft_s)
        if record.draft_extend_s > 0.0:
            self.stages["draft_extend"].add(record.draft_extend_s)
        self.stages["verify"].add(record.verify_s)
        self.stages["step"].add(record.step_s)

    @property
    def records(self) -> int:
        """Records of the ring that were accounted for: learnt from or dropped."""
        return self.observations + sum(self.dropped.values())

    def count_switch(self, reason: Reason | None) -> None:
        """Count a change of K; None counts nothing."""
        if reason is not None:
            self.k_switches[reason] += 1

    def count_requests(self, within: int, beyond: int) -> None:
        """Count requests that ended."""
        self.requests["within"] += within
        self.requests["beyond"] += beyond

    def count_scores(self, scores: Iterable[StepScore]) -> None:
        """Count the draft tokens that the calibration, or the rates of their positions, expected to be accepted."""
        for score in scores:
            self.expected_accepted += score.expected + score.unscored

    def compare(self, record: StepRecord, comparison: StepComparison | None) -> None:
        """Count an ordinary step against its forecast; None counts nothing."""
        if comparison is None:
            return
        self.window.append((record.output_tokens, record.step_s, comparison.goodput, comparison.launch_goodput))
        if comparison.predicted_s is not None:
            self.predicted_s += comparison.predicted_s
            self.measured_s += record.step_s

    def count_swap(self, reason: str, now_s: float, text: str) -> None:
        self.swaps[reason] += 1
        self.event(now_s, "swap", text)

    def event(self, now_s: float, kind: str, text: str) -> None:
        self.last_event_id += 1
        self.events.append(Event(now_s, kind, text, self.last_event_id))

    def goodput(self) -> float | None:
        """Measured goodput over the window, tokens/s; None before there is one."""
        seconds = sum(s for _, s, _, _ in self.window)
        return sum(n for n, *_ in self.window) / seconds if seconds > 0.0 else None

    def forecast_ratio(self, steps: int) -> float:
        """Measured over forecast tokens in the last `steps` ordinary steps, 0..1 (1 where nothing was forecast)."""
        rows = list(self.window)[-steps:]
        forecast = sum(s * p for _, s, p, _ in rows)
        return min(sum(n for n, *_ in rows) / forecast, 1.0) if forecast > 0.0 else 1.0

    def gains(self) -> tuple[float | None, float | None]:
        """(predicted, measured) gain over the launch K in the window, 0 = none; None where nothing could be predicted."""
        rows = [(n, s, p, q) for n, s, p, q in self.window if p > 0.0 and q > 0.0]
        if len(rows) < 8:
            return None, None
        launch = sum(s * q for _, s, _, q in rows)
        return sum(s * p for _, s, p, _ in rows) / launch - 1.0, sum(n for n, *_ in rows) / launch - 1.0

    def state(self) -> dict[str, Any]:
        """JSON form of the counters."""
        return {
            "draft": self.draft.tolist(), "verified": self.verified.tolist(), "accepted": self.accepted.tolist(),
            "scalars": {name: getattr(self, name) for name in _SCALARS},
            "drift": dict(self.drift), "swaps": dict(self.swaps), "dropped": dict(self.dropped),
            "k_switches": dict(self.k_switches), "limited_steps": self.limited_steps,
            "sweep_steps": self.sweep_steps, "requests": dict(self.requests), "reached": self.reached.tolist(),
            "accept_lens": self.accept_lens.tolist(), "run_steps": self.run_steps.tolist(),
            "last_event_id": self.last_event_id,
            "stages": {name: [h.counts, h.sum_s] for name, h in self.stages.items()},
            "refits": {name: [h.counts, h.sum_s] for name, h in self.refits.items()},
        }  # fmt: skip

    def _fitting(self, values: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Counts by position of an engine that may have another largest K, cut or filled with zeros."""
        found = np.array(values, dtype=np.int64)
        if found.ndim != 1:
            raise ValueError("counters are damaged: a list by position is not flat")
        fitted = np.zeros(len(self.draft), dtype=np.int64)
        fitted[: len(found)] = found[: len(fitted)]
        return fitted

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over `state()`, also of an engine with another largest K. Raises ValueError when it cannot be one."""
        try:
            positions = {name: self._fitting(state[name]) for name in ("draft", "verified", "accepted")}
            tables: dict[str, Any] = {}
            scalars = {name: type(getattr(self, name))(state["scalars"][name]) for name in _SCALARS}
            tallies = {name: Counter({str(k): int(v) for k, v in state[name].items()}) for name in ("drift", "swaps", "dropped")}
            # Absent from checkpoints of older versions.
            for name in ("reached", "accept_lens", "run_steps"):
                present: np.ndarray[Any, np.dtype[np.int64]] = getattr(self, name)
                found = np.array(state.get(name, np.zeros_like(present)), dtype=np.int64)
                if found.ndim != present.ndim or (found < 0).any():
                    raise ValueError(f"counters are damaged: {name}: a value is negative or the shape is wrong")
                # With another largest K they begin at 0: cut, they would go back to a value that rate() takes for new.
                tables[name] = found if found.shape == present.shape else np.zeros_like(present)
            tallies["k_switches"] = Counter({reason: int(state.get("k_switches", {}).get(reason, 0)) for reason in REASONS})
            tallies["requests"] = Counter({name: int(state.get("requests", {}).get(name, 0)) for name in self.requests})
            scalars["limited_steps"] = int(state.get("limited_steps", 0))
            scalars["last_event_id"] = int(state.get("last_event_id", 0))
            scalars["sweep_steps"] = int(state.get("sweep_steps", 0))
            histograms = {name: {s: _histogram(*h) for s, h in state[name].items()} for name in ("stages", "refits")}
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"counters are damaged: {error}") from error
        # probe_lost_s may be negative: trials may give more goodput than the best plan was predicted to give.
        counted = [v for name, v in scalars.items() if name != "probe_lost_s"]
        counted += [v for tally in tallies.values() for v in tally.values()]
        counted += [v for by_name in histograms.values() for h in by_name.values() for v in (*h.counts, h.sum_s)]
        if any((v < 0).any() for v in positions.values()) or any(v < 0 for v in counted):
            raise ValueError("counters are damaged: a value is negative")
        largest = max(map(float, (*counted, abs(scalars["probe_lost_s"]))))
        if not (all(math.isfinite(v) for v in (*counted, scalars["probe_lost_s"])) and largest <= LARGEST_COUNT):
            raise ValueError(f"counters are damaged: a value is not in 0..{LARGEST_COUNT:g}")
        for name, value in {**positions, **tables, **scalars, **tallies}.items():
            setattr(self, name, value)
        self.stages.update(histograms["stages"])
        self.refits.update(histograms["refits"])


_SCALARS = (
    "expected_accepted", "output_tokens", "steps", "observations", "predicted_s", "measured_s", "decode_s", "probe_lost_s",
    "sweep_s",
)  # fmt: skip


def _histogram(counts: list[int], sum_s: float) -> Histogram:
    histogram = Histogram()
    if len(counts) != len(histogram.counts):
        raise ValueError("counters are damaged: a histogram has another number of buckets")
    histogram.counts, histogram.sum_s = [int(c) for c in counts], float(sum_s)
    return histogram


def batch_bucket(batch_size: int) -> int:
    """Index of the bucket of a batch size: bucket i holds those above 2^(i - 1) up to 2^i; the last one also larger ones."""
    return min(max(batch_size - 1, 0).bit_length(), BATCH_BUCKETS - 1)


def _reaching(lengths: np.ndarray[Any, np.dtype[Any]], max_k: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """How many requests reached positions 1..max_k."""
    tally = np.bincount(lengths, minlength=max_k + 1)
    return np.asarray(tally[::-1].cumsum()[::-1][1 : max_k + 1])
