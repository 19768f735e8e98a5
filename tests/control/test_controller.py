from __future__ import annotations

import dataclasses

import pytest

from adaptive_spec.config.settings import ControllerSettings, PolicySettings
from adaptive_spec.control.controller import Controller
from adaptive_spec.domain.policy import Granularity, Mode
from adaptive_spec.domain.step_record import StepFlag
from adaptive_spec.wire.policy_page import check_policy
from tests.support.simulated_server import SimulatedServer, engine_info, staircase


def server(granularity: Granularity = Granularity.BATCH, *, swept: bool = True, **fields: object) -> SimulatedServer:
    info = engine_info(granularity, holds_batch=True)
    simulated = SimulatedServer(info, staircase(), **fields)  # type: ignore[arg-type]  # fields of SimulatedServer
    while swept and simulated.controller.mode is Mode.SWEEP and simulated.steps < 2000:
        simulated.run(5)
    return simulated


@pytest.mark.parametrize("granularity", list(Granularity))
@pytest.mark.parametrize("batch_size", [3, 8, 24, 60])
def test_it_settles_near_the_best_fixed_k_at_every_batch_size(granularity: Granularity, batch_size: int) -> None:
    s = server(granularity)
    s.batch_size = batch_size
    s.run(250)
    best = s.static_goodput(s.best_static())
    assert s.run(300) > 0.94 * best


def test_requests_of_their_own_length_beat_every_fixed_k_between_tiles() -> None:
    s = server(Granularity.REQUEST)
    s.batch_size = 24
    s.run(250)
    assert s.run(300) > 1.02 * s.static_goodput(s.best_static())


@pytest.mark.parametrize("granularity", list(Granularity))
def test_it_follows_a_hotter_machine_a_worse_draft_and_another_kernel(granularity: Granularity) -> None:
    s = server(granularity)
    s.run(300)
    s.latency_scale = 1.3
    s.run(150)
    assert s.controller.snapshot(s.now_s).drift_events["latency"] >= 1
    s.accept = 0.35
    s.run(400)
    assert s.run(300) > 0.93 * s.static_goodput(s.best_static())
    s.accept, s.curve = 0.85, staircase(48, 0.008, 0.009)
    s.run(900)
    assert s.run(300) > 0.9 * s.static_goodput(s.best_static())


def test_a_miscalibrated_draft_is_one_calibration_drift() -> None:
    s = server()
    s.run(600)
    before = s.controller.snapshot(s.now_s).drift_events["calibration"]
    s.bias, s.slope = -2.0, 0.6
    s.run(400)
    assert s.controller.snapshot(s.now_s).drift_events["calibration"] - before in (1, 2)


def test_a_collapsed_draft_switches_speculation_off_and_is_noticed_when_it_recovers() -> None:
    # Drafting that costs a tenth of a step each, so that a draft without use must go.
    s = server(draft_s=0.0015, accept=0.8)
    s.run(300)
    s.accept = 0.01
    s.run(600)
    off = s.run(500)
    assert s.controller.k_by_batch_size()[8] == 0
    assert off > 0.97 * s.static_goodput(0), "looking for a recovery must stay cheap"
    s.accept = 0.8
    s.run(1500)
    assert s.run(200) > 0.93 * s.static_goodput(s.best_static())


def test_steady_traffic_is_not_disturbed_by_probing_or_flapping() -> None:
    s = server()
    s.run(1000)
    swaps = sum(s.controller.snapshot(s.now_s).swaps.values())
    s.run(3000)
    snapshot = s.controller.snapshot(s.now_s)
    assert sum(snapshot.swaps.values()) - swaps <= 1
    assert snapshot.probe_share < 0.012


def test_shadow_decides_but_does_not_act() -> None:
    s = server(swept=False, batch_size=3, settings=ControllerSettings(mode="shadow"))
    s.run(800)
    policy = s.controller.latest_policy
    assert policy is not None
    assert not policy.acting
    assert s.controller.mode is Mode.SHADOW
    assert {r.k for r in [s.step() for _ in range(5)]} == {s.info.launch_k}


def test_a_time_in_shadow_is_no_budget_for_probes_afterwards() -> None:
    s = server(swept=False, batch_size=24, settings=ControllerSettings(mode="shadow"))
    s.run(1000)
    s.latency_scale = 1.5
    s.run(1000)
    s.controller.command("active", s.now_s)
    s.let_act()
    while s.controller.mode is Mode.SWEEP:
        s.run(5)
    trials = 0
    for _ in range(150):
        record = s.step()
        trials += bool(record.flags & StepFlag.TRIAL)
        s.controller_sees(record)
    assert 0 < trials <= 6, "two cheap probes; with what was saved in shadow there were four"


