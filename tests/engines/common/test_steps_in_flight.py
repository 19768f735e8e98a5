"""Bookkeeping of steps in flight, in the orders in which SGLang's two schedulers make things known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from adaptive_spec.domain.step_record import UNKNOWN_CONFIDENCE, StepFlag
from adaptive_spec.engine_side.tap import BegunStep
from adaptive_spec.engines.common.stage_clock import EventClock, HostMoment
from adaptive_spec.engines.common.steps_in_flight import MOST_OPEN, FinishedStep, KnownConfidences, OpenStep, StepsInFlight


def _step(number: int, ids: Sequence[int], k: int, at_s: float, padded: int | None = None) -> OpenStep:
    step = OpenStep(BegunStep(number, k, len(ids), 100, 7, 0), k, np.array(ids, np.uint32), padded or len(ids), HostMoment(at_s))
    step.stages = {
        "draft": (HostMoment(at_s), HostMoment(at_s + 0.002)),
        "verify": (HostMoment(at_s + 0.002), HostMoment(at_s + 0.005)),
        "draft_extend": (HostMoment(at_s + 0.005), HostMoment(at_s + 0.006)),
    }
    step.confidences = KnownConfidences(np.full((len(ids), k), 0.1 * number, np.float32))
    return step


def _end(step: OpenStep, at_s: float) -> None:
    step.ended = HostMoment(at_s)


@pytest.fixture
def written() -> list[FinishedStep]:
    return []


@pytest.fixture
def in_flight(written: list[FinishedStep]) -> StepsInFlight:
    return StepsInFlight(written.append)


def test_one_after_another(in_flight: StepsInFlight, written: list[FinishedStep]) -> None:
    """The plain scheduler: forward, result, forward, result."""
    for number in range(1, 4):
        step = _step(number, [1, 2], 3, 0.010 * number)
        in_flight.begin(step)
        _end(step, 0.010 * number + 0.007)
        in_flight.result(step, [3, 1], [True, True])
    assert [w.begun.step for w in written] == [1, 2, 3]
    assert written[0].step_s == pytest.approx(0.007), "no pause is known yet"
    assert written[1].step_s == pytest.approx(0.010), "the usual pause included"
    first = written[0]
    assert (first.draft_s, first.verify_s, first.draft_extend_s) == pytest.approx((0.002, 0.003, 0.001))
    assert (first.num_tokens, first.padded_tokens, first.flags) == (8, 8, 0)
    assert first.accept_len.tolist() == [3, 1]
    assert first.verify_len.tolist() == [3, 3]


def test_overlap_matches_results_with_their_own_step(in_flight: StepsInFlight, written: list[FinishedStep]) -> None:
    """The overlap scheduler: step 2 is launched, with another batch and another K, before the result of step 1 is looked at."""
    one, two, three = _step(1, [1, 2], 3, 0.0), _step(2, [2, 9, 8], 1, 0.010), _step(3, [9, 8], 0, 0.020)
    in_flight.begin(one)
    _end(one, 0.007)
    in_flight.begin(two)
    _end(two, 0.017)
    in_flight.result(one, [2, 0], [True, True])
    assert [w.begun.step for w in written] == [1]
    in_flight.begin(three)
    _end(three, 0.027)
    # Request 2 ended with the result of step 1; its row of step 2 was computed for nothing and is not counted.
    in_flight.result(two, [1, 0, 1], [False, True, True])
    in_flight.interrupt()
    assert written[0].step_s == pytest.approx(0.010), "to the start of the next one"
    in_flight.result(three, [0, 0], [True, True])
    assert [w.begun.step for w in written] == [1, 2, 3]
    assert written[0].request_ids.tolist() == [1, 2]
    assert written[0].confidences[0, 0] == pytest.approx(0.1)
    assert written[1].request_ids.tolist() == [9, 8]
    assert written[1].accept_len.tolist() == [0, 1]
    assert written[1].num_tokens == 6, "they were verified all the same"
    assert written[1].confidences.shape == (2, 1)
    assert written[2].confidences.shape == (2, 0)


def test_a_prefill_between_steps_is_not_decode_time(in_flight: StepsInFlight, written: list[FinishedStep]) -> None:
    at_s = 0.0
    for number in range(1, 200):
        step = _step(number, [1], 3, at_s)
        in_flight.begin(step)
        _end(step, at_s + 0.007)
        in_flight.result(step, [1], [True])
        at_s += 0.009
    assert written[-1].step_s == pytest.approx(0.009)
    in_flight.interrupt()
    assert written[-1].begun.step == 199
    late = _step(200, [1, 2, 3], 3, at_s + 5.0)
    in_flight.begin(late)
    _end(late, at_s + 5.008)
    in_flight.result(late, [1, 1, 1], [True] * 3)
    assert written[-1].step_s == pytest.approx(0.010), "neither before nor behind it: the usual pause of the nearest batch size"


def test_an_idle_time_is_not_decode_time(in_flight: StepsInFlight, written: list[FinishedStep]) -> None:
    for number, ids, at_s in ((1, [1, 2], 0.0), (2, [3], 60.0), (3, [4], 120.0)):
        step = _step(number, ids, 3, at_s)
        in_flight.begin(step)
        _end(step, at_s + 0.007)
        in_flight.result(step, [0] * len(ids), [True] * len(ids))
    assert [w.step_s for w in written] == pytest.approx([0.007] * 3)


def test_padding(in_flight: StepsInFlight, written: list[FinishedStep]) -> None:
    step = _step(1, [1, 2, 3], 3, 0.0, padded=4)
    in_flight.begin(step)
    _end(step, 0.007)
    in_flight.result(step, [0, 0, 0], [True] * 3)
    in_flight.interrupt()
    assert (written[0].num_tokens, written[0].padded_tokens) == (12, 16)


@pytest.mark.parametrize("bad", [0.0, 1.5, np.nan])
def test_unknown_confidences_are_marked_and_the_counts_are_kept(
    in_flight: StepsInFlight, written: list[FinishedStep], bad: float
) -> None:
    step = _step(1, [1, 2], 3, 0.0)
    values = np.full((2, 3), 0.5, np.float32)
    values[1, 0] = bad
    step.confidences = KnownConfidences(values)
    in_flight.begin(step)
    _end(step, 0.007)
    in_flight.result(step, [3, 2], [True, True])
    in_flight.interrupt()
    assert written[0].flags == 0
    assert written[0].accept_len.tolist() == [3, 2]
    assert written[0].confidences.tolist() == [[0.5, 0.5, 0.5], [UNKNOWN_CONFIDENCE, 0.5, 0.5]]


def test_confidences_of_another_shape_are_no_confidences(in_flight: StepsInFlight, written: list[FinishedStep]) -> None:
    step = _step(1, [1, 2], 3, 0.0)
    step.confidences = KnownConfidences(np.full((2, 2), 0.5, np.float32))
    in_flight.begin(step)
    _end(step, 0.007)
    in_flight.result(step, [3, 2], [True, True])
    in_flight.interrupt()
    assert written[0].flags == 0
    assert written[0].confidences.tolist() == [[UNKNOWN_CONFIDENCE] * 3] * 2


def test_a_step_without_confidences_is_one_of_unknown_confidences(in_flight: StepsInFlight, written: list[FinishedStep]) -> None:
    step = _step(1, [1, 2], 3, 0.0)
    step.confidences = None
    step.flags = int(StepFlag.CENSORED)
    in_flight.begin(step)
    _end(step, 0.007)
    in_flight.result(step, [3, 2], [True, True])
    in_flight.interrupt()
    assert written[0].flags == StepFlag.CENSORED, "by the engine's own flag"
    assert written[0].accept_len.tolist() == [3, 2]
    assert written[0].confidences.tolist() == [[UNKNOWN_CONFIDENCE] * 3] * 2


def test_a_result_of_another_batch_is_refused(in_flight: StepsInFlight, written: list[FinishedStep]) -> None:
    step = _step(1, [1, 2], 3, 0.0)
    in_flight.begin(step)
    _end(step, 0.007)
    with pytest.raises(ValueError, match="result of 3 requests for a step of 2"):
        in_flight.result(step, [1, 2, 3], [True] * 3)
    in_flight.interrupt()
    assert written == []


def test_steps_without_a_result_are_given_up(in_flight: StepsInFlight, written: list[FinishedStep]) -> None:
    for number in range(1, 3 * MOST_OPEN):
        step = _step(number, [1], 3, 0.010 * number)
        in_flight.begin(step)
        _end(step, 0.010 * number + 0.007)
    assert in_flight.lost == 2 * MOST_OPEN - 1
    in_flight.result(step, [1], [True])
    assert written == []


@dataclass
class FakeEvent:
    """A device event: recorded at a time of the device, done once the device has come that far."""

    device: Device
    at_ms: float = 0.0

    def record(self) -> None:
        self.device.launched_ms += self.device.work_ms
        self.at_ms = self.device.launched_ms

    def query(self) -> bool:
        return self.device.done_ms >= self.at_ms

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.query()
        assert end.query(), "asked for a time that is not known yet: CUDA raises here"
        return end.at_ms - self.at_ms


@dataclass
class Device:
    """Work is launched at once and done later."""

    work_ms: float = 1.0
    launched_ms: float = 0.0
    done_ms: float = 0.0
    made: int = 0

    def event(self) -> FakeEvent:
        self.made += 1
        return FakeEvent(self)


class Late:
    """Confidences that arrive with the device."""

    def __init__(self, device: Device, values: NDArray[np.float32]) -> None:
        self.device, self.values, self.at_ms = device, values, device.launched_ms

    def ready(self) -> NDArray[np.float32] | None:
        return self.values if self.device.done_ms >= self.at_ms else None


def test_device_times_are_read_when_they_are_there(written: list[FinishedStep]) -> None:
    device = Device()
    clock, in_flight = EventClock(device.event), StepsInFlight(written.append)
    steps = []
    for number in range(1, 5):
        step = OpenStep(BegunStep(number, 1, 1, 10, 0, 0), 1, np.array([5], np.uint32), 1, clock.now())
        in_flight.begin(step)
        for stage in ("draft", "verify", "draft_extend"):
            step.stages[stage] = (clock.now(), clock.now())
        step.confidences = Late(device, np.full((1, 1), 0.5, np.float32))
        step.ended = clock.now()
        steps.append(step)
        if number > 1:  # the host is one step ahead
            device.done_ms = device.launched_ms - 8.0
            in_flight.result(steps[-2], [1], [True])
    assert [w.begun.step for w in written] == [1, 2]
    assert written[0].verify_s == pytest.approx(1e-3)
    assert written[0].step_s == pytest.approx(8e-3)
    device.done_ms = device.launched_ms
    in_flight.result(steps[-1], [1], [True])
    in_flight.interrupt()
    assert [w.begun.step for w in written] == [1, 2, 3, 4]


def test_events_are_used_again() -> None:
    device = Device()
    clock = EventClock(device.event)
    for _ in range(1000):
        moments = [clock.now() for _ in range(8)]
        device.done_ms = device.launched_ms
        assert moments[0].seconds_to(moments[7]) == pytest.approx(7e-3)
        del moments
    assert device.made <= 16


def test_lengths_that_differ_by_request(in_flight: StepsInFlight, written: list[FinishedStep]) -> None:
    """Ragged verification: tokens follow from the lengths, padding is told, and what had ended counts as work, not as a row."""
    step = _step(1, [1, 2, 3], 4, 0.010)
    step.padded_tokens = 16
    in_flight.begin(step)
    _end(step, 0.017)
    in_flight.result(step, [2, 4, 0], [True, False, True], np.array([2, 4, 1]))
    assert (written[0].num_tokens, written[0].padded_tokens) == (10, 16)
    assert written[0].verify_len.tolist() == [2, 1]
    assert written[0].accept_len.tolist() == [2, 0]
    step = _step(2, [1, 2], 4, 0.020)
    step.num_tokens, step.padded_tokens = 10, 0
    in_flight.begin(step)
    _end(step, 0.027)
    in_flight.result(step, [4, 1], [True, True], np.array([3, 1]))
    assert (written[1].num_tokens, written[1].padded_tokens) == (10, 10), "all tokens ran, some of them for nothing"
    assert written[1].accept_len.tolist() == [3, 1], "nothing beyond what was verified"
    broken = _step(3, [1, 2], 4, 0.030)
    in_flight.begin(broken)
    with pytest.raises(ValueError, match="for a step of 2"):
        in_flight.result(broken, [1, 1], [True, True], np.array([1]))


@pytest.mark.parametrize(("asked", "ran", "trial"), [(7, 7, True), (7, 8, False), (7, 6, False), (None, 6, True)])
def test_a_trial_that_ran_another_number_of_tokens_is_none(
    in_flight: StepsInFlight, written: list[FinishedStep], asked: int | None, ran: int, trial: bool
) -> None:
    step = _step(1, [1, 2], 4, 0.010)
    step.begun = step.begun._replace(flags=int(StepFlag.TRIAL))
    step.asked_tokens = asked
    in_flight.begin(step)
    _end(step, 0.017)
    in_flight.result(step, [0, 0], [True, True], np.array([2, ran - 4]))
    [finished] = written
    assert finished.num_tokens == ran
    assert finished.begun.flags == int(StepFlag.TRIAL if trial else StepFlag.LIMITED)
