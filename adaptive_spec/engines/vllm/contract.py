"""All that the plugin uses of vLLM, in one table: `NEEDS`.

Read by `make vllm-matrix` for the wheels of several releases, by `doctor` and by the plugin before it hooks anything. This module
imports the standard library alone, and nothing of vLLM. A name of vLLM that the plugin uses must be listed here.

Groups, each with what is lost without it:

| group | lost without it |
|---|---|
| observe | everything: whether and how the server speculates is not known |
| counts and K | accepted counts per step, the choice of K and of verify lengths |
| stage times | draft and verify time: only whole steps are timed |
| confidences | the draft's confidences: acceptance is learnt from counts, lengths are chosen from each request's history |
| adaptive verification | where vLLM's own adaptive verification is on (DSpark, V2 model runner): replacing its step times, and |
| | how many tokens it verified |
"""

from __future__ import annotations

from collections.abc import Iterable

from adaptive_spec.engines.static_contract import Need

OBSERVE = "observe"
COUNTS_AND_K = "counts and K"
STAGE_TIMES = "stage times"
CONFIDENCES = "confidences"
ADAPTIVE_VERIFICATION = "adaptive verification"

LEVELS = (OBSERVE, COUNTS_AND_K, STAGE_TIMES, CONFIDENCES)
"""Level 0 to 3: each needs those before it."""
GROUPS = (*LEVELS, ADAPTIVE_VERIFICATION)

SUPPORTED_RELEASES = {"0.31.0": GROUPS, "0.32.0": GROUPS}
"""Releases the plugin hooks into, oldest first, and the groups that must be met there. A release is added when the CPU kit has
run it; the static contract alone is not enough."""
CHECKED_RELEASES: tuple[str, ...] = ("0.28.0", "0.29.0", "0.30.0", "0.33.0")
"""Releases the matrix checks as well, without failing."""

_SCHEDULER = "vllm.v1.core.sched.scheduler.Scheduler"
_OUTPUT = "vllm.v1.core.sched.output.SchedulerOutput"
_REQUEST = "vllm.v1.request.Request"
_RUNNER = "vllm.v1.worker.gpu_model_runner.GPUModelRunner"
_PROPOSER = "vllm.v1.spec_decode.llm_base_proposer.SpecDecodeBaseProposer"
_RESULT = "vllm.v1.outputs.ModelRunnerOutput"
_V2 = "vllm.v1.worker.gpu."
_VERIFICATION = _V2 + "spec_decode.adaptive_verification.AdaptiveVerificationManager"