def test_an_observe_only_engine_is_shown_as_shadow() -> None:
    s = server(swept=False, observe_only=True, draft_s=0.003, batch_size=3)
    s.run(20)
    assert s.controller.snapshot(s.now_s).mode is Mode.SWEEP
    s.run(1000)
    snapshot = s.controller.snapshot(s.now_s)
    assert (snapshot.mode, snapshot.observe_only, snapshot.sweep_progress) == (Mode.SHADOW, True, 1.0)
    assert snapshot.reason.startswith("the engine is observe-only: ")
    assert [e.text for e in snapshot.events if e.kind == "mode"] == [f"sweep → shadow: {snapshot.reason}"], "once"
    # It learns from the traffic.
    assert [tokens for tokens, _, _ in snapshot.latency_points] == [3 * (s.info.launch_k + 1)]
    assert snapshot.latency_points[0][1] == pytest.approx(s.curve(12), rel=0.03)
    assert snapshot.predicted_gain is not None
    assert snapshot.calibration_error is not None
    policy = s.controller.latest_policy
    assert policy is not None
    assert policy.acting, "policies are still published"
    assert policy.trials == ()


def test_an_engine_with_one_k_can_be_observe_only() -> None:
    info = dataclasses.replace(engine_info(Granularity.BATCH), candidates=(3,))
    s = SimulatedServer(info, staircase(), observe_only=True)
    s.run(800)
    snapshot = s.controller.snapshot(s.now_s)
    assert snapshot.mode is Mode.SHADOW
    assert set(snapshot.k_by_batch_size.values()) == {3}


def test_an_observe_only_engine_that_begins_to_run_policies_is_swept() -> None:
    s = server(swept=False, observe_only=True)
    s.run(1000)
    assert s.controller.snapshot(s.now_s).mode is Mode.SHADOW
    restarted = Controller(s.settings, s.info)
    restarted.restore(s.controller.state())
    assert restarted.snapshot(s.now_s).mode is Mode.SHADOW, "the checkpoint keeps that the engine is observe-only"
    s.let_act()
    s.run(2)
    snapshot = s.controller.snapshot(s.now_s)
    assert (snapshot.mode, snapshot.observe_only) == (Mode.SWEEP, False)
    assert snapshot.events[-1].text == "shadow → sweep: the engine runs the policies made for it"
    while mode_of(s) == "sweep" and s.steps < 4000:
        s.run(5)
    s.run(250)
    assert s.controller.snapshot(s.now_s).mode is Mode.ACTIVE
    assert s.run(300) > 0.94 * s.static_goodput(s.best_static())


def test_a_profiled_engine_may_become_observe_only_and_run_policies_again() -> None:
    s = server()
    s.observe_only, s.planner.policy = True, None
    s.run(800)
    assert s.controller.snapshot(s.now_s).mode is Mode.SHADOW
    s._publish(s.controller.command("resume", s.now_s))
    assert s.controller.snapshot(s.now_s).observe_only, "a command does not make it act"
    s._publish(s.controller.command("shadow", s.now_s))
    assert s.controller.snapshot(s.now_s).reason == "shadow by command"
    s._publish(s.controller.command("resweep", s.now_s))
    assert s.controller.snapshot(s.now_s).mode is Mode.SWEEP, "a sweep tests again whether the engine runs policies"
    s.run(800)
    assert s.controller.snapshot(s.now_s).mode is Mode.SHADOW
    s.let_act()
    s.run(2)
    assert s.controller.snapshot(s.now_s).mode is Mode.ACTIVE, "no second sweep"


def test_trials_of_one_k_at_request_granularity_do_not_count_as_observe_only() -> None:
    """DSPARK: K is always gamma, trials choose the verified tokens."""
    info = dataclasses.replace(engine_info(Granularity.REQUEST, holds_batch=True), candidates=(7,))
    s = SimulatedServer(info, staircase())
    while mode_of(s) == "sweep" and s.steps < 3000:
        s.run(5)
        assert not s.controller.snapshot(s.now_s).observe_only
    snapshot = s.controller.snapshot(s.now_s)
    assert snapshot.mode is Mode.ACTIVE
    assert [b.tokens for b in snapshot.boundaries][:3] == [32, 64, 96]


