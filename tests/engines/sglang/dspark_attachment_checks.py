"""The plugin in SGLang's own DSpark worker, without model and GPU. Run by test_dspark.py, where SGLang is installed."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import pkgutil
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sglang.srt.arg_groups.overrides import field_names
from sglang.srt.managers.overlap_utils import ResolvedConfidence
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.server_args import ServerArgs
from sglang.srt.speculative.dspark_components.dspark_draft import DraftProposal
from sglang.srt.speculative.dspark_components.dspark_planner import DSparkVerifyPlanner, HostConfidenceBudgetPlanner
from sglang.srt.speculative.dspark_components.dspark_sps import SpsAdditiveCostTable, SpsCostTable
from sglang.srt.speculative.dspark_components.dspark_verify import TargetVerifyExecutor
from sglang.srt.speculative.dspark_components.dspark_worker_v2 import DSparkWorkerV2
from sglang.srt.speculative.eagle_worker_v2 import EAGLEWorkerV2
from sglang.srt.speculative.ragged_verify import RaggedVerifyLayout
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from adaptive_spec.config.settings import ControllerSettings, PolicySettings
from adaptive_spec.control.controller import Controller
from adaptive_spec.domain.plan_search import best_verified
from adaptive_spec.domain.policy import Mode, Policy, Trial
from adaptive_spec.domain.step_record import StepFlag, StepRecord
from adaptive_spec.engine_side.tap import PAGE_NAME, RING_NAME
from adaptive_spec.engines.common import hook_guard
from adaptive_spec.engines.common.hook_guard import FAILURES_IN_A_ROW, Guard
from adaptive_spec.engines.common.plugin_settings import PluginSettings
from adaptive_spec.engines.sglang import contract, plugin
from adaptive_spec.engines.sglang.attachment import Attachment, Place
from adaptive_spec.engines.sglang.dspark_attachment import DSparkAttachment
from adaptive_spec.engines.sglang.dspark_swap import GraphSizes
from adaptive_spec.engines.sglang.supported_servers import dspark_unsupported_reason
from adaptive_spec.engines.static_contract import Need
from adaptive_spec.wire.engine_report import EngineReport, read_report
from adaptive_spec.wire.policy_page import PolicyPage, payload_bytes
from adaptive_spec.wire.ring import RingReader
from tests.engines.sglang.dspark_stand_in import (
    CAPTURED,
    DRAFT_S,
    GAMMA,
    LAUNCH_TEMPERATURE,
    MAX_BATCH,
    TILE,
    TRUE_TEMPERATURE,
    StandInServer,
    served,
    verify_seconds,
)
from tests.engines.sglang.dspark_swap_checks import policy
from tests.engines.sglang.eagle_rank import Board, loop
from tests.engines.sglang.server_kinds_checks import server_args as eagle_args

SERVER_ARGS = {
    "device": "cuda", "attn_dp_size": 1, "ep_join_mode": None, "pp_size": 1, "dp_size": 1,
    "disaggregation_mode": "null", "speculative_num_draft_tokens": GAMMA + 1,
}  # fmt: skip


class Plugged:
    """A stand-in server with the plugin in it, hooked by SGLang's registry into SGLang's classes."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, folder: Path, *, plugin_mode: Any = "active", faults: str = "",
        dp_rank: int | None = None, arguments: dict[str, Any] | None = None, **server: Any,
    ) -> None:  # fmt: skip
        self.server = StandInServer(monkeypatch, folder, **server)
        monkeypatch.setenv(hook_guard.FAULT_VARIABLE, faults)
        attention_dp = server.get("attention_dp", 1)
        monkeypatch.setattr(Attachment, "_place", lambda _: Place(0, 2 * attention_dp - 1, 0, attention_dp))
        monkeypatch.setattr(plugin, "_dp_rank", lambda: dp_rank)
        made: list[DSparkAttachment] = []
        init = DSparkAttachment.__init__

        def noted(attachment: DSparkAttachment, *args: Any) -> None:
            init(attachment, *args)
            made.append(attachment)

        monkeypatch.setattr(DSparkAttachment, "__init__", noted)
        self.runtime_dir = folder / "run" if dp_rank is None else folder / "run" / f"dp-{dp_rank}"
        HookRegistry.reset()
        plugin._install(PluginSettings(plugin_mode, folder / "run"), "sglang test")
        HookRegistry.apply_hooks()
        assert SpeculativeAlgorithm.DSPARK.create_worker(SimpleNamespace(**SERVER_ARGS | (arguments or {}))) is DSparkWorkerV2
        [self.attachment] = made
        self.guard = self.attachment._guard
        self.server.start()
        if self.attachment._tap is not None:
            self.attachment._clock = self.server.clock
        self.launch_table = getattr(self.server.planner._budget_planner, "sps_table", None)

    def page(self) -> PolicyPage:
        page = PolicyPage.create_or_open(self.runtime_dir / PAGE_NAME, payload_bytes(MAX_BATCH, GAMMA))
        page.heartbeat(time.monotonic_ns())
        assert self.attachment._tap is not None
        self.attachment._tap._look_at = 0
        return page

    def records(self) -> list[StepRecord]:
        self.server.drain()
        self.attachment._in_flight.interrupt()
        with RingReader.open(self.runtime_dir / RING_NAME) as ring:
            return list(ring.poll(10_000))

    @property
    def report(self) -> EngineReport:
        self.attachment.report(self.attachment._state, self.attachment._reason)
        report = read_report(self.runtime_dir)
        assert report is not None
        return report

    @property
    def table(self) -> Any:
        return self.server.planner._budget_planner.sps_table

    @property
    def temperatures(self) -> list[float]:
        found: list[float] = self.server.planner._confidence_head.sts_temperatures.tolist()
        return found


