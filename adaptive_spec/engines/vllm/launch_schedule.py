"""vLLM's schedule of K by batch size: `num_speculative_tokens_per_batch_size`, a list of [first, last, K].

vLLM changes K while it serves only if it was launched with such a schedule, and on a GPU it captures graphs only for the K that
stand in it at batch sizes up to max_num_seqs. So the schedule says which K there are. `for_launch` writes one that keeps the
largest K at every batch size but the last few, which carry the other candidates.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from adaptive_spec.errors import BadInput

KEY = "num_speculative_tokens_per_batch_size"
TAIL_END = 64
"""Largest batch size of the tail where `--max-num-seqs` is not given: every default of vLLM is larger."""
BEYOND = 1 << 20
"""A batch size that no server has: the last range ends there."""
Schedule = list[list[int]]


def default_candidates(largest: int) -> tuple[int, ...]:
    """0, the odd K and the largest, ascending: as many as SGLang captures for its default K."""
    return tuple(sorted({0, largest, *range(1, largest, 2)}))


def for_launch(candidates: Sequence[int], max_num_seqs: int | None) -> Schedule:
    """The schedule to launch with: the largest K everywhere, but each other candidate at one batch size near the end.

    candidates: ascending, not empty. max_num_seqs: None where it is not known. Raises BadInput where it is smaller than the
    number of candidates.
    """
    largest, others = candidates[-1], list(reversed(candidates[:-1]))
    end = min(max_num_seqs or TAIL_END, TAIL_END)
    if end <= len(others):
        raise BadInput(f"--max-num-seqs: must be at least {len(candidates)}, one for each K of the schedule, got {end}")
    first = end - len(others) + 1
    schedule = [[1, first - 1, largest], *([first + i, first + i, k] for i, k in enumerate(others))]
    return [*schedule, [end + 1, BEYOND, largest]] if others else [[1, BEYOND, largest]]


def completed_flags(flags: Sequence[str]) -> list[str]:
    """vLLM's server flags with a schedule in `--speculative-config`, unless it has one already.

    Raises BadInput where there is no such flag, or its value is no JSON object with a whole `num_speculative_tokens` in 1..32.
    """
    given = list(flags)
    at, text = _find(given, "--speculative-config")
    if at is None:
        at, text = _find(given, "-sc")
    if at is None or text is None:
        raise BadInput(
            'serve: --speculative-config: must be among the vLLM flags, for example \'{"method": "eagle", "model": "DRAFT", '
            '"num_speculative_tokens": 5}\''
        )
    try:
        config = json.loads(text)
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise BadInput(f"--speculative-config: must be a JSON object, got {text!r}")
    if config.get(KEY):
        return given
    largest = config.get("num_speculative_tokens")
    if not isinstance(largest, int) or isinstance(largest, bool) or not 1 <= largest <= 32:
        raise BadInput(f"--speculative-config: num_speculative_tokens: must be a whole number in 1..32, got {largest!r}")
    config[KEY] = for_launch(default_candidates(largest), _max_num_seqs(given))
    name = given[at][: len(given[at]) - len(text)]  # "" or "--speculative-config="
    given[at] = name + json.dumps(config)
    return given


def candidates_of(lookup: Sequence[int], launch_k: int) -> tuple[int, ...]:
    """K that the launch schedule has at batch sizes 1, 2, ..., and the launch K, ascending. lookup: index 0 is not used."""
    return tuple(sorted({*(int(k) for k in lookup[1:]), launch_k}))


def _find(flags: Sequence[str], name: str) -> tuple[int | None, str | None]:
    """Index of the item that holds the value of a flag, and the value: the last one counts."""
    found: tuple[int | None, str | None] = (None, None)
    for i, item in enumerate(flags):
        if item == name and i + 1 < len(flags):
            found = (i + 1, flags[i + 1])
        elif item.startswith(name + "="):
            found = (i, item[len(name) + 1 :])
    return found


def _max_num_seqs(flags: Sequence[str]) -> int | None:
    _, text = _find(flags, "--max-num-seqs")
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= BEYOND:
        raise BadInput(f"--max-num-seqs: must be a whole number of at least 1, got {text!r}")
    return int(text)
