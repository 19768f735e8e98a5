"""The tree of drafted tokens: its mask and links before verification, the greedy walk through it afterwards."""

from __future__ import annotations

import torch

QLEN_ONLY = 1
"""The one mask layout served here: among the new tokens only."""


def rotate_input_ids_cpu(*args, **kwargs):
    raise NotImplementedError("multi-layer EAGLE is not served by the stand-in")


def build_tree_kernel_efficient_cpu(
    parent_list, selected_index, seq_lens, tree_mask, positions, retrieve_index, retrieve_next_token, retrieve_next_sibling,
    topk, depth, draft_token_num, mask_mode,
):  # fmt: skip
    """Fill mask [b, n, n], positions, and first-child and next-sibling links of every request's tree of n tokens."""
    if int(mask_mode) != QLEN_ONLY:
        raise NotImplementedError(f"mask mode {mask_mode} is not served by the stand-in")
    b, n = seq_lens.shape[0], draft_token_num
    mask, position = tree_mask[: b * n * n].view(b, n, n), positions.view(b, n)
    child, sibling = retrieve_next_token.view(b, n), retrieve_next_sibling.view(b, n)
    retrieve_index.view(b, n).copy_(torch.arange(b * n).view(b, n))
    sibling.fill_(-1)
    if topk == 1 and n == depth + 1:  # a chain
        order = torch.arange(n)
        mask.copy_((order[None, :] <= order[:, None]).expand(b, n, n))
        position.copy_(seq_lens[:, None] + order[None, :])
        child.copy_(torch.where(order < n - 1, order + 1, torch.full_like(order, -1)).expand(b, n))
        return
    mask.fill_(False)
    child.fill_(-1)
    for row in range(b):
        chosen, parents = selected_index[row].tolist(), parent_list[row].tolist()
        parent_of = [0] * n
        for i in range(1, n):
            block = chosen[i - 1] // topk
            parent_of[i] = 0 if block == 0 else chosen.index(parents[block]) + 1
        for i in range(n):
            above, j = 0, i
            mask[row, i, 0] = True
            while j != 0:
                mask[row, i, j] = True
                j = parent_of[j]
                above += 1
            position[row, i] = seq_lens[row] + above
        for i in range(n - 1, 0, -1):
            parent = parent_of[i]
            sibling[row, i] = child[row, parent]
            child[row, parent] = i


def verify_tree_greedy_cpu(
    predicts, accept_index, accept_token_num, candidates, retrive_index, retrive_next_token, retrive_next_sibling, target_predict
):
    """Walk each tree along the target's own tokens; fills the accepted tokens, their places and their number (bonus excluded)."""
    rows, width = accept_index.shape
    candidate, place = candidates.tolist(), retrive_index.tolist()
    child, sibling = retrive_next_token.tolist(), retrive_next_sibling.tolist()
    wanted = target_predict.reshape(-1).tolist()
    for row in range(rows):
        last, current, accepted = place[row][0], 0, 0
        accept_index[row, 0] = last
        for _ in range(1, width):
            current = child[row][current]
            while current != -1 and candidate[row][current] != wanted[last]:
                current = sibling[row][current]
            if current == -1:
                break
            predicts[last] = wanted[last]
            accepted += 1
            last = place[row][current]
            accept_index[row, accepted] = last
        accept_token_num[row] = accepted
        predicts[last] = wanted[last]
