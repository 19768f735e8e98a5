"""The plugin in a real vLLM, in one process: exact outputs while K and every request's verify length change at random."""

from __future__ import annotations

import os
import subprocess
from typing import Any

import pytest

from adaptive_spec.engines.vllm.cpu_kit import CpuKit
from tests.engines.vllm.kit import PATIENCE_S, agrees, in_process

PREEMPTING = {"num_gpu_blocks_override": 18, "block_size": 32}
"""Fewer blocks than the requests need together."""
CHUNKED = {"enable_prefix_caching": True, "enable_chunked_prefill": True, "max_num_batched_tokens": 72}
quick = pytest.mark.skipif(
    not CpuKit().installed and "CI" in os.environ, reason="the vLLM kit is not installed here; make nightly installs it"
)


@quick
@pytest.mark.server
@pytest.mark.parametrize("scheduling", ["sync", pytest.param("async", marks=pytest.mark.nightly)])
def test_outputs_are_exact_under_random_k_and_random_lengths_with_preemptions(vllm_kit: CpuKit, scheduling: str) -> None:
    found = in_process(vllm_kit, method="eagle", engine=PREEMPTING, **{"async": scheduling == "async"})
    agrees(found)
    assert found["scheduler"] == ("AsyncScheduler" if scheduling == "async" else "Scheduler")
    assert found["vllm"]["vllm:num_preemptions"] > 0
    assert len(found["k"]) == 6, "every K ran"
    assert found["ragged"] > 0, "verify lengths differed inside a batch"
    assert found["fallback"] == 0
    assert found["state"] == "attached"
    assert found["level"] == 3
    assert found["failures"] == {}
    # The confidences belong to the drafts they are recorded with: matched with another step's they would say nothing.
    assert found["sure_accepted"] > 0.97
    assert found["unsure_accepted"] < 0.8
    assert found["confidences"] > 0.9 * found["draft_tokens"]


@pytest.mark.nightly
@pytest.mark.server
@pytest.mark.parametrize("method", ["eagle3", "draft_model", "ngram"])
def test_other_kinds_of_drafts(vllm_kit: CpuKit, method: str) -> None:
    found = in_process(vllm_kit, method=method)
    agrees(found)
    assert len(found["k"]) == 6
    assert (found["confidences"] > 0) == (method != "ngram")


@pytest.mark.nightly
@pytest.mark.server
def test_chunked_prefills_beside_decodes_are_disturbed_and_prefixes_may_be_cached(vllm_kit: CpuKit) -> None:
    found = in_process(vllm_kit, method="eagle", engine=CHUNKED)
    agrees(found)
    assert found["disturbed"] > 0


@pytest.mark.nightly
@pytest.mark.server
@pytest.mark.parametrize("scheduling", ["sync", "async"])
def test_zeros_that_are_drafted_near_max_model_len_are_censored(vllm_kit: CpuKit, scheduling: str) -> None:
    found = in_process(vllm_kit, method="eagle", engine={"max_model_len": 64}, **{"async": scheduling == "async"})
    assert found["exact"] == found["requests"]
    assert found["invalid"] == []
    assert found["censored"] > 0


@pytest.mark.nightly
@pytest.mark.server
def test_without_a_sidecar_the_launch_schedule_decides(vllm_kit: CpuKit) -> None:
    found = in_process(vllm_kit, method="eagle", policy="keep")
    agrees(found)
    assert found["fallback"] == found["records"]
    assert found["lookup"][1:] == [5, 5, 5, 4, 3, 2, 1, 0]


@pytest.mark.nightly
@pytest.mark.server
@pytest.mark.parametrize("sampling", [{"logprobs": 2}, {"structured_outputs": {"choice": ["a0 a1", "b5 b6"]}}])
def test_log_probabilities_and_structured_output_disturb(vllm_kit: CpuKit, sampling: dict[str, Any]) -> None:
    found = in_process(vllm_kit, method="eagle", sampling=sampling, requests=6)
    assert found["records"] > 0
    assert found["disturbed"] == found["records"]
    assert found["invalid"] == []


@pytest.mark.nightly
@pytest.mark.server
def test_lora(vllm_kit: CpuKit) -> None:
    """With a stand-alone draft: with EAGLE vLLM's LoRA for the CPU fails, without the plugin too."""
    agrees(in_process(vllm_kit, method="draft_model", lora=True))


@pytest.mark.nightly
@pytest.mark.server
@pytest.mark.parametrize(
    ("faults", "state", "level"),
    [
        ("greedy", "attached", 2),
        ("execute", "attached", 1),
        ("schedule:3,results:3,lengths:3", "attached", 3),
        ("results", "detached", 0),
    ],
)
def test_a_failing_hook_never_reaches_vllm(vllm_kit: CpuKit, faults: str, state: str, level: int) -> None:
    found = in_process(vllm_kit, method="eagle", faults=faults)
    assert found["exact"] == found["requests"]
    assert (found["state"], found["level"]) == (state, level)
    if state == "detached":
        assert found["lookup"][1:] == [5, 5, 5, 4, 3, 2, 1, 0], "the launch schedule is back"


@pytest.mark.nightly
@pytest.mark.server
def test_step_times_reach_vllms_own_adaptive_verification(vllm_kit: CpuKit) -> None:
    command = vllm_kit.command("python", "-m", "tests.engines.vllm.adaptive_verification_checks")
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-3000:]
