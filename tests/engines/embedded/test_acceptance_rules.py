import numpy as np
from numpy.typing import NDArray

from adaptive_spec.engines.embedded.acceptance_rules import accept_greedy, accept_sampled, sample


def test_greedy_keeps_the_matching_beginning_of_what_was_verified() -> None:
    drafts = np.array([[5, 6, 7], [5, 6, 7], [5, 6, 7], [1, 6, 7]])
    verify_len = np.array([3, 3, 1, 0])
    best = np.array([5, 6, 7, 8, 5, 9, 7, 8, 5, 4, 3])
    accept_len, bonus = accept_greedy(drafts, verify_len, best, np.array([0, 4, 8, 10]))
    assert accept_len.tolist() == [3, 1, 1, 0]
    assert bonus.tolist() == [8, 9, 4, 3]


def test_greedy_without_draft_tokens_gives_the_best_tokens() -> None:
    none = np.zeros((2, 0), dtype=np.int64)
    accept_len, bonus = accept_greedy(none, none.sum(axis=1), np.array([4, 9]), np.array([0, 1]))
    assert accept_len.tolist() == [0, 0]
    assert bonus.tolist() == [4, 9]


def test_rejection_sampling_outputs_the_target_distribution() -> None:
    random = np.random.default_rng(11)
    p = np.array([[0.5, 0.2, 0.2, 0.1, 0.0], [0.1, 0.1, 0.6, 0.1, 0.1]])
    q = np.array([[0.1, 0.6, 0.0, 0.1, 0.2]])
    draws = 20_000
    first, second, bonuses = np.zeros(5), np.zeros(5), 0
    for _ in range(draws):
        token = sample(q[0], random)
        accepted, following = accept_sampled(np.array([token]), q, p, random)
        first[token if accepted else following] += 1
        if accepted:
            bonuses += 1
            second[following] += 1
    assert first[4] == 0
    assert chi_square(first[:4], p[0, :4] * draws) < 16.27  # 3 degrees of freedom, 1 in 1000
    assert chi_square(second, p[1] * bonuses) < 18.47  # 4 degrees of freedom, 1 in 1000
    assert abs(bonuses / draws - np.minimum(p[0], q[0]).sum()) < 0.015  # accepted as often as can be


def chi_square(observed: NDArray[np.float64], expected: NDArray[np.float64]) -> float:
    return float(((observed - expected) ** 2 / expected).sum())
