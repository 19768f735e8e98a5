"""Tensor-parallel ranks run the same K: all adopt a new policy in the same decode step.

Every rank runs the same decode steps in the same order. Every `interval_steps` steps they meet on the CPU group. Rank 0 states
its policy version and whether its sidecar is alive; every rank states whether something failed. A new policy is broadcast whole,
so ranks need neither the page nor the same host. It is adopted only if every rank could decode it. Between two meetings K
follows from the policy, the step count, batch size and KV tokens, which are equal on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.domain.policy import Policy
from adaptive_spec.engine_side.tap import EngineTap
from adaptive_spec.wire.policy_page import decode_policy, encode_policy
from adaptive_spec.wire.ring import RingWriter

_VERSION, _BYTES, _LIVE, _FAILED = range(4)


class Group(Protocol):
    """Collective operations; each call blocks until every rank has made it."""

    def total(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sum over the ranks of int64 arrays of one shape."""
        ...

    def from_first(self, data: bytes | None, size: int) -> bytes:
        """Bytes of rank 0 (which gives them, the others None); size: how many, known to all."""
        ...


class TorchGroup:
    """A torch.distributed process group on the CPU. first: global rank of the group's rank 0."""

    def __init__(self, group: Any, first: int) -> None:
        import torch
        import torch.distributed as distributed

        self._torch, self._distributed, self._group, self._first = torch, distributed, group, first

    def total(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        tensor = self._torch.from_numpy(numbers.copy())
        self._distributed.all_reduce(tensor, group=self._group)
        result: NDArray[np.int64] = tensor.numpy()
        return result

    def from_first(self, data: bytes | None, size: int) -> bytes:
        buffer = np.empty(size, np.uint8) if data is None else np.frombuffer(data, np.uint8).copy()
        self._distributed.broadcast(self._torch.from_numpy(buffer), self._first, group=self._group)
        return buffer.tobytes()


def agree(group: Group, rank: int, ranks: int, mine: int) -> bool:
    """Whether all ranks passed the same number and it is not 0. Every rank must call it."""
    numbers = np.zeros(ranks, np.int64)
    numbers[rank] = mine
    found = group.total(numbers)
    return bool(found[0] != 0 and (found == found[0]).all())


class Rendezvous:
    """One rank's part of the rendezvous.

    policy: what all ranks act on, None for the launch K. swaps: policies adopted. failures: policies refused.
    """

    def __init__(self, group: Group, rank: int, interval_steps: int) -> None:
        if interval_steps < 1:
            raise ValueError(f"interval_steps: must be at least 1, got {interval_steps}")
        self._group, self._rank, self._interval_steps = group, rank, interval_steps
        self._step = 0
        self._held: Policy | None = None
        self.policy: Policy | None = None
        self.swaps = 0
        self.failures = 0
        self.failed = False
        """Set after a failure on this rank; all ranks then run the launch K until a meeting without a failure."""

    def at_step(self, newest: Callable[[], Policy | None]) -> Policy | None:
        """Call once per decode step on every rank; newest is asked on rank 0 only, at meetings. Returns the policy to act on."""
        self._step += 1
        if self._step % self._interval_steps == 0:
            self._meet(newest)
        return self.policy

    def _meet(self, newest: Callable[[], Policy | None]) -> None:
        payload, mine = None, np.zeros(4, np.int64)
        try:
            policy = newest() if self._rank == 0 else None
            if policy is not None:
                mine[_LIVE], mine[_VERSION] = 1, policy.version
                if self._held is None or policy.version != self._held.version:
                    payload = encode_policy(policy)
                    mine[_BYTES] = len(payload)
        except Exception:
            self.failed, payload, mine[:] = True, None, 0
        mine[_FAILED], self.failed = int(self.failed), False
        head = self._group.total(mine)
        if head[_BYTES] and not self._take(payload, int(head[_BYTES])):
            self.policy = None
            return
        self.policy = self._held if head[_LIVE] and not head[_FAILED] else None

    def _take(self, payload: bytes | None, size: int) -> bool:
        """Receive a policy; return whether every rank could decode it."""
        data = self._group.from_first(payload, size)
        try:
            received, bad = decode_policy(data), 0
        except ValueError:
            received, bad = None, 1
        if self._group.total(np.array([bad], np.int64))[0]:
            self.failures += 1
            return False
        self._held = received
        self.swaps += 1
        return True


class RankedTap(EngineTap):
    """The tap of one rank. Rank 0 writes the ring and reads the page; the others use its policy."""

    def __init__(
        self, runtime_dir: Path | str, info: EngineInfo, ring: RingWriter | None, rendezvous: Rendezvous, max_age_s: float = 30.0
    ) -> None:
        super().__init__(runtime_dir, info, ring, max_age_s)
        self.rendezvous = rendezvous

    def begin_step(self, batch_size: int, kv_tokens: int, now_ns: int) -> int:
        failures = self._hook_failures
        k = super().begin_step(batch_size, kv_tokens, now_ns)
        if self._hook_failures != failures:
            self.rendezvous.failed = True
        return k

    def newest_policy(self, now_ns: int) -> Policy | None:
        return self.rendezvous.at_step(lambda: super(RankedTap, self).newest_policy(now_ns))