@pytest.fixture(autouse=True)
def unhooked(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's classes are as they were when a test is over."""
    for target in {need.path: need for need in contract.NEEDS if need.hook}.values():
        owner, name = target.path.rsplit(".", 1)
        found = pkgutil.resolve_name(owner)
        monkeypatch.setattr(found, name, vars(found).get(name) or getattr(found, name))  # some are inherited


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


# -- that it fits SGLang -----------------------------------------------------------------------------------------------


def test_every_target_is_there() -> None:
    assert plugin.lacking(contract.DSPARK_GROUPS) == ""


def _assigned(owner: type) -> set[str]:
    """Attributes that a class has, or gives itself in its constructor."""
    if (fields := getattr(owner, "__struct_fields__", None) or getattr(owner, "__dataclass_fields__", None)) is not None:
        return set(fields)
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(vars(owner)["__init__"]))))
    stored = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    return set(dir(owner)) | stored


@pytest.mark.parametrize(
    ("owner", "attributes"),
    [
        (DSparkWorkerV2, ["gamma", "_verify_planner", "device", "server_args", "_target_worker"]),
        (DSparkVerifyPlanner, ["_budget_planner", "_confidence_head"]),
        (DSparkVerifyPlanner, ["model_runner", "_align_verify_tokens_to_graph_tier", "_budget_from_resolved"]),
        (HostConfidenceBudgetPlanner, ["sps_table", "forced_budget_frac", "last_decision"]),
        (TargetVerifyExecutor, ["model_runner"]),
        (DraftProposal, ["confidence_raw"]),
        (RaggedVerifyLayout, ["graph_num_tokens"]),
        (GenerationBatchResult, ["cap_lens"]),
    ],
)
def test_every_attribute_used_is_there(owner: type, attributes: list[str]) -> None:
    assert set(attributes) <= _assigned(owner)


def test_every_server_argument_used_is_there() -> None:
    assert set(SERVER_ARGS) <= field_names(ServerArgs)


@pytest.mark.parametrize(
    ("argument", "value", "words"),
    [
        ("device", "npu", "device=npu"), ("pp_size", 2, "pp_size=2"), ("disaggregation_mode", "prefill", "prefill"),
        ("speculative_num_draft_tokens", 34, "33 draft tokens"),
    ],
)  # fmt: skip
def test_servers_that_are_left_alone(argument: str, value: Any, words: str) -> None:
    assert dspark_unsupported_reason(SimpleNamespace(**SERVER_ARGS)) is None
    reason = dspark_unsupported_reason(SimpleNamespace(**{**SERVER_ARGS, argument: value}))
    assert reason is not None
    assert words in reason


@pytest.mark.parametrize("changes", [{"dp_size": 2}, {"dp_size": 2, "attn_dp_size": 2}])
def test_data_parallelism_is_not_refused(changes: dict[str, Any]) -> None:
    assert dspark_unsupported_reason(SimpleNamespace(**{**SERVER_ARGS, **changes})) is None