def test_a_rail_keeps_k_inside() -> None:
    s = server(batch_size=3, settings=ControllerSettings(policy=PolicySettings(k_min=1, k_max=2)))
    s.run(300)
    assert s.controller.k_by_batch_size()[3] == 2, "without the rail K is larger"
    assert set(s.controller.k_by_batch_size().values()) <= {1, 2}


@pytest.mark.parametrize("granularity", list(Granularity))
def test_rails_narrowed_over_a_restart_of_the_sidecar_alone_bind_at_once(granularity: Granularity) -> None:
    s = server(granularity, batch_size=3)
    s.run(200)
    assert s.controller.k_by_batch_size()[3] > 2
    narrow = ControllerSettings(policy=PolicySettings(k_max=2))
    for asked in ("active", "pause", "pin"):
        old = Controller(ControllerSettings(), s.info)
        old.restore(s.controller.state())
        if asked != "active":
            old.command(asked, s.now_s, 7)
        restarted = Controller(narrow, s.info)
        restarted.restore(old.state())
        policy = restarted.tick(s.now_s)
        assert policy is not None
        assert int(policy.k_table.max()) <= 2
        assert policy.allowed_from == ((1, (0, 1, 2)),), "the step choice of the engine is bound too"
        check_policy(policy)
    s.controller = Controller(narrow, s.info)
    s.controller.restore(old.state())
    s._publish(s.controller.command("active", s.now_s))
    ks = set()
    for _ in range(300):  # probes too
        record = s.step()
        ks |= {record.k} if record.policy_version else set()
        s.controller_sees(record)
    assert ks <= {0, 1, 2}
    with pytest.raises(ValueError, match=r"K 7 is outside of k_min\.\.k_max = 0\.\.2"):
        s.controller.command("pin", s.now_s, 7)


def mode_of(s: SimulatedServer) -> str:
    return str(s.controller.mode)


def version_of(s: SimulatedServer) -> int:
    policy = s.controller.latest_policy
    return policy.version if policy is not None else 0


def test_commands() -> None:
    s = server()
    c = s.controller
    s._publish(c.command("pin", s.now_s, 5))
    s.run(200)
    assert mode_of(s) == "pinned"
    assert s.step().k == 5
    s._publish(c.command("unpin", s.now_s))
    s.run(50)
    assert mode_of(s) == "active"
    assert s.step().k == s.best_static()
    s._publish(c.command("pause", s.now_s))
    version = version_of(s)
    s.accept = 0.1
    s.run(300)
    assert mode_of(s) == "paused"
    assert version_of(s) == version
    s._publish(c.command("shadow", s.now_s))
    assert s.step().k == s.info.launch_k
    s._publish(c.command("resume", s.now_s))
    assert mode_of(s) == "active"
    s._publish(c.command("resweep", s.now_s))
    assert mode_of(s) == "sweep"
    while mode_of(s) == "sweep" and s.steps < 5000:
        s.run(5)
    assert mode_of(s) == "active"


@pytest.mark.parametrize(
    ("name", "k", "words"), [("pin", 99, "99 is not one of"), ("pin", None, "None"), ("dance", None, "'dance'")]
)
def test_a_wrong_command_is_refused_and_changes_nothing(name: str, k: int | None, words: str) -> None:
    s = server()
    mode = s.controller.mode
    with pytest.raises(ValueError, match=words):
        s.controller.command(name, 0.0, k)
    assert s.controller.mode is mode


def test_failure_falls_back_and_recovers() -> None:
    s = server()
    s._publish(s.controller.fail("the model raised", s.now_s))
    assert s.step().k == s.info.launch_k
    s.run(700)
    assert s.controller.mode is Mode.ACTIVE


def test_versions_only_rise() -> None:
    s = server()
    s.controller.resume_version(1000)
    s._publish(s.controller.command("pause", s.now_s))
    assert s.planner.version == 1001
    s.controller.resume_version(5)
    s._publish(s.controller.command("resume", s.now_s))
    assert s.planner.version > 1001


def test_a_restarted_controller_goes_on_where_it_was() -> None:
    s = server(Granularity.REQUEST)
    s.run(400)
    old = s.controller
    twin = Controller(s.settings, s.info)
    twin.restore(old.state())
    assert twin.mode is Mode.ACTIVE
    assert twin.k_by_batch_size() == old.k_by_batch_size()
    before, after = old.snapshot(s.now_s), twin.snapshot(s.now_s)
    assert after.output_tokens == before.output_tokens
    assert [b.tokens for b in after.boundaries] == [b.tokens for b in before.boundaries]
    assert after.policy_version == before.policy_version
    s.controller = twin
    s.run(200)
    assert s.run(200) > 0.93 * s.static_goodput(s.best_static())


