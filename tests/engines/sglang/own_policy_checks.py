"""Run in the environment that has SGLang: its own adaptive policy behind the plugin's, without a server."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from sglang.srt.speculative.adaptive_spec_params import AdaptiveSpeculativeParams

from adaptive_spec.engines.sglang.eagle_draft_policy import SidecarDraftPolicy
from tests.engines.sglang.slots import DEFAULT, GAPS

LAUNCH_K = 3


@pytest.mark.parametrize("graphs", [None, [1, 2, 4, 8, 16, 32, 64, 128], [4, 12, 24]])
@pytest.mark.parametrize("ranges", [DEFAULT, GAPS])
def test_allowed_k_are_those_of_sglangs_slots(tmp_path: Path, ranges: dict[int, list[int]], graphs: list[int] | None) -> None:
    path = None
    if ranges is not DEFAULT:
        path = tmp_path / "ranges.json"
        path.write_text(json.dumps({str(size): {"candidate_steps": ks} for size, ks in ranges.items()}))
    stock = AdaptiveSpeculativeParams(LAUNCH_K, None if path is None else str(path))
    policy = SidecarDraftPolicy(stock, LAUNCH_K, lambda: None)
    policy.set_cuda_graph_bs(graphs)
    for batch_size in range(1, 200):
        assert set(policy.allowed(batch_size)) == {*stock._route(batch_size).candidate_steps, LAUNCH_K}, batch_size


def test_own_policies_of_two_ranks_stay_alike_whoever_decides() -> None:
    dice = random.Random(1)
    said: list[int | None] = [None]
    ranks = [SidecarDraftPolicy(AdaptiveSpeculativeParams(LAUNCH_K, None), LAUNCH_K, lambda: said[0]) for _ in range(2)]
    for rank in ranks:
        rank.set_cuda_graph_bs(None)
    for _ in range(3000):
        batch_size = dice.randint(1, 70)
        said[0] = dice.choice((None, None, 0, 1, 3, 5, 7))
        ks = [rank.get_steps_for_batch(batch_size) for rank in ranks]
        assert ks[0] == ks[1]
        assert ks[0] in ranks[0].allowed(batch_size)
        counts = [dice.randint(0, ks[0]) for _ in range(batch_size)]
        first, second = [rank.on_verify_complete(list(counts), batch_size) for rank in ranks]
        assert first == second
    assert [rank.teach_failures for rank in ranks] == [0, 0]


def test_a_handover_continues_from_the_k_that_ran() -> None:
    """20 steps with K = 1 and everything accepted: SGLang's policy takes over within one of its own moves of 1."""
    said: list[int | None] = [1]
    policy = SidecarDraftPolicy(AdaptiveSpeculativeParams(7, None), 7, lambda: said[0])
    policy.set_cuda_graph_bs(None)
    for _ in range(20):
        policy.get_steps_for_batch(1)
        policy.on_verify_complete([1], 1)
    said[0] = None
    assert policy.get_steps_for_batch(1) in (1, 3), "not the 7 it was launched with"
