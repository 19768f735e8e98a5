"""Draft confidences, which SGLang does not keep at topk = 1: the probability of the most likely token, from the draft's logits.

    confidence = max softmax(logits), see `max_probability`

Positions 2..K come from the logits of the forwards inside `draft_forward`; position 1 from those of draft-extend (or prefill) of
the step before, carried in `next_draft_input.topk_p`, which SGLang filters and merges with the batch but does not read at
topk = 1. On a GPU `draft_forward` runs only while a CUDA graph is captured: what is computed there becomes part of the graph and
is written into a static buffer per K; after each replay buffer and position 1 are copied to pinned memory without waiting.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adaptive_spec.engines.common.host_probabilities import each_max_probability, few_max_probabilities
from adaptive_spec.engines.common.max_probability import max_probability
from adaptive_spec.engines.common.pinned_ring import PinnedRing
from adaptive_spec.engines.common.steps_in_flight import Confidences, KnownConfidences


class LogitsTap:
    """Collects part of what a method of one object returns, between `listen` and `take`. The method is replaced on the instance
    once; its return value is not changed.
    """

    def __init__(self, owner: Any, name: str) -> None:
        self._function = getattr(owner, name)
        self._pick: Callable[[Any], Any] = lambda result: result
        self.collected: list[Any] | None = None
        setattr(owner, name, self._call)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        result = self._function(*args, **kwargs)
        if self.collected is not None:
            try:
                self.collected.append(self._pick(result))
            except Exception:  # the caller of `take` sees the None
                self.collected.append(None)
        return result

    def listen(self, pick: Callable[[Any], Any]) -> None:
        """Collect `pick(result)` of every call from now on; None where that raises."""
        self._pick, self.collected = pick, []

    def take(self) -> list[Any]:
        """What was collected since `listen`; stops collecting."""
        collected, self.collected = self.collected, None
        return collected or []


def _logits(result: Any) -> Tensor:
    logits: Tensor = result.logits_output.next_token_logits
    return logits


def _probabilities(result: Any) -> Tensor:
    return max_probability(_logits(result))


def host_confidences(first: Tensor, later: NDArray[np.float32] | None) -> Confidences:
    """Confidences on the CPU: first [b, 1], later [b, K - 1] or None for K = 1."""
    if first.dtype != torch.float32:
        first = first.float()
    values = np.empty((len(first), 1 if later is None else 1 + later.shape[1]), np.float32)
    values[:, :1] = first.numpy()
    if later is not None:
        values[:, 1:] = later
    return KnownConfidences(values)


def _together(first: Tensor, later: Tensor | None) -> Tensor:
    """first [b, 1] and later [b, K - 1] or None, side by side: float32 [b, K]."""
    first = first.reshape(-1, 1).float()
    return torch.cat((first, later), dim=1) if later is not None else first


class StaticBuffers:
    """One buffer [max_batch, K - 1] per K, at a fixed address, which a CUDA graph needs."""

    def __init__(self, max_batch: int, device: torch.device) -> None:
        self._max_batch, self._device = max_batch, device
        self._buffers: dict[int, Tensor] = {}

    def prepare(self, k: int) -> None:
        """Make the buffer of K, outside any capture: memory allocated inside one belongs to the graph."""
        if k > 1 and k not in self._buffers:
            self._buffers[k] = torch.zeros((self._max_batch, k - 1), dtype=torch.float32, device=self._device)

    def store(self, k: int, later: Tensor) -> None:
        """Write [b, K - 1] into the buffer, inside a capture or not. Raises KeyError for a K not prepared."""
        self._buffers[k][: len(later)].copy_(later)

    def of(self, k: int, rows: int) -> Tensor | None:
        """The first rows of the buffer of K; None for K <= 1."""
        return self._buffers[k][:rows] if k > 1 else None


class LogitConfidences:
    """Confidences of draft models that output a confidence logit: sigmoid(logit / temperature), with fixed temperatures.

    temperatures: [k], or one for all []. device: of the logits.
    """

    def __init__(self, temperatures: NDArray[np.float64], max_batch: int, k: int, device: torch.device) -> None:
        self.temperatures = temperatures
        self._ring = PinnedRing(max_batch, k, _pinned, torch.cuda.Event) if device.type == "cuda" else None

    def send(self, logits: Tensor) -> Confidences:
        """logits [b, k], which SGLang may overwrite afterwards."""
        sent = self._ring.send(logits) if self._ring is not None else KnownConfidences(logits.detach().float().numpy().copy())
        return _OfLogits(sent, self.temperatures)


class _OfLogits:
    def __init__(self, logits: Confidences, temperatures: NDArray[np.float64]) -> None:
        self._logits, self._temperatures = logits, temperatures

    def ready(self) -> NDArray[np.float32] | None:
        logits = self._logits.ready()
        if logits is None:
            return None
        # In float32 a sigmoid beyond 15 is 0 or 1.
        x = np.clip(logits.astype(np.float64) / self._temperatures, -15.0, 15.0)
        return (1.0 / (1.0 + np.exp(-x))).astype(np.float32)


def _pinned(rows: int, columns: int) -> Tensor:
    return torch.zeros((rows, columns)).pin_memory()


class ConfidenceTap:
    """The confidences of one EAGLE draft worker. device: of the draft model."""

    def __init__(self, draft_worker: Any, max_batch: int, max_k: int, device: torch.device) -> None:
        self._worker = draft_worker
        self._forward = LogitsTap(draft_worker.draft_runner, "forward")
        self._replays: dict[int, LogitsTap] = {}
        self._static: StaticBuffers | None = None
        self._ring: PinnedRing | None = None
        self._later: NDArray[np.float32] | None = None
        self._extend_replay: LogitsTap | None = None
        if device.type == "cuda":
            self._static = StaticBuffers(max_batch, device)
            self._ring = PinnedRing(max_batch, max_k, _pinned, torch.cuda.Event)

    def before_draft_forward(self) -> None:
        if self._static is not None and not torch.cuda.is_current_stream_capturing():
            self._static.prepare(self._worker.speculative_num_steps)
        # On a GPU per forward: a graph may reuse one logits buffer for all. On a CPU all together, which is faster.
        self._forward.listen(_logits if self._static is None else _probabilities)

    def after_draft_forward(self) -> None:
        k = self._worker.speculative_num_steps
        self._later = None
        found = self._forward.take()
        if len(found) != k - 1 or any(one is None for one in found):
            raise ValueError(f"{sum(one is not None for one in found)} draft forwards for K = {k}")
        if not found:
            return
        if self._static is not None:
            self._static.store(k, torch.stack(found, dim=1))
        else:
            self._later = each_max_probability(found)

    def after_draft(self, first: Tensor, k: int) -> Confidences:
        """Confidences of the drafted tokens. first: topk_p [b, 1] as it came with the batch."""
        if self._static is None or self._ring is None:
            later, self._later = self._later, None
            return host_confidences(first, later)
        return self._ring.send(_together(first, self._static.of(k, len(first))))

    def before_extend(self) -> None:
        self._forward.listen(lambda result: result.logits_output)
        runner = getattr(self._worker, "cuda_graph_runner_for_draft_extend", None)
        self._extend_replay = None
        if runner is not None:
            if id(runner) not in self._replays:  # one per captured state, and those live as long as the server
                self._replays[id(runner)] = LogitsTap(runner, "execute")
            self._extend_replay = self._replays[id(runner)]
            self._extend_replay.listen(lambda result: result)

    def after_extend(self, next_draft_input: Any) -> None:
        """Store the confidence of the next step's first token in topk_p, which stays with its request."""
        outputs = self._forward.take()
        if self._extend_replay is not None:
            outputs += self._extend_replay.take()
        if not outputs:
            return  # skipped at K = 0: the confidence is unknown
        logits = outputs[-1].next_token_logits
        carried = next_draft_input.topk_p
        if carried is not None and carried.shape == (len(logits), 1):
            few = few_max_probabilities([logits]) if self._static is None else None
            found = (max_probability(logits) if few is None else torch.from_numpy(few)).reshape(-1, 1)
            next_draft_input.topk_p = found if found.dtype == carried.dtype else found.to(carried.dtype)
