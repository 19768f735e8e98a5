"""The functions of SGLang the plugin hooks, those it uses, and a check that an installed SGLang has them."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Sequence
from typing import NamedTuple

TESTED_VERSIONS = ("0.5.23",)

_SPECULATIVE = "sglang.srt.speculative."
_EAGLE = _SPECULATIVE + "eagle_worker_v2."
_DSPARK = _SPECULATIVE + "dspark_components."
_RECEIVER = "sglang.srt.managers.scheduler_components.request_receiver."
_RESULTS = "sglang.srt.managers.scheduler_components.batch_result_processor."


class Target(NamedTuple):
    """One function of SGLang: our name for the hook, its dotted path, parameters it must have."""

    hook: str
    path: str
    parameters: tuple[str, ...]


TARGETS = (
    Target("worker", "sglang.srt.speculative.spec_info.SpeculativeAlgorithm.create_worker", ("self", "server_args")),
    Target("controller", _SPECULATIVE + "adaptive_runtime_state.AdaptiveController.__init__", ("self", "worker", "policy")),
    Target("attach", _EAGLE + "EAGLEWorkerV2.init_cuda_graphs", ("self",)),
    Target("step", _EAGLE + "EAGLEWorkerV2.forward_batch_generation", ("self", "batch")),
    Target("draft", _EAGLE + "EagleDraftWorker.draft", ("self", "batch")),
    Target("draft_forward", _EAGLE + "EagleDraftWorker.draft_forward", ("self", "forward_batch")),
    Target("verify", _EAGLE + "EAGLEWorkerV2.verify", ("self", "batch")),
    Target("draft_extend", _EAGLE + "EagleDraftWorker._draft_extend_for_decode", ("self", "batch", "batch_result")),
    Target("results", _RESULTS + "SchedulerBatchResultProcessor._resolve_spec_v2_tokens", ("self", "result", "batch")),
)
"""The plugin attaches only if all of them are found."""
DSPARK_TARGETS = (
    Target("attach", _DSPARK + "dspark_worker_v2.DSparkWorkerV2.init_cuda_graphs", ("self",)),
    Target("plan", _DSPARK + "dspark_planner.DSparkVerifyPlanner.prepare_verify_budget", ("self", "batch")),
    Target("step", _DSPARK + "dspark_worker_v2.DSparkWorkerV2.forward_batch_generation", ("self", "batch")),
    Target("draft", _DSPARK + "dspark_draft.DraftBlockProposer.propose", ("self", "batch")),
    Target("verify", _DSPARK + "dspark_verify.TargetVerifyExecutor.run_compact", ("self", "batch", "layout")),
    Target("verify_all", _DSPARK + "dspark_verify.TargetVerifyExecutor.run_non_compact", ("self", "batch")),
)
"""Hooked when SGLang has chosen DSPARK, in place of EAGLE's. The plugin attaches only if all of them are found."""
RANK_TARGETS = (Target("broadcast", _RECEIVER + "SchedulerRequestReceiver._broadcast_reqs_across_ranks", ("self", "recv_reqs")),)
"""Hooked where K is decided for several tensor-parallel ranks. Without it K is left to SGLang there."""

NEEDED = (
    *(_SPECULATIVE + "adaptive_spec_params." + name for name in ("adaptive_unsupported_reason",)),
    *(_SPECULATIVE + "adaptive_runtime_state." + name for name in ("AdaptiveSpecPolicy", "AdaptiveController.init_states")),
    "sglang.srt.runtime_context.get_parallel",
    "sglang.srt.plugins.hook_registry.HookRegistry",
)
"""Used, not hooked."""
DSPARK_NEEDED = (
    *(_DSPARK + "dspark_planner.DSparkVerifyPlanner." + name for name in (
        "is_compact_mode", "is_verify_all", "mode_value", "schedules_verify_budget", "set_forced_budget_frac",
    )),
    _DSPARK + "dspark_sps.SpsAdditiveCostTable",
    _DSPARK + "dspark_sts.DSparkStsCalibration",
    "sglang.srt.runtime_context.attn_dp_enabled_of",
)  # fmt: skip


def missing_targets(targets: Sequence[Target] = TARGETS, needed: Sequence[str] = NEEDED) -> list[str]:
    """Return one line per target that is missing or lacks a parameter it must have; empty if none is."""
    wrong = []
    for target in targets:
        try:
            found = pkgutil.resolve_name(target.path)
            parameters = inspect.signature(found).parameters
        except Exception as error:
            wrong.append(f"{target.path}: {type(error).__name__}: {' '.join(str(error).split())[:120]}")
            continue
        lacking = [name for name in target.parameters if name not in parameters]
        if lacking:
            wrong.append(f"{target.path} has no parameter {', '.join(lacking)}")
    for path in needed:
        try:
            pkgutil.resolve_name(path)
        except Exception as error:
            wrong.append(f"{path}: {type(error).__name__}: {' '.join(str(error).split())[:120]}")
    return wrong
