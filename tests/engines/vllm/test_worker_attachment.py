"""The worker's hooks on stand-ins of vLLM's runner and proposer; `test_in_process` has the real ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adaptive_spec.engines.common.hook_guard import FAILURES_IN_A_ROW, Guard
from adaptive_spec.engines.common.plugin_settings import PluginSettings
from adaptive_spec.engines.vllm import contract
from adaptive_spec.engines.vllm.step_notes import NOTES_ATTRIBUTE, STEP_ATTRIBUTE
from adaptive_spec.engines.vllm.worker_attachment import WorkerAttachment

RUNNER = SimpleNamespace(device=torch.device("cpu"), input_batch=SimpleNamespace(req_ids=["r0", "r1"]))
LOGITS = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 5.0]])


class Proposer:
    use_local_argmax_reduction = use_heterogeneous_vocab = False
    model = SimpleNamespace(compute_logits=lambda hidden: hidden)


def original(proposer: object, hidden: torch.Tensor) -> torch.Tensor:
    return hidden.argmax(dim=-1)


def one_step(attachment: WorkerAttachment, number: int, proposer: object, draft_tokens: int = 2) -> dict[str, Any]:
    """A step that drafts `draft_tokens` for both requests; returns the notes on its output."""
    output, result = SimpleNamespace(**{STEP_ATTRIBUTE: number}), SimpleNamespace(sampled_token_ids=[[1], [2]])
    attachment.execute_after(attachment.execute_before(RUNNER, output), None)
    sampling = attachment.sample_before(RUNNER)
    drafting = attachment.draft_before(RUNNER)
    for _ in range(draft_tokens):
        assert attachment.greedy(original, proposer, LOGITS).tolist() == [0, 2]
    attachment.draft_after(drafting, None, RUNNER)
    attachment.sample_after(sampling, result)
    [note] = getattr(result, NOTES_ATTRIBUTE)
    return dict(note)


def test_a_step_is_noted_with_its_times_and_confidences() -> None:
    attachment = WorkerAttachment(PluginSettings(mode="active"), Guard("vLLM", ""))
    note = one_step(attachment, 7, Proposer())
    expected = torch.softmax(LOGITS, dim=-1).amax(dim=-1).tolist()
    assert note["step"] == 7
    assert note["verify"] > 0.0
    assert note["draft"] > 0.0
    assert note["confidences"] == {r: pytest.approx([p, p]) for r, p in zip(["r0", "r1"], expected, strict=True)}
    assert "failures" not in note


@pytest.mark.parametrize("proposer", [SimpleNamespace(), SimpleNamespace(use_local_argmax_reduction=False)])
def test_a_proposer_of_another_kind_ends_the_confidences_alone(proposer: object) -> None:
    guard = Guard("vLLM", "")
    attachment = WorkerAttachment(PluginSettings(mode="active"), guard)
    notes = [one_step(attachment, number, proposer) for number in range(FAILURES_IN_A_ROW)]
    assert all("confidences" not in note for note in notes)
    assert set(guard.lost) == {contract.CONFIDENCES}
    assert guard.closed is None
    assert notes[-1]["verify"] > 0.0
    assert any(contract.CONFIDENCES in note.get("lost", ()) for note in notes), "EngineCore is told"


def test_a_proposer_that_never_has_whole_logits_is_left_alone() -> None:
    guard = Guard("vLLM", "")
    attachment = WorkerAttachment(PluginSettings(mode="active"), guard)
    proposer = SimpleNamespace(use_local_argmax_reduction=True, use_heterogeneous_vocab=False)
    assert "confidences" not in one_step(attachment, 1, proposer)
    assert (guard.failures, guard.lost) == ({}, {})


def test_a_step_that_the_scheduler_did_not_number_is_not_measured() -> None:
    attachment = WorkerAttachment(PluginSettings(mode="active"), Guard("vLLM", ""))
    result = SimpleNamespace(sampled_token_ids=[])
    assert attachment.execute_before(RUNNER, SimpleNamespace()) is None
    attachment.sample_after(attachment.sample_before(RUNNER), result)
    assert not hasattr(result, NOTES_ATTRIBUTE)
