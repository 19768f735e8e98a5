"""Run in the environment that has SGLang: which servers are refused, and its own classes under the hooks of watched servers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.scheduler_components.batch_result_processor import SchedulerBatchResultProcessor
from sglang.srt.managers.tp_worker import TpModelWorker
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.speculative.base_spec_worker import BaseSpecWorker
from sglang.srt.speculative.multi_layer_eagle_worker_v2 import MultiLayerEagleWorkerV2
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from sglang.srt.speculative.spec_registry import _REGISTRY

from adaptive_spec.domain.step_record import StepFlag
from adaptive_spec.engine_side.tap import RING_NAME
from adaptive_spec.engines.common.hook_guard import Guard
from adaptive_spec.engines.common.plugin_settings import PluginSettings
from adaptive_spec.engines.sglang import plugin
from adaptive_spec.engines.sglang.attachment import Place
from adaptive_spec.engines.sglang.supported_servers import refusal, unsupported_reason
from adaptive_spec.engines.sglang.watched_attachment import (
    MultiLayerAttachment,
    OtherPluginAttachment,
    PlainAttachment,
    WatchedAttachment,
)
from adaptive_spec.wire.engine_report import read_report
from adaptive_spec.wire.ring import RingReader

K, ROWS = 3, 2
SERVER_ARGS = {
    "speculative_algorithm": "EAGLE", "device": "cuda", "disaggregation_mode": "null", "pp_size": 1, "dp_size": 1,
    "attn_dp_size": 1, "ep_join_mode": None, "enable_two_batch_overlap": False, "enable_pdmux": False,
    "speculative_num_steps": K, "speculative_num_draft_tokens": K + 1, "speculative_eagle_topk": 1,
    "enable_multi_layer_eagle": False, "speculative_use_rejection_sampling": False, "speculative_adaptive": True, "port": 1,
}  # fmt: skip


def server_args(**changes: Any) -> Any:
    return SimpleNamespace(**{**SERVER_ARGS, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"disaggregation_mode": "prefill"}, "disaggregation_mode=prefill is not supported"),
        ({"device": "npu"}, "device=npu is not supported (must be cpu or cuda"),
        ({"device": "xpu:0"}, "device=xpu:0 is not supported"),
        ({"pp_size": 2}, "pp_size=2 is not supported"),
        ({"enable_pdmux": True}, "enable_pdmux=True is not supported"),
        ({"enable_two_batch_overlap": True}, "enable_two_batch_overlap=True is not supported"),
        ({"speculative_algorithm": "DFLASH"}, "speculative_algorithm=DFLASH is not supported"),
        ({"speculative_algorithm": "FROZEN_KV_MTP"}, "speculative_algorithm=FROZEN_KV_MTP is not supported"),
        ({"speculative_num_steps": 33}, "33 draft tokens per request"),
        ({"speculative_algorithm": "NGRAM", "speculative_num_draft_tokens": 34}, "33 draft tokens per request"),
        ({"speculative_use_rejection_sampling": True}, "speculative_use_rejection_sampling=True"),
    ],
)
def test_servers_that_are_left_alone(changes: dict[str, Any], words: str) -> None:
    assert refusal(server_args()) is None
    reason = refusal(server_args(**changes))
    assert reason is not None
    assert words in reason
    assert unsupported_reason(server_args(**changes)) is not None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"speculative_algorithm": "STANDALONE"}, "speculative_algorithm=STANDALONE"),
        ({"speculative_algorithm": "NGRAM"}, "speculative_algorithm=NGRAM"),
        ({"speculative_eagle_topk": 4}, "speculative_eagle_topk=4"),
        ({"attn_dp_size": 2}, "attention DP is not supported"),
        ({"enable_multi_layer_eagle": True}, "enable_multi_layer_eagle=True"),
        ({"speculative_adaptive": False}, "speculative_adaptive=False"),
        ({"disaggregation_mode": "decode", "speculative_adaptive": False}, "speculative_adaptive=False"),
    ],
)
def test_servers_that_are_observed(changes: dict[str, Any], words: str) -> None:
    assert refusal(server_args(**changes)) is None
    assert words in (unsupported_reason(server_args(**changes)) or "")


def test_replicas_are_supported() -> None:
    assert unsupported_reason(server_args(dp_size=2)) is None


@pytest.fixture(autouse=True)
def hooks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The registry empty before and after, and every hooked function restored."""
    for owner, name in (
        (TpModelWorker, "forward_batch_generation"), (TpModelWorker, "init_cuda_graphs"),
        (MultiLayerEagleWorkerV2, "forward_batch_generation"), (SchedulerBatchResultProcessor, "_resolve_spec_v2_tokens"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, owner.__dict__[name])
    monkeypatch.setattr(MultiLayerEagleWorkerV2, "init_cuda_graphs", BaseSpecWorker.init_cuda_graphs)
    HookRegistry.reset()
    yield
    HookRegistry.reset()


def attached(kind: type[WatchedAttachment], folder: Path, worker: Any, worker_class: Any, algorithm: Any) -> WatchedAttachment:
    """The attachment of a server with everything of it hooked by SGLang's registry, attached to a worker."""
    guard = Guard("SGLang", "")
    made = plugin._attachment(PluginSettings("active", folder), guard, "sglang test", worker_class, algorithm)
    assert type(made) is kind
    made._place = lambda: Place(0, 1)  # type: ignore[method-assign]  # no SGLang process groups here
    name = None if algorithm.is_none() else algorithm.name
    plugin.attach(made, guard, "sglang test", worker_class, algorithm, server_args(speculative_algorithm=name))
    assert guard.closed is None, guard.closed
    worker.init_cuda_graphs()
    assert isinstance(made, WatchedAttachment)
    return made


def batch(mode: Any = ForwardMode.DECODE, **fields: Any) -> Any:
    requests = [SimpleNamespace(rid=f"r{i}", is_retracted=False, finished=lambda: False) for i in range(ROWS)]
    return SimpleNamespace(**{
        "reqs": requests, "forward_mode": mode, "is_extend_in_batch": False, "seq_lens_sum": 40, "spec_info": object(),
        "has_grammar": False, "return_logprob": False, **fields,
    })  # fmt: skip


class MultiLayer(MultiLayerEagleWorkerV2):  # type: ignore[misc]  # SGLang has no types here
    """SGLang's own step, with draft and verify replaced."""

    speculative_num_steps, speculative_num_draft_tokens, topk, device = K, K + 1, 1, "cpu"
    server_args = SimpleNamespace(model_path="/m/x")

    def __init__(self, runner: Any) -> None:
        self._target_worker = SimpleNamespace(model_runner=runner)
        self._draft_worker = SimpleNamespace(
            draft=lambda batch: SimpleNamespace(is_verify_input=lambda: True, kv_loc_plan=None), last_draft_extend_staged=False,
            _draft_extend_plan_for_decode=lambda batch: False, _draft_extend_for_decode=lambda *_, **__: None,
            init_cuda_graphs=lambda: None,
        )  # fmt: skip

    @property
    def draft_worker(self) -> Any:
        return self._draft_worker

    def verify(self, batch: Any, grammar_barrier: Any = None) -> Any:
        return GenerationBatchResult(num_correct_drafts_per_req_cpu=[2, 0])


def test_multi_layer_eagle(tmp_path: Path) -> None:
    runner = SimpleNamespace(max_running_requests=4, decode_cuda_graph_runner=SimpleNamespace(capture_bs=[1, 4]))
    worker = MultiLayer(runner)
    side = attached(MultiLayerAttachment, tmp_path, worker, MultiLayerEagleWorkerV2, SpeculativeAlgorithm.EAGLE)
    assert hasattr(SchedulerBatchResultProcessor._resolve_spec_v2_tokens, "__wrapped__"), "results are hooked"
    with RingReader.open(tmp_path / RING_NAME) as ring:
        for grammar in (False, True):
            one = batch(has_grammar=grammar)
            result = worker.forward_batch_generation(one)
            side.results_after(side.results_before(None, result, one), None, None, result, one)
        first, second = ring.poll(8)
    assert (first.k, first.num_tokens, first.padded_tokens, first.kv_tokens) == (K, ROWS * (K + 1), 4 * (K + 1), 40)
    assert first.accept_len.tolist() == [2, 0]
    assert first.verify_len.tolist() == [K, K]
    assert first.flags == StepFlag.WHOLE
    assert second.flags == StepFlag.WHOLE | StepFlag.DISTURBED
    report = read_report(tmp_path)
    assert report is not None
    assert (report.state, report.level) == ("observing", 1)
    assert not side._guard.failures


class Plain(TpModelWorker):  # type: ignore[misc]  # SGLang has no types here
    device = "cpu"
    server_args = SimpleNamespace(model_path="/m/x")

    def __init__(self, runner: Any) -> None:
        self._model_runner = runner

    @property
    def model_runner(self) -> Any:
        return self._model_runner


def test_no_speculation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TpModelWorker, "forward_batch_generation", lambda worker, batch, *_, **__: GenerationBatchResult())
    monkeypatch.setattr(TpModelWorker, "init_cuda_graphs", lambda worker: None)
    worker = Plain(SimpleNamespace(max_running_requests=4))
    side = attached(PlainAttachment, tmp_path, worker, None, SpeculativeAlgorithm.NONE)
    with RingReader.open(tmp_path / RING_NAME) as ring:
        worker.forward_batch_generation(batch())
        worker.forward_batch_generation(batch(mode=ForwardMode.EXTEND))
        worker.forward_batch_generation(None)
        [record] = ring.poll(8)
    assert (record.k, record.num_tokens, record.padded_tokens, record.output_tokens) == (0, ROWS, ROWS, ROWS)
    assert record.flags == StepFlag.WHOLE
    report = read_report(tmp_path)
    assert report is not None
    assert (report.state, report.reason) == ("observing", "the server runs without speculation")
    assert not side._guard.failures


def test_the_algorithm_of_another_plugin_is_refused(tmp_path: Path) -> None:
    SpeculativeAlgorithm.register("OF_ANOTHER", supports_overlap=True)(lambda server_args: object)
    try:
        algorithm = SpeculativeAlgorithm.from_string("of_another")
        guard = Guard("SGLang", "")
        side = plugin._attachment(PluginSettings("active", tmp_path), guard, "sglang test", None, algorithm)
        assert isinstance(side, OtherPluginAttachment)
        plugin.attach(side, guard, "sglang test", None, algorithm, server_args())
    finally:
        _REGISTRY.pop("OF_ANOTHER")
    report = read_report(tmp_path)
    assert report is not None
    assert report.state == "refused"
    assert report.reason == "speculative_algorithm=OF_ANOTHER is another plugin's (only SGLang's own algorithms are supported)"
    assert not HookRegistry._hooks, "nothing of it is hooked"
