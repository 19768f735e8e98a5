from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from adaptive_spec.offline import draft_length_choice as candidates
from adaptive_spec.offline.draft_length_choice import choose, config_document, goodput_by_traffic

MAX_K = 7


def _seconds(batches: int = 32, tile: int = 16) -> NDArray[np.float64]:
    """A staircase of tiles, a line behind it, and drafts that cost something."""
    b, k = np.arange(1, batches + 1)[:, None], np.arange(MAX_K + 1)[None, :]
    tokens = b * (k + 1)
    return np.asarray(5.0 + np.ceil(tokens / tile) + 0.4 * k + 0.02 * tokens)


CONDITIONAL = np.array([0.8, 0.75, 0.7, 0.68, 0.66, 0.64, 0.62])
GOODPUT = goodput_by_traffic(CONDITIONAL, _seconds())


def test_goodput_is_tokens_over_seconds() -> None:
    plain = goodput_by_traffic(CONDITIONAL, _seconds(), (0.0,))[0]
    assert plain[3, 2] == pytest.approx(4 * (1 + 0.8 + 0.8 * 0.75) / _seconds()[3, 2])
    assert (GOODPUT[-1] > GOODPUT[0])[:, 1:].all(), "text that is accepted more gives more"
    assert GOODPUT[-1, :, 0] == pytest.approx(GOODPUT[0, :, 0]), "but not without a draft"


@pytest.mark.parametrize("states", [1, 2, 3, 4])
def test_no_other_set_of_that_size_is_better(states: int) -> None:
    choice = choose(GOODPUT, states)
    relative = GOODPUT / GOODPUT.max(axis=2, keepdims=True)
    losses = [1.0 - relative[:, :, list(s)].max(axis=2).mean() for s in itertools.combinations(range(MAX_K + 1), states)]
    assert choice.loss == pytest.approx(min(losses))
    assert len(choice.ks) == states


def test_more_states_never_lose_more_and_enough_lose_nothing() -> None:
    losses = [choose(GOODPUT, states).loss for states in range(1, MAX_K + 2)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == pytest.approx(0.0, abs=1e-12)
    assert losses[0] > 0.05, "one K for all loses much"


def test_exchange_finds_what_the_full_search_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    full = choose(GOODPUT, 3)
    monkeypatch.setattr(candidates, "ALL_SUBSETS", 0)
    assert choose(GOODPUT, 3).loss <= full.loss + 0.003


def test_dropping_says_what_is_lost() -> None:
    choice = choose(GOODPUT, 3)
    assert tuple(choice.dropping) == choice.ks
    for k, (mean, worst) in choice.dropping.items():
        rest = [other for other in choice.ks if other != k]
        kept, without = (GOODPUT[:, :, list(s)].max(axis=2) for s in (choice.ks, rest))
        assert mean == pytest.approx((1.0 - without / kept).mean())
        assert worst == pytest.approx((1.0 - without / kept).max())
        assert mean > 0.0


def test_ranges_cover_every_batch_size_and_lose_no_more_than_the_tolerance() -> None:
    choice = choose(GOODPUT, 4)
    sizes = [size for part in choice.ranges for size in range(part.first, part.last + 1)]
    assert sizes == list(range(1, 33))
    assert all(a.ks != b.ks for a, b in itertools.pairwise(choice.ranges))
    for part in choice.ranges:
        assert set(part.ks) <= set(choice.ks)
        for size in range(part.first, part.last + 1):
            best = GOODPUT[:, size - 1, list(choice.ks)].max(axis=1)
            assert (GOODPUT[:, size - 1, list(part.ks)].max(axis=1) >= best * (1.0 - candidates.TOLERANCE)).all()
    assert max(choice.ranges[0].ks) > max(choice.ranges[-1].ks), "small batches draft longer"


def test_config_is_what_sglang_reads() -> None:
    document = config_document(choose(GOODPUT, 4))
    assert next(iter(document)) == "1"
    assert [int(key) for key in document] == sorted(int(key) for key in document)
    for entry in document.values():
        assert entry["candidate_steps"]
        assert all(isinstance(k, int) and k >= 0 for k in entry["candidate_steps"])
