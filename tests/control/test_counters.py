from __future__ import annotations

import numpy as np
import pytest

from adaptive_spec.control.counters import Counters, batch_bucket
from adaptive_spec.domain.step_record import StepRecord


def test_a_negative_probe_loss_survives_a_restart() -> None:
    counters = Counters(3)
    counters.probe_lost_s = -0.25
    again = Counters(3)
    again.restore(counters.state())
    assert again.probe_lost_s == -0.25


def test_event_ids_rise_and_are_not_used_again_after_a_restart() -> None:
    counters = Counters(3)
    for _ in range(150):
        counters.event(1.0, "swap", "K 1→2")
    assert [e.id for e in counters.events] == list(range(51, 151)), "the latest 100"
    again = Counters(3)
    again.restore(counters.state())
    again.event(2.0, "swap", "K 2→1")
    assert [e.id for e in again.events] == [151]


def test_other_counters_are_never_negative() -> None:
    counters = Counters(3)
    counters.decode_s = -0.25
    with pytest.raises(ValueError, match="negative"):
        Counters(3).restore(counters.state())


def record(k: int, verify_len: list[int], accept_len: list[int]) -> StepRecord:
    b = len(verify_len)
    return StepRecord(
        1, 0, 0, 1, sum(verify_len) + b, sum(verify_len) + b, b, k, 0, 0.001, 0.01, 0.0, 0.012, np.full((b, k), 0.5, np.float32),
        np.array(verify_len, np.uint8), np.array(accept_len, np.uint8), np.arange(b, dtype=np.uint32),
    )  # fmt: skip


def test_acceptance_given_the_one_before_accepted_lengths_and_the_k_that_ran() -> None:
    counters = Counters(3)
    counters.count(record(3, [3, 3, 1], [3, 1, 1]))
    counters.count(record(0, [0, 0, 0, 0, 0], [0] * 5))
    counters.count(record(2, [2, 0], [0, 0]))
    assert counters.reached.tolist() == [4, 2, 1], "the second request's third token could not be accepted any more"
    assert counters.accepted.tolist() == [3, 1, 1]
    assert counters.accept_lens.tolist() == [2, 2, 0, 1], "steps with K = 0 say nothing"
    again = Counters(3)
    again.restore(counters.state())
    assert again.state() == counters.state()
    assert {(2**b, k): n for (b, k), n in np.ndenumerate(again.run_steps) if n} == {(4, 3): 1, (8, 0): 1, (2, 2): 1}
    old = {name: value for name, value in counters.state().items() if name not in ("reached", "accept_lens", "run_steps")}
    again.restore(old)
    assert again.reached.sum() == again.accept_lens.sum() == again.run_steps.sum() == 0, "a checkpoint of an older version"
    for name, damaged in (("reached", [[1, 2]]), ("run_steps", [[-1]])):
        with pytest.raises(ValueError, match=name):
            again.restore({**counters.state(), name: damaged})
    assert [batch_bucket(b) for b in (1, 2, 3, 4, 5, 4096, 9999)] == [0, 1, 2, 2, 3, 12, 12]


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e300, -1.0])
@pytest.mark.parametrize("where", ["draft", "scalar", "tally", "histogram"])
def test_no_implausible_number_is_taken_over(where: str, value: float) -> None:
    state = Counters(3).state()
    match where:
        case "draft":
            state["draft"][1] = value
        case "scalar":
            state["scalars"]["measured_s"] = value
        case "tally":
            state["swaps"]["gain"] = value
        case "histogram":
            state["stages"]["verify"] = [state["stages"]["verify"][0], value]
    with pytest.raises(ValueError, match=r"counters are damaged|cannot convert"):
        Counters(3).restore(state)