def test_dspark_needs_no_target_of_eagle(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """All that EAGLE needs beyond what every server needs is gone: a DSPARK server attaches, and is steered."""
    gone = [Need(group, f"sglang.srt.gone_{i}.f", ("self",), hook="step") for i, group in enumerate(contract.LEVELS[1:])]
    kept = [need for need in contract.NEEDS if need.group not in contract.LEVELS[1:]]
    monkeypatch.setattr(contract, "NEEDS", (*kept, *gone))
    assert "gone_0" in plugin.lacking((contract.COUNTS_AND_K,))
    plugged = Plugged(monkeypatch, folder)
    assert (plugged.report.state, plugged.report.reason) == ("attached", "")
    with plugged.page() as page:
        page.publish(policy(1))
        plugged.server.step(4)
    assert isinstance(plugged.table, SpsAdditiveCostTable)
    assert [record.policy_version for record in plugged.records()] == [1]
    assert not any("eagle" in target.lower() for target in HookRegistry._hooks)


def test_eagle_needs_no_target_of_dspark(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    gone = Need(contract.DSPARK, "sglang.srt.gone.f", ("self",), hook="plan")
    kept = [need for need in contract.NEEDS if need.group != contract.DSPARK]
    monkeypatch.setattr(contract, "NEEDS", (*kept, gone))
    HookRegistry.reset()
    guard = Guard("SGLang", "")
    side = plugin._attachment(PluginSettings("active", folder), guard, "sglang test", EAGLEWorkerV2, SpeculativeAlgorithm.EAGLE)
    plugin.attach(side, guard, "sglang test", EAGLEWorkerV2, SpeculativeAlgorithm.EAGLE, eagle_args(speculative_adaptive=True))
    assert guard.closed is None
    assert {need.path for need in contract.hooks_of(contract.COUNTS_AND_K)} <= set(HookRegistry._hooks)
    assert not any("dspark" in target for target in HookRegistry._hooks)


def test_a_renamed_target_refuses_dspark_only(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    path = "sglang.srt.speculative.dspark_components.dspark_planner.DSparkVerifyPlanner.renamed"
    monkeypatch.setattr(contract, "NEEDS", (*contract.NEEDS, Need(contract.DSPARK, path, ("self",), hook="plan")))
    assert plugin.lacking(contract.EAGLE_GROUPS) == "", "EAGLE is not concerned"
    plugged = Plugged(monkeypatch, folder)
    assert (plugged.report.state, "renamed" in plugged.report.reason) == ("refused", True)
    assert not any("dspark" in target for target in HookRegistry._hooks)
    assert not any("EAGLEWorkerV2" in target for target in HookRegistry._hooks), "only what the algorithm needs is hooked"
    plugged.server.step(3)
    plugged.server.drain()
    assert not (plugged.runtime_dir / RING_NAME).exists()


def test_eagle_servers_do_not_even_import_dspark(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    HookRegistry.reset()
    plugin._install(PluginSettings("active", folder), "sglang test")
    hooked = [need.path for need in contract.hooks_of(contract.OBSERVE)]
    assert list(HookRegistry._hooks) == [*hooked, "sglang.srt.managers.scheduler.Scheduler.maybe_init_draft_worker"]


def test_other_algorithms_are_answered_as_before(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    HookRegistry.reset()
    plugin._install(PluginSettings("active", folder), "sglang test")
    HookRegistry.apply_hooks()
    SpeculativeAlgorithm.NGRAM.create_worker(
        SimpleNamespace(
            speculative_algorithm="NGRAM", disable_overlap_schedule=False, device="cpu", disaggregation_mode="null", pp_size=1,
            speculative_num_steps=2, speculative_num_draft_tokens=4, speculative_use_rejection_sampling=False,
        )
    )  # fmt: skip
    report = read_report(folder)
    assert report is not None
    assert (report.state, report.reason) == ("refused", "speculative_algorithm=NGRAM (only EAGLE/EAGLE3 are supported)")
    assert not report.failures


# -- what is recorded --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    ("server", "packed"),
    [
        ({"mode": "compact"}, True), ({"mode": "compact", "graphs": CAPTURED}, True), ({"mode": "compact", "sps": False}, True),
        ({"mode": "cap-accept"}, False), ({"mode": "static"}, False),
    ],
)  # fmt: skip
def test_records_say_what_sglang_did(
    monkeypatch: pytest.MonkeyPatch, folder: Path, server: dict[str, Any], packed: bool, overlap: bool
) -> None:
    plugged = Plugged(monkeypatch, folder, plugin_mode="shadow", overlap=overlap, **server)
    raw = []
    for rows in [3, 5, 8, 8, 2, 1] * 3:
        plugged.server.step(rows)
        raw.append(plugged.server.worker._proposer.draft_model.raw.numpy())
    records = plugged.records()
    assert [(r.verify_len.tolist(), r.accept_len.tolist()) for r in records] == served(plugged.server)
    assert not plugged.guard.failures
    graph = CAPTURED[0] if server.get("graphs") else 0
    for record, logits in zip(records, raw, strict=True):
        rows = record.batch_size
        forward = int(record.verify_len.sum()) + rows if packed else rows * (GAMMA + 1)
        assert (record.k, record.num_tokens, record.kv_tokens) == (GAMMA, forward, 100 * rows)
        assert record.padded_tokens == (graph or forward)
        assert record.draft_s == pytest.approx(DRAFT_S, rel=1e-5)
        assert record.verify_s == pytest.approx(verify_seconds(record.padded_tokens), rel=1e-5)
        assert record.step_s == pytest.approx(record.draft_s + record.verify_s, rel=1e-4)
        assert record.policy_version == 0
        assert record.invalid_reason() is None
        if server["mode"] == "static":
            assert not record.confidences.any(), "there is no confidence head"
        else:
            np.testing.assert_allclose(record.confidences, 1.0 / (1.0 + np.exp(-logits / LAUNCH_TEMPERATURE)), rtol=1e-5)
            assert not record.flags & StepFlag.CENSORED
    if packed and server.get("sps", True) and not graph:
        assert len({record.num_tokens for record in records}) > 3


@pytest.mark.parametrize(
    ("server", "words"),
    [
        ({"mode": "static"}, "static verifies every drafted token"),
        ({"mode": "cap-accept"}, "runs every drafted token"),
        ({"mode": "compact", "sps": False}, "no SPS table"),
    ],
)
def test_what_cannot_be_swapped_is_watched(
    monkeypatch: pytest.MonkeyPatch, folder: Path, server: dict[str, Any], words: str
) -> None:
    plugged = Plugged(monkeypatch, folder, **server)
    with plugged.page() as page:
        page.publish(policy(1))
        for _ in range(5):
            plugged.server.step(3)
    assert plugged.report.state == "observing"
    assert words in plugged.report.reason
    assert getattr(plugged.server.planner._budget_planner, "sps_table", None) is plugged.launch_table
    assert len(plugged.records()) == 5


@pytest.mark.parametrize("overlap", [False, True])
def test_a_prefill_between_is_no_step(monkeypatch: pytest.MonkeyPatch, folder: Path, overlap: bool) -> None:
    plugged = Plugged(monkeypatch, folder, overlap=overlap)
    for _ in range(3):
        plugged.server.step(2)
        plugged.server.prefill()
    assert [r.step for r in plugged.records()] == [1, 2, 3]
    assert not plugged.guard.failures


# -- what a policy does ------------------------------------------------------------------------------------------------


def budgets(plugged: Plugged, found: list[int]) -> None:
    """Note every budget SGLang's planner decides on."""
    planner = plugged.server.planner._budget_planner
    compute = planner.compute_budget

    def noted(**arguments: Any) -> int:
        found.append(compute(**arguments))
        return found[-1]

    planner.compute_budget = noted


@pytest.mark.parametrize("overlap", [False, True])
def test_a_policy_governs_the_very_step_it_was_adopted_in(monkeypatch: pytest.MonkeyPatch, folder: Path, overlap: bool) -> None:
    plugged, found = Plugged(monkeypatch, folder, overlap=overlap), list[int]()
    budgets(plugged, found)
    with plugged.page() as page:
        for _ in range(4):
            plugged.server.step(4)
        page.publish(policy(1, jump_s=1.0, tile=8))
        plugged.server.step(4)
        assert isinstance(plugged.table, SpsAdditiveCostTable)
        assert found[-1] == 4, "to the end of the tile that the bonus tokens begin"
        assert plugged.temperatures == pytest.approx([2.0] * GAMMA, rel=1e-3)
        page.publish(policy(2, jump_s=1e-6, tile=8))
        plugged.server.step(4)
        assert found[-1] >= 4 * GAMMA - 2, "but for the least likely tokens"
        assert plugged.report.counters["sps_swaps"] == 2
        assert plugged.report.state == "attached"
        # Shadow, a dead sidecar: what the server was launched with.
        page.publish(dataclasses.replace(policy(3), mode=Mode.SHADOW, acting=False))
        plugged.server.step(4)
        assert plugged.table is plugged.launch_table
        assert plugged.temperatures == [LAUNCH_TEMPERATURE] * GAMMA
        page.publish(policy(4))
        plugged.server.step(4)
        assert isinstance(plugged.table, SpsAdditiveCostTable)
        page.heartbeat(time.monotonic_ns() - int(1e9 * 60))
        plugged.server.step(4)
        assert plugged.table is plugged.launch_table
    versions = [record.policy_version for record in plugged.records()]
    assert versions == [0, 0, 0, 0, 1, 2, 0, 4, 0]


@pytest.mark.parametrize("overlap", [False, True])
def test_trials_and_a_pinned_k_are_planned_by_count(monkeypatch: pytest.MonkeyPatch, folder: Path, overlap: bool) -> None:
    plugged, found = Plugged(monkeypatch, folder, overlap=overlap), list[int]()
    budgets(plugged, found)
    with plugged.page() as page:
        for _ in range(3):
            plugged.server.step(4)
        trials = (Trial(0, GAMMA, 9, 2), Trial(0, GAMMA, 21, 1), Trial(0, GAMMA, 3, 1))
        page.publish(dataclasses.replace(policy(1, jump_s=1.0, tile=8), mode=Mode.SWEEP, verify_all=True, trials=trials))
        for _ in range(6):
            plugged.server.step(4)
        assert found[-6:-2] == [5, 5, 17, 0]
        assert found[-2:] != [17, 17]
        assert plugged.table is plugged.launch_table, "nothing was measured yet"
        flags = [bool(record.flags & StepFlag.TRIAL) for record in plugged.records()]
        assert flags == [False] * 3 + [True] * 3 + [False] * 3, "3 tokens are fewer than 4 requests have"
        limited = [bool(record.flags & StepFlag.LIMITED) for record in plugged.records()]
        assert limited == [False] * 6 + [True] + [False] * 2
        page.publish(dataclasses.replace(policy(2, jump_s=1.0, tile=8), mode=Mode.PINNED, verify_all=True))
        plugged.server.step(4)
        assert found[-1] == 4 * GAMMA
        page.publish(policy(3, jump_s=1.0, tile=8))
        plugged.server.step(4)
        assert found[-1] == 4
    # What SGLang's own profiling forces stays.
    plugged.server.worker.set_dspark_forced_budget_frac(1.0)
    plugged.server.step(4)
    assert found[-1] == 4 * GAMMA


def test_shadow_touches_nothing(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    plugged = Plugged(monkeypatch, folder, plugin_mode="shadow")
    bare = StandInServer(monkeypatch, folder)
    with plugged.page() as page:
        page.publish(policy(1, jump_s=1.0, tile=8))
        for server in [plugged.server] * 6 + [bare] * 6:
            server.step(4)
    assert served(plugged.server) == served(bare)
    assert plugged.table is plugged.launch_table
    assert plugged.temperatures == [LAUNCH_TEMPERATURE] * GAMMA
    assert plugged.report.state == "attached"
    assert {record.policy_version for record in plugged.records()} == {0}


def test_a_refused_policy_is_counted_and_leaves_the_table(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    plugged = Plugged(monkeypatch, folder)
    with plugged.page() as page:
        page.publish(policy(1))
        plugged.server.step(4)
        kept = plugged.table
        broken = policy(2)
        page.publish(dataclasses.replace(broken, verify_s=broken.verify_s * 0, fixed_s=broken.fixed_s * 0))
        for _ in range(5):
            plugged.server.step(4)
    assert plugged.table is kept
    assert (plugged.report.counters["sps_swaps"], plugged.report.counters["sps_refusals"]) == (1, 1)
    assert plugged.report.state == "attached"
    assert not plugged.guard.failures


HALVES = [hook + half for hook in ("step", "draft", "verify", "results") for half in ("", "/after")]


@pytest.mark.parametrize(("fault", "overlap"), [("plan", True), *itertools.product(HALVES, (False, True))])
def test_a_hook_that_fails_gives_the_planner_back(
    monkeypatch: pytest.MonkeyPatch, folder: Path, fault: str, overlap: bool
) -> None:
    """SGLang's output is what it is without the plugin; after enough failures nothing of ours is left in the planner."""
    plugged = Plugged(monkeypatch, folder, faults=f"{fault}:{FAILURES_IN_A_ROW + 50}", overlap=overlap)
    hook = fault.partition("/")[0]
    with plugged.page() as page:
        page.publish(policy(1))
        for _ in range(FAILURES_IN_A_ROW + 4):
            plugged.server.step(4)
    plugged.server.drain()
    assert len(plugged.server.results) == FAILURES_IN_A_ROW + 4
    assert plugged.report.failures == {hook: FAILURES_IN_A_ROW}
    assert (plugged.report.state, f"hook {hook} failed" in plugged.report.reason) == ("detached", True)
    assert plugged.table is plugged.launch_table
    assert plugged.temperatures == [LAUNCH_TEMPERATURE] * GAMMA
    assert plugged.server.planner._budget_planner.forced_budget_frac is None


@pytest.mark.parametrize("fault", ["attach", "attach/after"])
def test_a_failure_at_the_start_is_final(monkeypatch: pytest.MonkeyPatch, folder: Path, fault: str) -> None:
    plugged = Plugged(monkeypatch, folder, faults=fault)
    plugged.server.step(3)
    plugged.server.drain()
    assert plugged.report.state == "detached"
    assert plugged.table is plugged.launch_table


# -- rails -------------------------------------------------------------------------------------------------------------

GREEDY, MEAN = 1e-6, 1.0
"""Seconds of a tile boundary: everything pays, and nothing beyond the first tile."""


def railed(version: int, k_min: int, k_max: int, jump_s: float = GREEDY, **changes: Any) -> Policy:
    return dataclasses.replace(policy(version, jump_s=jump_s, tile=8), k_min=k_min, k_max=k_max, **changes)


def verified(plugged: Plugged) -> list[tuple[int, int]]:
    """Requests and verified draft tokens of every step, by SGLang's own results."""
    return [(len(lengths), sum(lengths)) for lengths, _ in served(plugged.server)]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("graphs", [(), (4, 8, 12, 16, 24, 32, 48)])
def test_a_step_verifies_within_the_rails(
    monkeypatch: pytest.MonkeyPatch, folder: Path, overlap: bool, graphs: tuple[int, ...]
) -> None:
    """By the table, in trials and pinned, from the first step on, and no longer than a policy acts."""
    plugged = Plugged(monkeypatch, folder, overlap=overlap, graphs=graphs)
    batches = [4, 1, 8, 3, 5]
    trials = tuple(Trial(0, GAMMA, tokens, 1) for tokens in (0, 8, 4, 24, 13))
    with plugged.page() as page:
        for rails, jump_s in (((0, 2), GREEDY), ((2, GAMMA), MEAN), ((1, 3), 4e-3), ((4, 4), MEAN)):
            for changes in ({}, {"mode": Mode.PINNED, "verify_all": True}, {"mode": Mode.SWEEP, "trials": trials}):
                begun = len(plugged.server.results)
                version = 1 + (begun or 0)
                page.publish(railed(version, *rails, jump_s=jump_s, **changes))
                for rows in batches:
                    plugged.server.step(rows)
                for rows, count in verified(plugged)[begun:]:
                    assert rows * rails[0] <= count <= rows * rails[1]
                if changes and "trials" not in changes:
                    assert verified(plugged)[begun:] == [(rows, rows * rails[1]) for rows in batches], (
                        "pinned: all that they leave"
                    )
        page.publish(dataclasses.replace(railed(1000, 0, 1), acting=False, mode=Mode.SHADOW))
        begun = len(plugged.server.results)
        for rows in batches * 2:
            plugged.server.step(rows)
        assert "_budget_from_resolved" not in vars(plugged.server.planner)
        assert any(count > rows for rows, count in verified(plugged)[begun:])
    assert not plugged.guard.failures
    for record in plugged.records():
        assert record.invalid_reason() is None
        assert record.padded_tokens == next((size for size in graphs if size >= record.num_tokens), record.num_tokens)


def test_rails_that_are_narrowed_bind_in_the_very_next_step(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A sidecar that was restarted alone, with other rails: they come with its first policy."""
    plugged = Plugged(monkeypatch, folder)
    with plugged.page() as page:
        for version, k_max in enumerate((32, 3, 1, 4, 32), 1):
            page.publish(railed(version, 0, k_max))
            plugged.server.step(4)
            assert verified(plugged)[-1][1] <= 4 * k_max
        counts = [count for _, count in verified(plugged)]
        assert counts[1:4] == [12, 4, 16]
        assert min(counts[0], counts[4]) > 16
        # The sidecar dies: nothing is left of the rails.
        page.publish(railed(9, 0, 1))
        plugged.server.step(4)
        page.heartbeat(time.monotonic_ns() - int(1e9 * 60))
        plugged.server.step(4)
    assert verified(plugged)[-2][1] == 4
    assert "_budget_from_resolved" not in vars(plugged.server.planner)
    assert plugged.table is plugged.launch_table


@pytest.mark.parametrize("overlap", [False, True])
def test_without_a_policy_the_server_is_as_it_was_launched(monkeypatch: pytest.MonkeyPatch, folder: Path, overlap: bool) -> None:
    plugged = Plugged(monkeypatch, folder, overlap=overlap)
    bare = StandInServer(monkeypatch, folder, overlap=overlap)
    with plugged.page() as page:
        page.publish(dataclasses.replace(railed(1, 0, 1), acting=False, mode=Mode.SHADOW))
        for rows in (4, 2, 8, 1) * 2:
            plugged.server.step(rows)
            bare.step(rows)
    assert served(plugged.server) == served(bare)


@pytest.mark.parametrize("filled", [False, True])
def test_a_trial_is_one_only_if_its_tokens_ran(monkeypatch: pytest.MonkeyPatch, folder: Path, filled: bool) -> None:
    """As SGLang rounds them: it pads to a captured graph, or fills it."""
    graphs = (4, 8, 12, 16, 24)  # 8 requests have up to 48 tokens: more than any graph
    plugged = Plugged(monkeypatch, folder, graphs=graphs, filled=filled)
    asked = [9, 12, 21, 3, 26, 0, 0]
    with plugged.page() as page:
        page.publish(dataclasses.replace(
            railed(1, 0, 32), mode=Mode.SWEEP, verify_all=True, trials=tuple(Trial(0, GAMMA, tokens, 1) for tokens in asked)
        ))  # fmt: skip
        for rows in (4, 4, 4, 4, 8, 2, 8):
            plugged.server.step(rows)
    records = plugged.records()
    most = 24 if filled else 48
    assert [record.num_tokens for record in records] == ([12, 12, 24, 4] if filled else [9, 12, 21, 4]) + [most, 12, most]
    assert [record.padded_tokens for record in records] == [12, 12, 24, 4, most, 12, most]
    trial = [bool(record.flags & StepFlag.TRIAL) for record in records]
    assert trial == [True, True, True, False, False, True, not filled], "all of 8 requests do not fit in a graph to fill"
    assert [bool(record.flags & StepFlag.LIMITED) for record in records] == [not one for one in trial]


def test_a_trial_that_sglangs_profiler_or_a_missing_plan_overrules_is_none(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    plugged = Plugged(monkeypatch, folder, overlap=True)
    with plugged.page() as page:
        trials = (Trial(0, GAMMA, 9, 4),)
        page.publish(dataclasses.replace(policy(1), mode=Mode.SWEEP, verify_all=True, trials=trials))
        for _ in range(3):
            plugged.server.step(4)  # the confidences of the first two are not there yet
        plugged.server.step(4)
        plugged.server.worker.set_dspark_forced_budget_frac(1.0)
        page.publish(dataclasses.replace(policy(2), mode=Mode.SWEEP, verify_all=True, trials=trials))
        plugged.server.step(4)
        plugged.server.worker.set_dspark_forced_budget_frac(None)
    records = plugged.records()
    assert [record.num_tokens for record in records] == [24, 24, 9, 9, 24]
    assert [bool(record.flags & StepFlag.TRIAL) for record in records] == [False, False, True, True, False]


@pytest.mark.parametrize("overlap", [False, True])
def test_the_loop_stays_within_the_rails(monkeypatch: pytest.MonkeyPatch, folder: Path, overlap: bool) -> None:
    """The real controller with rails: what it sweeps, probes and decides, in SGLang's planner."""
    plugged = Plugged(monkeypatch, folder, overlap=overlap)
    settings = ControllerSettings(policy=PolicySettings(k_min=1, k_max=3, probe_budget=0.2))
    dice, records = np.random.default_rng(2), list[StepRecord]()
    with plugged.page() as page, RingReader.open(plugged.runtime_dir / RING_NAME) as ring:
        controller = Controller(settings, ring.info)
        published: list[Policy] = []
        for _ in range(350):
            rows = int(dice.integers(3, 7))
            for _ in range(4):
                plugged.server.step(rows)
            for record in ring.poll(64):
                records.append(record)
                follow(page, controller.observe(record, plugged.server.clock.at_s), published)
            follow(page, controller.tick(plugged.server.clock.at_s), published)
            page.heartbeat(time.monotonic_ns())
        assert controller.mode is Mode.ACTIVE
    ours = [record for record in records if record.policy_version]
    assert len(ours) > 1000
    for record in ours:
        assert record.batch_size <= record.verify_len.sum() <= 3 * record.batch_size
    trials = [record for record in ours if record.flags & StepFlag.TRIAL]
    assert len({record.num_tokens for record in trials}) > 8
    probed = [t for p in published if p.mode is Mode.ACTIVE for t in p.trials]
    assert probed
    assert all(2 * t.batch_size <= t.num_tokens <= 4 * t.batch_size for t in probed)
    assert len({record.num_tokens / record.batch_size for record in ours[-200:]}) > 1, "between them it still chooses"
    assert not plugged.guard.failures


# -- data parallelism --------------------------------------------------------------------------------------------------


def test_a_replica_has_its_own_folder_and_is_steered(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    plugged = Plugged(monkeypatch, folder, dp_rank=1, arguments={"dp_size": 2})
    assert (plugged.report.state, plugged.report.reason) == ("attached", "")
    with plugged.page() as page:
        page.publish(railed(1, 0, 1))
        for _ in range(3):
            plugged.server.step(4)
    assert verified(plugged) == [(4, 4)] * 3
    assert [record.policy_version for record in plugged.records()] == [1, 1, 1]
    assert not (folder / "run" / RING_NAME).exists()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("mode", ["compact", "static"])
def test_attention_dp_is_observed(monkeypatch: pytest.MonkeyPatch, folder: Path, mode: str, overlap: bool) -> None:
    """The ranks verify in one forward: its size is that of all of them, and no policy acts."""
    others = 7
    plugged = Plugged(
        monkeypatch, folder, mode=mode, overlap=overlap, dp_rank=1, attention_dp=2, others=others, graphs=(6, 12, 24, 48),
        arguments={"dp_size": 2, "attn_dp_size": 2},
    )  # fmt: skip
    bare = StandInServer(
        monkeypatch, folder, mode=mode, overlap=overlap, attention_dp=2, others=others, graphs=(6, 12, 24, 48)
    )  # fmt: skip
    assert plugged.report.state == "observing"
    assert "attention DP" in plugged.report.reason
    with plugged.page() as page:
        page.publish(railed(1, 0, 1))
        for rows in (3, 1, 8, 2):
            plugged.server.step(rows)
            bare.step(rows)
    assert served(plugged.server) == served(bare)
    assert getattr(plugged.server.planner._budget_planner, "sps_table", None) is plugged.launch_table
    records = plugged.records()
    assert [(r.verify_len.tolist(), r.accept_len.tolist()) for r in records] == served(plugged.server)
    assert [r.batch_size for r in records] == [3, 1, 8, 2]
    assert {r.policy_version for r in records} == {0}
    if mode == "compact":
        assert {r.padded_tokens for r in records} == {48}
    else:
        assert [r.padded_tokens for r in records] == [max(rows, others) * (GAMMA + 1) for rows in (3, 1, 8, 2)]
    assert not plugged.guard.failures


# -- the whole loop ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
def test_the_loop_finds_staircase_and_temperatures(monkeypatch: pytest.MonkeyPatch, folder: Path, overlap: bool) -> None:
    """Records to the real controller, its policies to the page, from there into SGLang's planner: sweep, then steady traffic."""
    plugged = Plugged(monkeypatch, folder, overlap=overlap)
    with plugged.page() as page, RingReader.open(plugged.runtime_dir / RING_NAME) as ring:
        controller = Controller(ControllerSettings(), ring.info)
        dice, seen, late = np.random.default_rng(1), list[StepRecord](), list[StepRecord]()
        published: list[Policy] = []
        steps = 0
        while steps < 2600:
            rows = int(dice.integers(3, 7))
            for _ in range(4):
                plugged.server.step(rows)
                steps += 1
            for record in ring.poll(64):
                seen.append(record)
                if steps > 1800:
                    late.append(record)
                follow(page, controller.observe(record, plugged.server.clock.at_s), published)
            follow(page, controller.tick(plugged.server.clock.at_s), published)
            page.heartbeat(time.monotonic_ns())
        assert not plugged.guard.failures
        assert controller.mode is Mode.ACTIVE
        assert plugged.report.counters["sps_swaps"] > 3
        assert plugged.report.counters["sps_refusals"] == 0
        assert TILE in {boundary.tokens for boundary in controller.snapshot(0.0).boundaries}
        trials = [record.num_tokens for record in seen if record.flags & StepFlag.TRIAL]
        assert len(set(trials)) > 15, "a sweep measures token counts that the table would not plan"
        # The draft's truth is sigmoid(raw / 2). The swap has had its effect on the planner many times by now: it stays there.
        assert plugged.temperatures == pytest.approx([TRUE_TEMPERATURE] * GAMMA, rel=0.25)
        assert isinstance(plugged.launch_table, SpsCostTable)
        plain = [r for r in late if not r.flags & StepFlag.TRIAL]
        for record in plain:
            told = plugged.table.step_time(num_reqs=record.batch_size, budget=record.num_tokens - record.batch_size)
            assert told == pytest.approx(DRAFT_S + verify_seconds(record.num_tokens), rel=0.05)
        assert worth(plain) > 0.98, "of what our own search finds on the true curve, with confidences of a step or two before"
        assert np.mean([record.num_tokens % TILE == 0 for record in plain]) > 0.9, "to the ends of tiles"
        plugged.server.worker._verify_planner._budget_planner.sps_table = plugged.launch_table
        plugged.attachment._swap = None
        for _ in range(50):
            plugged.server.step(5)
        assert worth(ring.poll(64)) < 0.9, "the table of the launch"


def worth(records: list[StepRecord]) -> float:
    """Expected goodput of what was verified, as a share of the best there was, both on true curve and true confidences."""
    verify = np.array([0.0, *(verify_seconds(m) for m in range(1, MAX_BATCH * (GAMMA + 1) + 1))])
    ours = best = 0.0
    for record in records:
        raw = LAUNCH_TEMPERATURE * np.log(record.confidences.astype(float) / (1.0 - record.confidences + 1e-9))
        survival = np.cumprod(1.0 / (1.0 + np.exp(-raw / TRUE_TEMPERATURE)), axis=1)
        tokens = record.batch_size + sum(survival[i, :v].sum() for i, v in enumerate(record.verify_len))
        ours += tokens / (DRAFT_S + verify[record.num_tokens])
        best += best_verified(survival, DRAFT_S, verify)[1]
    return ours / best


def follow(page: PolicyPage, found: Policy | None, published: list[Policy]) -> None:
    if found is not None:
        page.publish(found)
        published.append(found)


# -- ranks -------------------------------------------------------------------------------------------------------------


RANKS = 3


class Rank:
    """One rank's attachment on a planner of SGLang's. The forward is left out: hooks of classes serve one rank only."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, board: Board, rank: int) -> None:
        self.server = StandInServer(monkeypatch, folder)
        self.guard = Guard("SGLang", "")
        self.attachment = side = DSparkAttachment(PluginSettings("active", folder / "run"), self.guard, "sglang test")
        self.place = place = Place(rank, RANKS)
        side._place = lambda: place  # type: ignore[method-assign]  # no SGLang process groups here
        side._hook_broadcast = lambda: None  # type: ignore[method-assign]
        side._notes = lambda place, terms: board.notes(rank, terms)  # type: ignore[method-assign]
        self.plan = self.guard.around("plan", None, None, side.plan_first)
        self.step = self.guard.around("step", side.step_before, side.step_after, side.step_first)
        self.overlap, self.forward_iter = True, 0

    def attach(self) -> None:
        self.attachment.attach(lambda worker: None, self.server.worker)

    @property
    def swap(self) -> Any:
        assert self.attachment._swap is not None
        return self.attachment._swap

    def run(self) -> State:
        """After a step: table, temperatures, forced budget, and what the planner plans."""
        planner = self.server.planner
        self.forward_iter += 1
        batch = self.server.batch(1 + self.forward_iter % 4)
        batch.forward_iter = self.forward_iter
        if self.overlap:
            self.plan(lambda *_: None, planner, batch, None)
        self.step(lambda *_: SimpleNamespace(), self.server.worker, batch)
        budget = planner._budget_planner
        resolved = ResolvedConfidence(confidence=torch.full((3, GAMMA), 0.9), generation=torch.ones(3, dtype=torch.int64))
        plan = planner._budget_from_resolved(resolved=resolved, req_pool_indices_cpu=torch.arange(3))
        return budget.sps_table.to_json(), planner._confidence_head.sts_temperatures.tolist(), budget.forced_budget_frac, plan


State = tuple[str, list[float], float | None, int]


def run(ranks: list[Rank], steps: int) -> list[State]:
    """The state after each step, equal on all ranks."""
    found = []
    for _ in range(steps):
        loop(ranks)
        states = [rank.run() for rank in ranks]
        assert states == states[:1] * RANKS
        found.append(states[0])
    return found


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[Rank]:
    board = Board(RANKS)
    ranks = [Rank(monkeypatch, folder, board, i) for i in range(RANKS)]
    for rank in ranks:
        rank.attach()
    return ranks


@pytest.fixture
def page(folder: Path, ranks: list[Rank]) -> Iterator[PolicyPage]:
    with PolicyPage.create_or_open(folder / "run" / PAGE_NAME, payload_bytes(MAX_BATCH, GAMMA)) as page:
        page.heartbeat(time.monotonic_ns())
        assert ranks[0].attachment._tap is not None
        ranks[0].attachment._tap._look_at = 0
        yield page


@pytest.mark.parametrize("overlap", [True, False])
def test_all_ranks_swap_in_the_same_step(ranks: list[Rank], page: PolicyPage, overlap: bool) -> None:
    for rank in ranks:
        rank.overlap = overlap
    tables = set()
    for version in range(1, 8):
        trials = (Trial(0, GAMMA, 7, 2),) if version % 2 else ()
        page.publish(dataclasses.replace(policy(version, tile=5 + version), trials=trials))
        tables |= {state[0] for state in run(ranks, 5)}
    assert len(tables) >= 5
    assert not any(rank.guard.failures for rank in ranks)


@pytest.mark.parametrize("overlap", [True, False])
def test_all_ranks_have_the_same_rails_in_the_same_step(ranks: list[Rank], page: PolicyPage, overlap: bool) -> None:
    for rank in ranks:
        rank.overlap = overlap
    last = []
    for version, k_max in enumerate((32, 2, 1, 4, 2, 3), 1):
        trials = (Trial(0, GAMMA, 7, 2),) if version % 2 else ()
        page.publish(railed(version, 0, k_max, trials=trials))
        last.append(run(ranks, 6)[-1][3])
    assert last[1:] == [6, 3, 12, 6, 9]
    assert last[0] > 12
    page.heartbeat(time.monotonic_ns() - int(1e9 * 60))
    run(ranks, 5)
    assert not any("_budget_from_resolved" in vars(rank.server.planner) for rank in ranks)
    assert not any(rank.guard.failures for rank in ranks)


def test_ranks_with_other_graphs_state_other_terms(ranks: list[Rank]) -> None:
    """Where rails and rounding leave other budgets, ranks must not steer."""
    terms = {rank.attachment._terms() for rank in ranks}
    assert len(terms) == 1
    ranks[1].swap.sizes = GraphSizes((4, 8), True)
    assert ranks[1].attachment._terms() not in terms


def test_what_one_rank_refuses_none_takes_over(ranks: list[Rank], page: PolicyPage, monkeypatch: pytest.MonkeyPatch) -> None:
    page.publish(policy(1))
    before = run(ranks, 6)[-1]
    monkeypatch.setattr(ranks[1].swap, "_prepare", lambda *_: {"a": 1}["x"])
    page.publish(policy(2, tile=9))
    assert run(ranks, 6)[-1] == before
    assert [rank.swap.swaps for rank in ranks] == [1] * RANKS
    assert ranks[0].attachment._counters()["rank_refusals"] == 1


def test_a_rank_that_detaches_takes_all_back_in_the_same_step(ranks: list[Rank], page: PolicyPage) -> None:
    launched = ranks[0].server.planner._budget_planner.sps_table.to_json()
    page.publish(policy(1))
    swapped = run(ranks, 7)[-1]
    assert swapped[0] != launched
    failing = ranks[2].guard.around("draft", lambda: {"a": 1}["x"], None)
    for _ in range(FAILURES_IN_A_ROW):
        failing(lambda: None)
    assert ranks[2].guard.closed
    assert ranks[2].run() == ranks[0].run() == ranks[1].run() == swapped, "it goes on like the others until all leave"
    assert run(ranks, 5)[-1][:3] == (launched, [LAUNCH_TEMPERATURE] * GAMMA, None)
