"""All that the plugin uses of SGLang, in one table: `NEEDS`.

Read by `make sglang-matrix` for the wheels of several releases, by `doctor` and by the plugin before it hooks anything. This
module imports the standard library alone, and nothing of SGLang. A name of SGLang that the plugin uses must be listed
here; `tests/engines/sglang/test_contract.py` fails for one that is not.

Groups, each with what is lost without it; a server needs those of its algorithm (`EAGLE_GROUPS`, `DSPARK_GROUPS`,
and one of `WATCHED_GROUPS` where it is only watched):

| group | lost without it |
|---|---|
| observe | everything: whether and how the server speculates is not known |
| counts and K | accepted counts per step and the choice of K: nothing can be decided, nothing learnt |
| stage times | draft, verify and draft-extend time: only whole steps are timed |
| confidences | the draft's confidences: acceptance is learnt from counts alone |
| ranks | more than one tensor-parallel rank |
| dspark | DSPARK servers; EAGLE ones are not concerned |
| ngram | NGRAM servers |
| multi-layer | EAGLE servers with a draft layer for each position |
| no speculation | servers without speculation, and the reason why an algorithm of another plugin is refused |
"""

from __future__ import annotations

from collections.abc import Iterable

from adaptive_spec.engines.static_contract import Need

OBSERVE = "observe"
COUNTS_AND_K = "counts and K"
STAGE_TIMES = "stage times"
CONFIDENCES = "confidences"
RANKS = "ranks"
DSPARK = "dspark"
NGRAM = "ngram"
MULTI_LAYER = "multi-layer"
PLAIN = "no speculation"

LEVELS = (OBSERVE, COUNTS_AND_K, STAGE_TIMES, CONFIDENCES)
"""Level 0 to 3 of an EAGLE server: each needs those before it."""
EAGLE_GROUPS = (*LEVELS, RANKS)
DSPARK_GROUPS = (OBSERVE, RANKS, DSPARK)
WATCHED_GROUPS = (NGRAM, MULTI_LAYER, PLAIN)
GROUPS = (*EAGLE_GROUPS, DSPARK, *WATCHED_GROUPS)

SUPPORTED_RELEASES = {"0.5.20": EAGLE_GROUPS, "0.5.21": EAGLE_GROUPS, "0.5.22": EAGLE_GROUPS, "0.5.23": GROUPS}
"""Releases the plugin hooks into, oldest first, and the groups that must be met there. A release is added when the CPU kit has
run it; the static contract alone is not enough."""
CHECKED_RELEASES: tuple[str, ...] = ()
"""Releases the matrix checks as well, without failing."""

_SRT = "sglang.srt."
_SPECULATIVE = _SRT + "speculative."
_EAGLE_MODULE = _SPECULATIVE + "eagle_worker_v2."
_WORKER = _EAGLE_MODULE + "EAGLEWorkerV2"
_DRAFT_WORKER = _EAGLE_MODULE + "EagleDraftWorker"
_CONTROLLER = _SPECULATIVE + "adaptive_runtime_state.AdaptiveController"
_POLICY_METHODS = ("candidate_steps", "set_cuda_graph_bs", "get_steps_for_batch", "on_verify_complete", "cuda_graph_bs_for_step")
_FIELDS = _SRT + "arg_groups.fields."
_RESULT = _SRT + "managers.utils.GenerationBatchResult"
_BATCH = _SRT + "managers.schedule_batch.ScheduleBatch"
_PROCESSOR = _SRT + "managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"
_MODEL_RUNNER = _SRT + "model_executor.model_runner.ModelRunner"
_NGRAM = _SPECULATIVE + "ngram_worker.NGRAMWorker"
_MULTI_LAYER = _SPECULATIVE + "multi_layer_eagle_worker_v2.MultiLayerEagleWorkerV2"
_PLAIN = _SRT + "managers.tp_worker.TpModelWorker"
_DSPARK = _SPECULATIVE + "dspark_components."
_PLANNER = _DSPARK + "dspark_planner.DSparkVerifyPlanner"
_DSPARK_WORKER = _DSPARK + "dspark_worker_v2.DSparkWorkerV2"
_VERIFY = _DSPARK + "dspark_verify.TargetVerifyExecutor"