NEEDS = (
    # -- observe: vLLM's plugin seam, and its configuration -------------------------------------------------------------
    Need(OBSERVE, "vllm.plugins.load_general_plugins", calls=("load_plugins_by_group",)),
    Need(
        OBSERVE, "vllm.v1.worker.worker_base.WorkerWrapperBase.init_worker", calls=("load_general_plugins",), hook="init_worker",
    ),
    Need(OBSERVE, _SCHEDULER + ".__init__", ("self", "vllm_config"), hook="attach"),
    Need(OBSERVE, "vllm.config.vllm.VllmConfig", attributes=(
        "speculative_config", "parallel_config", "scheduler_config", "model_config", "device_config", "compilation_config",
        "use_v2_model_runner",
    )),
    Need(OBSERVE, "vllm.config.parallel.ParallelConfig", attributes=(
        "data_parallel_size", "data_parallel_index", "tensor_parallel_size",
    )),
    Need(OBSERVE, "vllm.config.scheduler.SchedulerConfig", attributes=("max_num_seqs",)),
    Need(OBSERVE, "vllm.config.model.ModelConfig", attributes=("model", "enforce_eager")),
    Need(OBSERVE, "vllm.config.device.DeviceConfig", attributes=("device_type",)),
    Need(OBSERVE, "vllm.config.compilation.CompilationConfig", attributes=("cudagraph_capture_sizes",)),
    Need(OBSERVE, "vllm.config.speculative.SpeculativeConfig", attributes=(
        "num_speculative_tokens", "num_speculative_tokens_per_batch_size",
    )),
    # -- counts and K: the schedule, the drafts of each request, the outputs -------------------------------------------
    Need(COUNTS_AND_K, _SCHEDULER + ".schedule", ("self",), hook="schedule"),
    Need(
        COUNTS_AND_K, _SCHEDULER + ".update_from_output", ("self", "scheduler_output", "model_runner_output"), hook="results",
    ),
    Need(COUNTS_AND_K, _SCHEDULER, attributes=(
        "vllm_config", "dynamic_sd_lookup", "num_spec_tokens", "running", "waiting", "requests",
    )),
    Need(COUNTS_AND_K, _REQUEST, attributes=(
        "request_id", "spec_token_ids", "is_prefill_chunk", "num_computed_tokens", "sampling_params", "use_structured_output",
        "is_finished",
    )),
    Need(COUNTS_AND_K, "vllm.sampling_params.SamplingParams", attributes=("logprobs", "prompt_logprobs")),
    Need(COUNTS_AND_K, _OUTPUT, attributes=(
        "num_scheduled_tokens", "total_num_scheduled_tokens", "scheduled_spec_decode_tokens", "num_spec_tokens_to_schedule",
        "preempted_req_ids",
    ), extensible=True),
    Need(COUNTS_AND_K, _RESULT, attributes=("req_id_to_index", "sampled_token_ids", "cudagraph_stats"), extensible=True),
    Need(COUNTS_AND_K, "vllm.compilation.cuda_graph.CUDAGraphStat", attributes=("num_padded_tokens",)),
    # -- stage times ---------------------------------------------------------------------------------------------------
    Need(STAGE_TIMES, _RUNNER + ".execute_model", ("self", "scheduler_output"), hook="execute"),
    Need(STAGE_TIMES, _RUNNER + ".sample_tokens", ("self",), hook="sample"),
    Need(STAGE_TIMES, _RUNNER + ".propose_draft_token_ids", ("self", "scheduler_output"), hook="draft"),
    Need(STAGE_TIMES, _RUNNER, attributes=("device", "input_batch")),
    Need(STAGE_TIMES, "vllm.v1.worker.gpu_input_batch.InputBatch", attributes=("req_ids",)),
    # -- confidences: the draft's logits -------------------------------------------------------------------------------
    Need(CONFIDENCES, _PROPOSER + "._greedy_sample", ("self", "hidden_states"), calls=("compute_logits",), hook="greedy"),
    Need(CONFIDENCES, _PROPOSER, attributes=("use_local_argmax_reduction", "use_heterogeneous_vocab", "model")),
    # -- adaptive verification -----------------------------------------------------------------------------------------
    Need(
        ADAPTIVE_VERIFICATION, "vllm.v1.worker.gpu_worker.Worker.execute_model", ("self", "scheduler_output"), hook="curves",
    ),
    Need(ADAPTIVE_VERIFICATION, "vllm.v1.worker.gpu_worker.Worker.sample_tokens", ("self",), hook="outcome"),
    Need(ADAPTIVE_VERIFICATION, "vllm.v1.worker.gpu_worker.Worker", attributes=("model_runner",)),
    Need(ADAPTIVE_VERIFICATION, _V2 + "model_runner.GPUModelRunner", attributes=("adaptive_verification",)),
    Need(
        ADAPTIVE_VERIFICATION,
        _VERIFICATION + ".set_cost_curves",
        ("self", "draft_curve", "verify_curve"), called=True,
    ),
    Need(ADAPTIVE_VERIFICATION, _VERIFICATION + ".get_num_tokens", ("self",), hook="budget"),
    Need(ADAPTIVE_VERIFICATION, _VERIFICATION, attributes=("cost_tables",)),
    Need(ADAPTIVE_VERIFICATION, _V2 + "async_utils.AsyncOutput", attributes=("model_runner_output",)),
    Need(ADAPTIVE_VERIFICATION, "vllm.config.speculative.SpeculativeConfig", attributes=("enable_adaptive_verification",)),
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
