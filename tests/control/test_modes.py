"""What was asked for, health, and the mode that follows: none is lost by a failure, a lost publication or a restart."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from adaptive_spec.config.settings import ControllerSettings
from adaptive_spec.control.controller import FAILED_RECORDS, FAILED_REFITS, Controller
from adaptive_spec.control.modes import Health, Request, Steering, effective_mode
from adaptive_spec.domain.policy import Granularity, Mode, Policy
from tests.support.simulated_server import SimulatedServer, engine_info, staircase


def server(**fields: Any) -> SimulatedServer:
    simulated = SimulatedServer(engine_info(Granularity.BATCH, max_batch=16, holds_batch=True), staircase(tile=16), **fields)
    while mode_of(simulated) is Mode.SWEEP and simulated.steps < 2000:
        simulated.run(5)
    return simulated


def command(s: SimulatedServer, name: str, k: int | None = None) -> Policy | None:
    policy = s.controller.command(name, s.now_s, k)
    s._publish(policy)
    return policy


def published(s: SimulatedServer) -> Policy:
    policy = s.controller.latest_policy
    assert policy is not None
    assert policy is s.planner.policy, "the engine has the latest policy"
    return policy


def mode_of(s: SimulatedServer) -> Mode:
    return s.controller.mode


def broken(*_: Any, **__: Any) -> Any:
    raise ZeroDivisionError("broken")


STEERING: tuple[Steering, ...] = ("active", "shadow")
REQUESTS = [Request(s, k, p) for s, k, p in itertools.product(STEERING, (None, 2), (False, True))]


@pytest.mark.parametrize("request_", REQUESTS)
def test_the_mode_is_a_function_of_request_and_health(request_: Request) -> None:
    assert effective_mode(request_, Health.FAILED) is Mode.FALLBACK
    assert effective_mode(request_, Health.SWEEPING) is Mode.SWEEP
    wanted = "paused" if request_.paused else "pinned" if request_.pinned_k is not None else request_.steering
    assert effective_mode(request_, Health.OK) == wanted
    assert Request.of(request_.state()) == request_


@pytest.mark.parametrize("state", [{}, {"steering": "dance", "pinned_k": None, "paused": False},
                                   {"steering": "active", "pinned_k": 2.5, "paused": False},
                                   {"steering": "active", "pinned_k": -1, "paused": False},
                                   {"steering": "active", "pinned_k": None, "paused": 1}])  # fmt: skip
def test_a_damaged_request_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="request: must have"):
        Request.of(state)


@pytest.mark.parametrize(("name", "k"), [("pin", 5), ("pause", None), ("shadow", None), ("active", None)])
def test_a_failure_takes_nothing_back_that_was_asked_for(name: str, k: int | None) -> None:
    s = server()
    s.run(200)
    command(s, name, k)
    s.run(5)
    mode, runs = mode_of(s), {s.step().k for _ in range(5)}
    s._publish(s.controller.fail("a refit failed", s.now_s))
    assert (mode_of(s), published(s).acting) == (Mode.FALLBACK, False)
    assert s.step().k == s.info.launch_k
    restarted = Controller(s.settings, s.info)
    restarted.restore(s.controller.state())
    restarted.refit(s.now_s)
    assert restarted.mode is mode, "a restart during the fallback"
    assert restarted.latest_policy is not None
    assert (restarted.latest_policy.mode, restarted.snapshot(s.now_s).sweep_progress) == (mode, 1.0)
    s.run(700)
    assert (mode_of(s), published(s).mode) == (mode, mode)
    if name in ("pin", "pause"):
        assert {s.step().k for _ in range(5)} == runs


def test_a_failure_in_the_sweep_goes_on_with_the_sweep() -> None:
    s = SimulatedServer(engine_info(Granularity.BATCH, max_batch=16, holds_batch=True), staircase(tile=16))
    s.run(10)
    s._publish(s.controller.fail("observe failed", s.now_s))
    s.run(6)
    assert mode_of(s) is Mode.FALLBACK
    while mode_of(s) is not Mode.ACTIVE and s.steps < 4000:
        s.run(1)  # records come all the time: no idle moment is needed
    assert mode_of(s) is Mode.ACTIVE
    assert [b.tokens for b in s.controller.snapshot(s.now_s).boundaries][:3] == [16, 32, 48]


def test_failures_publish_once_and_do_not_put_off_the_recovery() -> None:
    s = server()
    s.run(200)
    s._publish(s.controller.fail("refit failed", s.now_s))
    version, due_s = published(s).version, s.controller._next_refit_s
    assert all(s.controller.fail("refit failed", s.now_s + i) is None for i in range(4))
    assert s.controller._next_refit_s == due_s
    assert published(s).version == version


def test_single_bad_records_are_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    s = server()
    s.run(200)
    policies = []
    observe = s.controller.models.observe
    for _ in range(600):
        record = s.step()
        if record.step % 20 == 0:
            with monkeypatch.context() as patch:
                patch.setattr(s.controller.models, "observe", broken)
                with pytest.raises(ZeroDivisionError):
                    s.controller.observe(record, s.now_s)
            policies.append(s.controller.record_failed(s.now_s))
        else:
            assert s.controller.models.observe == observe
            s.controller_sees(record)
    assert policies == [None] * 30
    assert mode_of(s) is Mode.ACTIVE
    counters = s.controller.counters
    assert counters.dropped["failed"] == 30
    assert counters.observations + 30 == s.steps, "each record is either counted or dropped"


def test_bad_records_in_a_row_fall_back_until_a_good_one() -> None:
    s = server()
    s.run(200)
    results = [s.controller.record_failed(s.now_s) for _ in range(FAILED_RECORDS + 20)]
    assert [i for i, policy in enumerate(results) if policy is not None] == [FAILED_RECORDS - 1]
    s._publish(results[FAILED_RECORDS - 1])
    s.now_s += 10.0
    assert s.controller.refit(s.now_s) is None
    assert mode_of(s) is Mode.FALLBACK, "no record has been learnt since"
    s.run(700)
    assert mode_of(s) is Mode.ACTIVE


def test_models_that_cannot_be_fitted_are_forgotten_and_a_sweep_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    s = server()
    s.run(200)
    monkeypatch.setattr(s.controller.models, "fit", broken)
    for i in range(FAILED_REFITS):
        assert s.controller.models_forgotten == 0
        with pytest.raises(ZeroDivisionError):
            s.controller.refit(s.now_s + i)
        s._publish(s.controller.fail("refit failed", s.now_s + i))
    assert s.controller.models_forgotten == 1
    s.now_s += FAILED_REFITS
    s.run(30)
    assert mode_of(s) is Mode.SWEEP
    while mode_of(s) is Mode.SWEEP and s.steps < 4000:
        s.run(5)
    assert mode_of(s) is Mode.ACTIVE


@pytest.mark.parametrize(("configured", "commands", "wanted"), [
    ("shadow", ["active", "pause", "resume"], "active"),
    ("active", ["shadow", "pause", "resume"], "shadow"),
    ("active", ["shadow", "resume"], "active"),
    ("shadow", ["active", "pin", "unpin"], "active"),
    ("active", ["pin", "pause", "resume"], "pinned"),
    ("active", ["pin", "pause", "active"], "active"),
    ("active", ["pause", "pause", "resume"], "active"),
])  # fmt: skip
def test_resume_and_unpin_return_to_what_was_before(configured: Any, commands: list[str], wanted: str) -> None:
    s = server(settings=ControllerSettings(mode=configured))
    s.run(200)
    for name in commands:
        command(s, name, 5 if name == "pin" else None)
        while mode_of(s) is Mode.SWEEP and s.steps < 4000:
            s.run(5)
        s.run(20)
    assert mode_of(s) == wanted
    assert published(s).mode == wanted


def test_a_pause_in_shadow_does_not_begin_to_act() -> None:
    s = server(settings=ControllerSettings(mode="shadow"))
    s.run(200)
    command(s, "pause")
    assert (mode_of(s), published(s).acting) == (Mode.PAUSED, False)


def test_commands_are_no_swaps_of_the_sweep_and_repeated_ones_publish_nothing() -> None:
    s = server()
    s.run(300)
    sweeps = s.controller.counters.swaps["sweep"]
    command(s, "pin", 6)
    assert command(s, "pin", 6) is None
    command(s, "pause")
    assert command(s, "pause") is None
    s.run(50)
    for name in ("resume", "unpin", "active", "resume"):
        command(s, name)
        s.run(20)
    swaps = s.controller.counters.swaps
    assert (swaps["sweep"], swaps["pin"]) == (sweeps, 1)
    assert swaps["command"] == 1, "unpin changed K, the others did not"


def test_a_restart_while_pinned_publishes_at_once() -> None:
    s = server()
    s.run(200)
    command(s, "pin", 5)
    restarted = Controller(s.settings, s.info)
    restarted.restore(s.controller.state())
    assert restarted.snapshot(1e6).policy_time_s is None, "not the host's uptime"
    policy = restarted.tick(1e6)
    assert policy is not None
    assert (policy.mode, policy.draft_length(4, 100)) == (Mode.PINNED, 5)
    assert restarted.snapshot(1e6).policy_time_s == 1e6


@pytest.mark.parametrize("lost", [1, 2, 3, 5])
def test_a_lost_publication_does_not_stop_the_sweep(lost: int) -> None:
    s = SimulatedServer(engine_info(Granularity.BATCH, max_batch=16, holds_batch=True), staircase(tile=16))
    deliver, count = s._publish, 1

    def lossy(policy: object) -> None:
        nonlocal count
        if policy is not None:
            count += 1
            if count == lost + 1:
                return
        deliver(policy)

    s._publish = lossy  # type: ignore[method-assign]  # one publication never reaches the engine
    while mode_of(s) is Mode.SWEEP and s.steps < 6000:
        s.run(5)
    assert mode_of(s) is Mode.ACTIVE
    assert [b.tokens for b in s.controller.snapshot(s.now_s).boundaries][:3] == [16, 32, 48]


def test_idle_time_takes_nothing_from_the_sweep() -> None:
    def measured(idle_s: float) -> tuple[int, ...]:
        s = SimulatedServer(engine_info(Granularity.BATCH, max_batch=16, holds_batch=True), staircase(tile=16))
        while mode_of(s) is Mode.SWEEP and s.steps < 5000:
            s.run(30)
            s.now_s += idle_s
        assert mode_of(s) is Mode.ACTIVE
        return tuple(b.tokens for b in s.controller.snapshot(s.now_s).boundaries)

    assert measured(3600.0) == measured(0.0)


def test_a_command_breaks_off_a_sweep_which_begins_again_later() -> None:
    s = SimulatedServer(engine_info(Granularity.BATCH, max_batch=16, holds_batch=True), staircase(tile=16))
    s.run(20)
    command(s, "pin", 2)
    s.run(300)
    assert mode_of(s) is Mode.PINNED
    restarted = Controller(s.settings, s.info)
    restarted.restore(s.controller.state())
    for controller in (restarted, s.controller):
        controller.command("unpin", s.now_s)
        assert controller.mode is Mode.SWEEP


def test_a_pin_outlasts_a_second_sweep() -> None:
    s = server()
    command(s, "pin", 5)
    command(s, "resweep")
    assert mode_of(s) is Mode.SWEEP
    while mode_of(s) is Mode.SWEEP and s.steps < 5000:
        s.run(5)
    s.run(20)
    assert mode_of(s) is Mode.PINNED
    assert s.step().k == 5
