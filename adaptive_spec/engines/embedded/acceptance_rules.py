"""Which draft tokens the target keeps: exact match for greedy requests, rejection sampling for the others.

Rejection sampling (Leviathan et al., 2023, arXiv:2211.17192): a draft token x ~ q is kept with probability
min(1, p(x) / q(x)); the first one not kept is replaced by a sample of max(0, p - q), normalised; if all are kept, one more
token is sampled from p. The output then is distributed as p, whatever q is.

That proof needs the number of verified tokens not to depend on the tokens drawn: dropping x because its confidence q(x) is
low keeps the likely tokens and resamples the others from p, which over-represents the likely ones. So a sampled request
must have all its draft tokens verified (the decoder sees to it). Greedy requests have no such limit: their draft tokens
are not drawn.
"""

from __future__ import annotations

import numpy as np

from adaptive_spec.domain.arrays import Floats, Ints


def accept_greedy(drafts: Ints, verify_len: Ints, best: Ints, first_row: Ints) -> tuple[Ints, Ints]:
    """Keep draft tokens while they equal the target's best token.

    drafts: [b, k]. verify_len: [b], 0..k. best: [n] best token of each verified row. first_row: [b], where the rows of a
    request begin in `best`. Returns accept_len [b] and the bonus token [b] that follows.
    """
    b, k = drafts.shape
    rows = first_row[:, None] + np.minimum(np.arange(k + 1), verify_len[:, None])
    wanted = best[rows]
    kept = (drafts == wanted[:, :k]) & (np.arange(k) < verify_len[:, None])
    accept_len = np.cumprod(kept, axis=1).sum(axis=1)
    return accept_len, wanted[np.arange(b), accept_len]


def accept_sampled(drafts: Ints, q: Floats, p: Floats, random: np.random.Generator) -> tuple[int, int]:
    """Rejection sampling of one request: drafts [k], q [k, v], p [k + 1, v] -> (accept_len, the token that follows)."""
    for position, token in enumerate(drafts):
        if random.random() * q[position, token] >= p[position, token]:
            left = np.maximum(p[position] - q[position], 0.0)
            return position, sample(left if left.sum() > 0.0 else p[position], random)
    return len(drafts), sample(p[len(drafts)], random)


def sample(weights: Floats, random: np.random.Generator) -> int:
    """Draw an index in proportion to weights [v] >= 0, at least one of them > 0."""
    upto = np.cumsum(weights)
    return int(np.searchsorted(upto, random.random() * upto[-1], side="right"))