def test_a_mode_newly_configured_wins_over_the_checkpoint() -> None:
    s = server()
    s.run(100)
    shadow = Controller(ControllerSettings(mode="shadow"), s.info)
    shadow.restore(s.controller.state())
    assert shadow.mode is Mode.SHADOW
    s._publish(s.controller.command("pin", s.now_s, 2))
    same = Controller(s.settings, s.info)
    same.restore(s.controller.state())
    assert same.mode is Mode.PINNED


def test_a_profile_replaces_the_sweep_also_with_another_max_k() -> None:
    s = server()
    latency, calibration = s.controller.latency_state(), s.controller.calibration_state()
    fresh = Controller(ControllerSettings(), s.info)
    fresh.restore_profile(latency, calibration)
    assert fresh.mode is Mode.ACTIVE
    assert fresh.tick(0.0) is not None, "decides at once from the profile"
    smaller = Controller(ControllerSettings(), engine_info(Granularity.BATCH, max_k=3))
    with pytest.raises(ValueError, match="lacks"):
        smaller.restore_profile({}, calibration)
    smaller.restore_profile(latency, calibration)
    assert smaller.mode is Mode.ACTIVE
    assert smaller.tick(0.0) is not None, "what fits is kept"


def test_counters_are_exact() -> None:
    s = server(swept=False)
    records = []
    for _ in range(300):
        record = s.step()
        records.append(record)
        s.controller_sees(record)
    snapshot = s.controller.snapshot(s.now_s)
    assert snapshot.output_tokens == sum(r.output_tokens for r in records)
    assert sum(snapshot.accepted_tokens) == sum(int(r.accept_len.sum()) for r in records)
    assert sum(snapshot.verified_tokens) == sum(int(r.verify_len.sum()) for r in records)
    assert sum(snapshot.draft_tokens) == sum(r.batch_size * r.k for r in records)
    assert snapshot.decode_steps == snapshot.observations == 300


def test_decisions_do_not_depend_on_anything_but_their_arguments() -> None:
    one, other = server(seed=5), server(seed=5)
    for s in (one, other):
        s.run(300)
    assert one.controller.k_by_batch_size() == other.controller.k_by_batch_size()
    assert one.now_s == other.now_s
    assert version_of(one) == version_of(other)


SETS = ((1, (1, 3, 5, 7)), (8, (0, 1, 3)), (32, (0, 1)))


def test_every_table_is_allowed_at_its_batch_size() -> None:
    info = dataclasses.replace(engine_info(Granularity.BATCH), allowed_from=SETS)
    s = SimulatedServer(info, staircase())

    def check() -> None:
        policy = s.controller.latest_policy
        assert policy is not None
        check_policy(policy)
        assert policy.allowed_from == info.allowed_ranges()
        assert all(k in info.allowed_k(b) for b, k in s.controller.k_by_batch_size().items())

    for batch_size in (4, 16, 40):
        s.batch_size = batch_size
        s.run(300)
        check()
    s._publish(s.controller.command("pin", s.now_s, 7))
    check()
    assert [s.controller.k_by_batch_size()[b] for b in (1, 7, 8, 31, 32)] == [7, 7, 3, 3, 3]
    s.controller.command("pin", s.now_s, 0)
    assert [s.controller.k_by_batch_size()[b] for b in (1, 8)] == [1, 0]
    assert s.controller.counters.limited_steps == 0


def test_a_checkpoint_of_a_server_without_limits_is_cut_to_what_is_allowed() -> None:
    s = server()
    s.controller.command("pin", s.now_s, 7)
    info = dataclasses.replace(s.info, allowed_from=SETS)
    limited = Controller(ControllerSettings(), info)
    limited.restore(s.controller.state())
    table = limited.policy_summary()["table"]
    assert [table[b][0] for b in (0, 1, 8, 32)] == [7, 7, 3, 3]


def test_switch_counters_and_cost_survive_a_restart() -> None:
    s = server()
    s.run(300)
    counters = s.controller.counters
    assert counters.k_switches["trial"] > 0
    again = Controller(ControllerSettings(), s.info)
    again.restore(s.controller.state())
    assert again.counters.k_switches == counters.k_switches
    assert again.models.switch_cost.state().tolist() == pytest.approx(s.controller.models.switch_cost.state().tolist())
