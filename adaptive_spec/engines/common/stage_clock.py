"""Moments of the stages of a step: the host's clock on a CPU, CUDA events on a GPU.

On a GPU a host timer measures launches, not work. Events are recorded on the current stream and queried later; nothing here
synchronises. Events come from a pool, because creating one costs more than recording it.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any, Protocol

from adaptive_spec.engines.common.steps_in_flight import Moment

POOL_EVENTS = 256


class StageClock(Protocol):
    def now(self) -> Moment:
        """This moment, in the order of the work that was launched."""
        ...


class HostMoment:
    """A point on the host's monotonic clock, in seconds."""

    __slots__ = ("at_s",)

    def __init__(self, at_s: float) -> None:
        self.at_s = at_s

    def seconds_to(self, later: Moment) -> float | None:
        assert isinstance(later, HostMoment)
        return later.at_s - self.at_s


class HostClock:
    """Where the forward runs in the calling thread."""

    def now(self) -> Moment:
        return HostMoment(time.perf_counter())


class DeviceEvent(Protocol):
    """The part of torch.cuda.Event that is used."""

    def record(self) -> None: ...
    def query(self) -> bool: ...
    def elapsed_time(self, end_event: Any) -> float: ...


class EventMoment:
    """A recorded event. Known once it and the other one are done."""

    __slots__ = ("_clock", "event")

    def __init__(self, event: DeviceEvent, clock: EventClock) -> None:
        self.event = event
        self._clock = clock

    def seconds_to(self, later: Moment) -> float | None:
        assert isinstance(later, EventMoment)
        # The later one was recorded later on the same stream: when it is done, so is this one.
        return 1e-3 * self.event.elapsed_time(later.event) if later.event.query() else None

    def __del__(self) -> None:
        self._clock.give_back(self.event)


class EventClock:
    """Where the forward runs on a device. new_event: makes a timing event."""

    def __init__(self, new_event: type[DeviceEvent] | Any) -> None:
        self._new_event = new_event
        self._pool: deque[DeviceEvent] = deque(maxlen=POOL_EVENTS)

    def now(self) -> Moment:
        event = self._pool.popleft() if self._pool else self._new_event()
        event.record()
        return EventMoment(event, self)

    def give_back(self, event: DeviceEvent) -> None:
        """Return an event that is no longer used to the pool."""
        self._pool.append(event)


def clock_for(device_type: str) -> StageClock:
    """Return the clock of a device: "cpu", or "cuda"."""
    if device_type != "cuda":
        return HostClock()
    import torch

    return EventClock(lambda: torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]  # torch has no types here