_WATCHED = (
    (_PLAIN, ("model_runner",), False),
    (_MODEL_RUNNER, ("max_running_requests",), False),
    (
        _BATCH,
        ("reqs", "forward_mode", "is_extend_in_batch", "seq_lens_sum", "has_grammar", "return_logprob", "return_hidden_states"),
        False,
    ),
    (_SRT + "managers.schedule_batch.Req", ("rid", "origin_input_ids", "output_ids", "is_retracted", "finished"), False),
    (_RESULT, ("num_correct_drafts_per_req_cpu",), True),
)
"""What every server that is only watched needs: path, attributes, whether the plugin adds attributes of its own."""

NEEDS = (
    # -- observe: SGLang's plugin seam, and what it says of its configuration ------------------------------------------
    Need(OBSERVE, _SRT + "plugins.load_plugins", calls=("apply_hooks",)),
    Need(OBSERVE, _SRT + "plugins.hook_registry.HookRegistry.register", ("cls", "target", "hook", "hook_type")),
    Need(OBSERVE, _SRT + "plugins.hook_registry.HookRegistry.apply_hooks"),
    Need(OBSERVE, _SRT + "plugins.hook_registry.HookType", attributes=("AROUND",)),
    Need(OBSERVE, _SPECULATIVE + "spec_info.SpeculativeAlgorithm.create_worker", ("self", "server_args"), hook="worker"),
    Need(OBSERVE, _SPECULATIVE + "spec_info.SpeculativeAlgorithm", attributes=("is_dspark", "from_string")),
    Need(OBSERVE, _SPECULATIVE + "adaptive_spec_params.adaptive_unsupported_reason", ("server_args",), called=True),
    Need(OBSERVE, _SRT + "arg_groups.overrides.resolving_view", ("server_args",), called=True),
    Need(OBSERVE, _FIELDS + "spec.Spec", attributes=(
        "speculative_use_rejection_sampling", "speculative_adaptive", "speculative_algorithm", "speculative_num_steps",
        "speculative_num_draft_tokens",
    )),
    Need(OBSERVE, _FIELDS + "device.Device", attributes=("device",)),
    Need(OBSERVE, _FIELDS + "disagg.Disagg", attributes=("disaggregation_mode",)),
    Need(OBSERVE, _FIELDS + "parallel.Parallel", attributes=("pp_size",)),
    Need(OBSERVE, _FIELDS + "model.Model", attributes=("model_path",)),
    Need(OBSERVE, _SRT + "runtime_context.get_parallel", called=True),
    Need(OBSERVE, _SRT + "runtime_context.ParallelContext", attributes=("tp_rank", "tp_size")),
    # -- counts and K: the policy protocol, the step and its result ----------------------------------------------------
    Need(COUNTS_AND_K, _CONTROLLER + ".__init__", ("self", "worker", "policy"), hook="controller"),
    Need(COUNTS_AND_K, _CONTROLLER, attributes=("_states", "params")),
    Need(COUNTS_AND_K, _CONTROLLER + ".init_states", calls=("set_cuda_graph_bs", "cuda_graph_bs_for_step")),
    Need(COUNTS_AND_K, _CONTROLLER + ".activate_step_by_batch", ("self", "batch_size"), calls=("get_steps_for_batch",)),
    Need(COUNTS_AND_K, _CONTROLLER + ".on_verify_complete", calls=("on_verify_complete",)),
    Need(COUNTS_AND_K, _SPECULATIVE + "adaptive_runtime_state.AdaptiveSpecPolicy", attributes=_POLICY_METHODS),
    Need(COUNTS_AND_K, _SPECULATIVE + "adaptive_spec_params.AdaptiveSpeculativeParams", attributes=(
        *_POLICY_METHODS, "_route",
    )),
    Need(COUNTS_AND_K, _SPECULATIVE + "adaptive_spec_params.AdaptiveStepSlot", attributes=("candidate_steps", "current_steps")),
    Need(COUNTS_AND_K, _WORKER + ".init_cuda_graphs", ("self",), calls=("init_states",), hook="attach"),
    Need(
        COUNTS_AND_K, _WORKER + ".forward_batch_generation", ("self", "batch"),
        calls=("activate_step_by_batch", "draft", "verify", "_draft_extend_for_decode"), hook="step",
    ),
    Need(COUNTS_AND_K, _WORKER + ".apply_runtime_state", ("self", "state"), calls=("override",), hook="switch"),
    Need(COUNTS_AND_K, _SRT + "runtime_context.get_context", called=True),
    Need(COUNTS_AND_K, _SRT + "runtime_context.RuntimeContext", attributes=("_overrides_log",)),
    Need(COUNTS_AND_K, _WORKER + ".__init__", calls=("AdaptiveController",)),
    Need(COUNTS_AND_K, _WORKER, attributes=(
        "adaptive_controller", "speculative_num_steps", "speculative_num_draft_tokens", "topk", "device", "server_args",
        "_target_worker", "_draft_worker",
    )),
    Need(COUNTS_AND_K, _SRT + "managers.tp_worker.TpModelWorker", attributes=("model_runner",)),
    Need(COUNTS_AND_K, _MODEL_RUNNER, attributes=("max_running_requests",)),
    Need(COUNTS_AND_K, _BATCH, attributes=(
        "reqs", "forward_mode", "is_extend_in_batch", "seq_lens_sum", "spec_info", "has_grammar", "return_logprob",
        "return_hidden_states",
    )),
    Need(COUNTS_AND_K, _SRT + "managers.schedule_batch.Req", attributes=(
        "rid", "origin_input_ids", "output_ids", "is_retracted", "finished",
    )),
    Need(COUNTS_AND_K, _SRT + "model_executor.forward_batch_info.ForwardMode", attributes=("is_extend", "is_idle")),
    Need(
        COUNTS_AND_K, _PROCESSOR + "._resolve_spec_v2_tokens", ("self", "result", "batch"),
        calls=("on_verify_complete_cpu",), hook="results",
    ),
    Need(COUNTS_AND_K, _RESULT, attributes=("num_correct_drafts_per_req_cpu",), extensible=True),
    # -- stage times ---------------------------------------------------------------------------------------------------
    Need(STAGE_TIMES, _DRAFT_WORKER + ".draft", ("self", "batch"), hook="draft"),
    Need(STAGE_TIMES, _WORKER + ".verify", ("self", "batch"), hook="verify"),
    Need(
        STAGE_TIMES, _DRAFT_WORKER + "._draft_extend_for_decode", ("self", "batch", "batch_result"), hook="draft_extend",
    ),
    # -- confidences: the draft's logits -------------------------------------------------------------------------------
    Need(
        CONFIDENCES, _DRAFT_WORKER + ".draft_forward", ("self", "forward_batch"), calls=("forward",), hook="draft_forward",
    ),
    Need(CONFIDENCES, _DRAFT_WORKER + "._draft_extend_for_decode", calls=("forward", "execute")),
    Need(CONFIDENCES, _DRAFT_WORKER, attributes=(
        "draft_runner", "speculative_num_steps", "cuda_graph_runner_for_draft_extend",
    )),
    Need(CONFIDENCES, _MODEL_RUNNER, attributes=("forward",), extensible=True),
    Need(CONFIDENCES, _SRT + "model_executor.model_runner.ModelRunnerOutput", attributes=("logits_output",)),
    Need(CONFIDENCES, _SRT + "layers.logits_processor.LogitsProcessorOutput", attributes=("next_token_logits",)),
    Need(CONFIDENCES, _SRT + "model_executor.forward_batch_info.ForwardBatch", attributes=("forward_mode",)),
    Need(
        CONFIDENCES, _SPECULATIVE + "eagle_draft_extend_cuda_graph_runner.EAGLEDraftExtendCudaGraphRunner",
        attributes=("execute",), extensible=True,
    ),
    Need(CONFIDENCES, _RESULT, attributes=("next_draft_input",)),
    Need(CONFIDENCES, _SPECULATIVE + "eagle_info.EagleDraftInput", attributes=("topk_p",)),
    # -- ranks ---------------------------------------------------------------------------------------------------------
    Need(RANKS, _SRT + "runtime_context.ParallelContext", attributes=("tp_group",)),
    Need(RANKS, _SRT + "distributed.parallel_state.GroupCoordinator", attributes=("first_rank",)),
    Need(
        RANKS, _SRT + "managers.scheduler_components.request_receiver.SchedulerRequestReceiver._broadcast_reqs_across_ranks",
        ("self", "recv_reqs"), hook="broadcast",
    ),
    Need(RANKS, _BATCH, attributes=("forward_iter",)),
    # -- dspark --------------------------------------------------------------------------------------------------------
    Need(DSPARK, _DSPARK_WORKER + ".init_cuda_graphs", ("self",), hook="attach"),
    Need(DSPARK, _PLANNER + ".prepare_verify_budget", ("self", "batch"), hook="plan"),
    Need(DSPARK, _DSPARK_WORKER + ".forward_batch_generation", ("self", "batch"), hook="step"),
    Need(DSPARK, _DSPARK + "dspark_draft.DraftBlockProposer.propose", ("self",), ("batch",), hook="draft"),
    Need(DSPARK, _VERIFY + ".run_compact", ("self",), ("batch", "layout"), hook="verify"),
    Need(DSPARK, _VERIFY + ".run_non_compact", ("self",), ("batch",), hook="verify_all"),
    Need(
        DSPARK, _PROCESSOR + "._resolve_spec_v2_tokens", ("self", "result", "batch"), hook="results",
    ),
    Need(DSPARK, _DSPARK_WORKER, attributes=("gamma", "_verify_planner", "device", "server_args", "_target_worker")),
    Need(DSPARK, _SRT + "managers.tp_worker.TpModelWorker", attributes=("model_runner",)),
    Need(DSPARK, _BATCH, attributes=("reqs", "forward_mode", "is_extend_in_batch", "seq_lens_sum", "global_num_tokens")),
    Need(DSPARK, _SRT + "managers.schedule_batch.Req", attributes=(
        "rid", "origin_input_ids", "output_ids", "is_retracted", "finished",
    )),
    Need(DSPARK, _RESULT, attributes=("num_correct_drafts_per_req_cpu", "cap_lens"), extensible=True),
    Need(DSPARK, _PLANNER, attributes=(
        "is_compact_mode", "is_verify_all", "mode_value", "schedules_verify_budget", "_budget_planner", "_confidence_head",
        "model_runner", "_align_verify_tokens_to_graph_tier",
    )),
    Need(DSPARK, _PLANNER + "._budget_from_resolved", ("self",), ("req_pool_indices_cpu",)),
    Need(DSPARK, _PLANNER + ".prepare_verify_budget", calls=("_budget_from_resolved",)),
    Need(DSPARK, _PLANNER + ".compute_budget_sync", calls=("_budget_from_resolved",)),
    Need(DSPARK, _DSPARK + "dspark_planner.VerifyBudgetDecision", keywords=("budget",), called=True),
    Need(DSPARK, _PLANNER + ".set_forced_budget_frac", ("self", "frac"), called=True),
    Need(DSPARK, _DSPARK + "dspark_planner.HostConfidenceBudgetPlanner", attributes=(
        "sps_table", "forced_budget_frac", "last_decision",
    )),
    Need(DSPARK, _SRT + "models.dspark.DSparkConfidenceHead", attributes=("sts_temperatures",)),
    Need(DSPARK, _DSPARK + "dspark_draft.DraftProposal", attributes=("confidence_raw",)),
    Need(DSPARK, _VERIFY, attributes=("model_runner",)),
    Need(DSPARK, _DSPARK + "dspark_verify.TargetVerifyResult", attributes=("can_run_cuda_graph",)),
    Need(DSPARK, _SPECULATIVE + "ragged_verify.RaggedVerifyLayout", attributes=("graph_num_tokens",)),
    Need(DSPARK, _MODEL_RUNNER, attributes=("decode_cuda_graph_runner", "max_running_requests")),
    Need(
        DSPARK, _SRT + "model_executor.runner.DecodeCudaGraphRunner",
        attributes=("ragged_verify_mode", "capture_bs", "capture_num_tokens"),
    ),
    Need(DSPARK, _DSPARK + "dspark_sps.SpsAdditiveCostTable", keywords=(
        "bias_seconds", "bs_probes", "alpha_seconds", "m_probes", "theta_seconds",
    ), called=True),
    Need(DSPARK, _DSPARK + "dspark_sts.DSparkStsCalibration", keywords=("temperatures",), called=True),
    Need(DSPARK, _SPECULATIVE + "spec_info.SpeculativeAlgorithm", attributes=("DSPARK", "get_platform_worker_cls")),
    # -- ngram ---------------------------------------------------------------------------------------------------------
    Need(NGRAM, _NGRAM + ".init_cuda_graphs", ("self",), hook="attach"),
    Need(NGRAM, _NGRAM + ".forward_batch_generation", ("self", "batch"), hook="step"),
    Need(NGRAM, _PROCESSOR + "._resolve_spec_v2_tokens", ("self", "result", "batch"), hook="results"),
    Need(NGRAM, _NGRAM, attributes=("speculative_num_draft_tokens", "device", "server_args", "_target_worker")),
    *(Need(NGRAM, path, attributes=names, extensible=extensible) for path, names, extensible in _WATCHED),
    # -- multi-layer ---------------------------------------------------------------------------------------------------
    Need(MULTI_LAYER, _MULTI_LAYER + ".init_cuda_graphs", ("self",), hook="attach"),
    Need(MULTI_LAYER, _MULTI_LAYER + ".forward_batch_generation", ("self", "batch"), hook="step"),
    Need(MULTI_LAYER, _PROCESSOR + "._resolve_spec_v2_tokens", ("self", "result", "batch"), hook="results"),
    Need(MULTI_LAYER, _MULTI_LAYER, attributes=(
        "speculative_num_steps", "speculative_num_draft_tokens", "device", "server_args", "_target_worker",
    )),
    *(Need(MULTI_LAYER, path, attributes=names, extensible=extensible) for path, names, extensible in _WATCHED),
    # -- no speculation ------------------------------------------------------------------------------------------------
    Need(PLAIN, _SRT + "managers.scheduler.Scheduler.maybe_init_draft_worker", ("self",), hook="scheduler"),
    Need(PLAIN, _SRT + "managers.scheduler.Scheduler", attributes=("spec_algorithm", "server_args")),
    Need(PLAIN, _SPECULATIVE + "spec_info.SpeculativeAlgorithm", attributes=("is_none",)),
    Need(PLAIN, _PLAIN + ".init_cuda_graphs", ("self",), hook="attach"),
    Need(PLAIN, _PLAIN + ".forward_batch_generation", ("self", "batch"), hook="step"),
    Need(PLAIN, _PLAIN, attributes=("model_runner", "device", "server_args")),
    *(Need(PLAIN, path, attributes=names, extensible=extensible) for path, names, extensible in _WATCHED),
)  # fmt: skip


def needs_of(groups: Iterable[str]) -> tuple[Need, ...]:
    """The needs of some groups, in the order of the table. Raises KeyError for an unknown group."""
    wanted = set(groups)
    if not wanted <= set(GROUPS):
        raise KeyError(", ".join(sorted(wanted - set(GROUPS))))
    return tuple(need for need in NEEDS if need.group in wanted)


def hooks_of(group: str) -> tuple[Need, ...]:
    """The hooks of one group, in the order of the table: `need.hook` names the hook, `need.path` is its target."""
    return tuple(need for need in needs_of((group,)) if need.hook)
