"""A stand-in of vLLM's scheduler with what the plugin uses of it: requests, a schedule, drafts, results of steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from adaptive_spec.engines.common.hook_guard import Guard
from adaptive_spec.engines.common.plugin_settings import PluginSettings
from adaptive_spec.engines.vllm.scheduler_attachment import SchedulerAttachment
from adaptive_spec.engines.vllm.step_notes import NOTES_ATTRIBUTE, STEP_ATTRIBUTE

K = 5


@dataclass(eq=False)
class Request:
    request_id: str
    spec_token_ids: list[int] = field(default_factory=list)
    is_prefill_chunk: bool = False
    num_computed_tokens: int = 10
    sampling_params: Any = None
    use_structured_output: bool = False
    finished: bool = False

    def is_finished(self) -> bool:
        return self.finished


class Output:
    """vLLM's SchedulerOutput."""

    def __init__(self, tokens: dict[str, int], drafts: dict[str, list[int]], k: int) -> None:
        self.num_scheduled_tokens, self.scheduled_spec_decode_tokens = tokens, drafts
        self.total_num_scheduled_tokens, self.num_spec_tokens_to_schedule = sum(tokens.values()), k
        self.preempted_req_ids: set[str] | None = None


class Result:
    """vLLM's ModelRunnerOutput."""

    def __init__(self, sampled: dict[str, list[int]]) -> None:
        self.req_id_to_index = {request: row for row, request in enumerate(sampled)}
        self.sampled_token_ids = list(sampled.values())
        self.cudagraph_stats = None


def config(**changes: Any) -> Any:
    whole = {
        "speculative_config": SimpleNamespace(num_speculative_tokens=K, enable_adaptive_verification=False),
        "parallel_config": SimpleNamespace(data_parallel_size=1, data_parallel_index=0, tensor_parallel_size=1),
        "scheduler_config": SimpleNamespace(max_num_seqs=8),
        "model_config": SimpleNamespace(model="/models/tiny", enforce_eager=True),
        "device_config": SimpleNamespace(device_type="cpu"),
        "compilation_config": SimpleNamespace(cudagraph_capture_sizes=[]),
        "use_v2_model_runner": False,
    }
    return SimpleNamespace(**{**whole, **changes})


class Scheduler:
    """Runs steps as vLLM's scheduler does: K of the list, by the number of scheduled requests; drafts of the step before."""

    def __init__(self, requests: list[Request], lookup: list[int] | None = None, **changes: Any) -> None:
        self.vllm_config = config(**changes)
        self.dynamic_sd_lookup = [0, 5, 5, 5, 4, 3, 2, 1, 0] if lookup is None else lookup
        self.num_spec_tokens = K
        self.running, self.waiting = requests, list[Request]()
        self.requests = {request.request_id: request for request in requests}

    def schedule(self) -> Output:
        tokens = {r.request_id: len(r.spec_token_ids) + 1 if not r.is_prefill_chunk else 8 for r in self.running}
        drafts = {r.request_id: r.spec_token_ids for r in self.running if r.spec_token_ids}
        for request in self.running:
            request.spec_token_ids = []
            request.num_computed_tokens += tokens[request.request_id]
        return Output(tokens, drafts, self.dynamic_sd_lookup[len(tokens)] if self.dynamic_sd_lookup else K)


class Engine:
    """Plugin and stand-in: `step` runs one whole step. asynchronous: the next schedule comes before the results."""

    def __init__(self, settings: PluginSettings, scheduler: Scheduler, guard: Guard | None = None) -> None:
        self.guard = guard or Guard("vLLM", "")
        self.scheduler, self.attachment = scheduler, SchedulerAttachment(settings, self.guard, "vllm 0.32.0")
        self.attach = self.guard.around("attach", None, self.attachment.attach_after)
        self.attach(lambda scheduler: None, scheduler)
        self._schedule = self.guard.around("schedule", self.attachment.schedule_before, self.attachment.schedule_after)
        self._update = self.guard.around("results", self.attachment.results_before, None)
        self.confidences: dict[str, float] = {}
        """Confidence of every draft token of a request."""
        self.accepts: dict[str, int] = {}
        """Draft tokens that the target would accept; 0 for others."""
        self.drafts = True
        self.trims: int | None = None
        """Tokens that vLLM's own adaptive verification verifies in a step."""

    def schedule(self) -> Output:
        output: Output = self._schedule(lambda s: s.schedule(), self.scheduler)
        return output

    def result(self, output: Output, noted: bool = True) -> None:
        sampled = {
            r: [7] * (1 + min(len(output.scheduled_spec_decode_tokens.get(r, ())), self.accepts.get(r, 0)))
            for r in output.num_scheduled_tokens
        }
        result = Result(sampled)
        if noted and STEP_ATTRIBUTE in output.__dict__:
            note: dict[str, Any] = {"step": output.__dict__[STEP_ATTRIBUTE], "verify": 0.004}
            if self.drafts:
                width = output.num_spec_tokens_to_schedule
                note["draft"] = 0.001 * width
                note["confidences"] = {r: [self.confidences.get(r, 0.5)] * width for r in sampled}
            result.__dict__[NOTES_ATTRIBUTE] = [note] if self.trims is None else [{"step": note["step"], "tokens": self.trims}]
        self._update(lambda s, o, m: None, self.scheduler, output, result)

    def draft(self, output: Output, placeholder: bool = False) -> None:
        """The drafts of a step reach the requests; placeholder: one list shared by all, as under asynchronous scheduling."""
        width = output.num_spec_tokens_to_schedule if self.drafts else K
        shared = [-1] * width
        for request in self.scheduler.running:
            if not request.is_prefill_chunk:
                request.spec_token_ids = shared if placeholder else [3] * width

    def step(self, noted: bool = True) -> Output:
        output = self.schedule()
        self.result(output, noted)
        self.draft(output)
        return output
