from __future__ import annotations

import json

import pytest

from adaptive_spec.engines.vllm.launch_schedule import (
    BEYOND,
    KEY,
    Schedule,
    candidates_of,
    completed_flags,
    default_candidates,
    for_launch,
)
from adaptive_spec.errors import BadInput


def lookup(schedule: Schedule, max_num_seqs: int) -> list[int]:
    """K by batch size 0, 1, ..., as vLLM makes it of ranges without gaps."""
    found = [0] * (max_num_seqs + 1)
    for first, last, k in schedule:
        for size in range(first, min(last, max_num_seqs) + 1):
            found[size] = k
    return found


@pytest.mark.parametrize("largest", [1, 2, 5, 8, 32])
@pytest.mark.parametrize("max_num_seqs", [None, 40, 64, 65, 1024])
def test_every_candidate_stands_in_the_schedule_and_the_largest_nearly_everywhere(largest: int, max_num_seqs: int | None) -> None:
    ks = default_candidates(largest)
    assert ks[0] == 0
    assert ks[-1] == largest
    schedule = for_launch(ks, max_num_seqs)
    ends = [first for first, _, _ in schedule[1:]]
    assert schedule[0][0] == 1
    assert ends == [last + 1 for _, last, _ in schedule[:-1]], "no gap, no overlap: vLLM refuses one and fills the other"
    found = lookup(schedule, max_num_seqs or 256)
    assert candidates_of(found, largest) == ks
    assert sum(k != largest for k in found[1:]) == len(ks) - 1


def test_too_few_batch_sizes_for_the_candidates() -> None:
    assert lookup(for_launch((0, 1, 3, 5), 4), 4)[1:] == [5, 3, 1, 0]
    with pytest.raises(BadInput, match="--max-num-seqs: must be at least 4, one for each K of the schedule, got 3"):
        for_launch((0, 1, 3, 5), 3)
    assert for_launch((3,), 1) == [[1, BEYOND, 3]]


@pytest.mark.parametrize("form", ["apart", "equals", "short"])
def test_the_flags_are_completed(form: str) -> None:
    given = json.dumps({"method": "eagle", "model": "a=b", "num_speculative_tokens": 3})
    flag = {"apart": ["--speculative-config", given], "equals": [f"--speculative-config={given}"], "short": ["-sc", given]}[form]
    flags = completed_flags(["--model", "m", *flag, "--max-num-seqs", "8"])
    assert flags[:2] == ["--model", "m"]
    assert flags[-2:] == ["--max-num-seqs", "8"]
    assert len(flags) == 4 + len(flag)
    text = flags[-3].removeprefix("--speculative-config=")
    assert json.loads(text) == {**json.loads(given), KEY: for_launch((0, 1, 3), 8)}


def test_a_schedule_of_the_user_stays() -> None:
    flags = ["--speculative-config", json.dumps({"method": "eagle", "num_speculative_tokens": 3, KEY: [[1, 4, 3], [5, 9, 1]]})]
    assert completed_flags(flags) == flags


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "m"], "--speculative-config: must be among the vLLM flags"),
        (["--speculative-config", "{"], "--speculative-config: must be a JSON object, got '{'"),
        (["--speculative-config", "[1]"], "must be a JSON object"),
        (["--speculative-config", "{}"], "num_speculative_tokens: must be a whole number in 1..32, got None"),
        (["--speculative-config", '{"num_speculative_tokens": 33}'], "in 1..32, got 33"),
        (["--speculative-config", '{"num_speculative_tokens": true}'], "in 1..32, got True"),
        (
            ["--speculative-config", '{"num_speculative_tokens": 3}', "--max-num-seqs", "x"],
            "--max-num-seqs: must be a whole number",
        ),
    ],
)
def test_bad_flags(flags: list[str], words: str) -> None:
    with pytest.raises(BadInput) as refused:
        completed_flags(flags)
    assert words in str(refused.value)
