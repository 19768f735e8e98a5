"""NGRAM drafts come as ancestor masks: recover positions and links from them."""

from __future__ import annotations

import torch


def reconstruct_indices_from_tree_mask(
    tree_mask, verified_seq_len, positions, retrieve_index, retrieve_next_token, retrieve_next_sibling, batch_size,
    draft_token_num,
):  # fmt: skip
    n = draft_token_num
    masks = tree_mask[: batch_size * n * n].view(batch_size, n, n).bool().tolist()
    position, child, sibling = positions.view(-1, n), retrieve_next_token.view(-1, n), retrieve_next_sibling.view(-1, n)
    index = retrieve_index.view(-1, n)
    index[:batch_size] = torch.arange(batch_size * n).view(batch_size, n).to(index.dtype)
    for b in range(batch_size):
        above = [[j for j in range(i) if masks[b][i][j]] for i in range(n)]
        parent = [a[-1] if a else -1 for a in above]
        base = int(verified_seq_len[b])
        position[b] = torch.tensor([base + len(a) for a in above], dtype=position.dtype)
        first = [next((k for k in range(i + 1, n) if i in above[k]), -1) for i in range(n)]
        later = [next((k for k in range(i + 1, n) if parent[k] == parent[i] >= 0), -1) for i in range(n)]
        child[b], sibling[b] = torch.tensor(first, dtype=child.dtype), torch.tensor(later, dtype=sibling.dtype)
