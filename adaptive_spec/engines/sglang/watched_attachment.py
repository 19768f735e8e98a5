"""Servers on which K cannot change and stages are not timed: NGRAM, multi-layer EAGLE, and no speculation at all. Also the one
that says why the algorithm of another plugin is not observed.

    attach                      once, while the server starts
    step -> results             every decode step; without speculation no `results`, for nothing can be accepted

The time of the whole forward is verify_s of its record (flag `WHOLE`). K is the largest number of draft tokens that one request
can have accepted, acceptance is by position. NGRAM verifies a tree: K + 1 tokens per request whatever its depth, and position j
counts as verified for every request, also where the tree has no path of j tokens.

EAGLE and STANDALONE with K that cannot change, also with trees (topk > 1), are observed by `eagle_attachment`.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import numpy as np

from adaptive_spec.domain.policy import Granularity
from adaptive_spec.engine_side.tap import BegunStep
from adaptive_spec.engines.common.hook_guard import Guard
from adaptive_spec.engines.common.identity import known
from adaptive_spec.engines.common.plugin_settings import PluginSettings
from adaptive_spec.engines.common.stage_clock import clock_for
from adaptive_spec.engines.common.steps_in_flight import OpenStep
from adaptive_spec.engines.sglang import contract
from adaptive_spec.engines.sglang.attachment import (
    Attachment,
    Place,
    graph_rows,
    kv_tokens_of,
    padded_rows,
    request_id,
    waits_on_the_host,
)

log = logging.getLogger("sglang.adaptive_spec")


class WatchedAttachment(Attachment):
    """One per process. Writes a record of every decode step, and decides nothing."""

    def __init__(self, settings: PluginSettings, guard: Guard, engine: str) -> None:
        super().__init__(settings, guard, engine)
        self._k = 0
        self._tokens = 1
        """Tokens of each request in a verify forward."""
        self._graph_rows: list[int] = []

    def _why_k_is_fixed(self, server_args: Any) -> str:
        return super()._why_k_is_fixed(server_args) or "SGLang cannot change K on this server"

    def _shape(self, worker: Any) -> tuple[int, int]:
        """K, and the tokens of each request in a verify forward."""
        raise NotImplementedError

    def _before_capture(self, worker: Any) -> None:
        import torch

        self._clock = clock_for(torch.device(str(worker.device)).type)

    def _begin(self, worker: Any, place: Place) -> None:
        self._first_rank = place.rank == 0
        self._k, self._tokens = self._shape(worker)
        self._graph_rows = graph_rows(worker)
        self._tap = self._open_tap(self._info(worker, place, self._k, (self._k,), Granularity.BATCH), place)
        self._worker = worker
        self.report("observing", self._reason)

    def _may_steer(self) -> bool:
        return False

    def _terms(self) -> int:
        return self._crc("watched", self._k)

    @property
    def level(self) -> int | None:
        """1, counts, from the moment it is attached."""
        return int(self._tap is not None and self._guard.closed is None)

    def step_before(self, worker: Any, batch: Any, *args: Any, **kwargs: Any) -> OpenStep | None:
        self._step = None
        tap = self._tap_for(worker, batch) if batch is not None else None
        if tap is None:
            return None
        rows, kv_tokens = len(batch.reqs), kv_tokens_of(batch)
        tap.begin_step(rows, kv_tokens, time.monotonic_ns())
        # No policy acts on this step, so the record names none.
        begun = BegunStep(tap.begun.step, self._k, rows, kv_tokens, 0, 0)
        ids = np.array([request_id(request) for request in batch.reqs], np.uint32)
        padded = padded_rows(self._graph_rows, self._rows_computed(batch, rows))
        self._step = OpenStep(
            begun, self._k, ids, padded, self._clock.now(), flags=waits_on_the_host(batch), staged=False,
            num_tokens=rows * self._tokens, padded_tokens=padded * self._tokens,
        )  # fmt: skip
        self._in_flight.begin(self._step)
        return self._step


class NgramAttachment(WatchedAttachment):
    REQUIRED_GROUPS = (contract.NGRAM,)

    def _shape(self, worker: Any) -> tuple[int, int]:
        tokens = int(worker.speculative_num_draft_tokens)
        return tokens - 1, tokens


class MultiLayerAttachment(WatchedAttachment):
    """EAGLE with a draft layer for each position (multi-token prediction)."""

    REQUIRED_GROUPS = (contract.MULTI_LAYER,)

    def _shape(self, worker: Any) -> tuple[int, int]:
        return int(worker.speculative_num_steps), int(worker.speculative_num_draft_tokens)


class PlainAttachment(WatchedAttachment):
    """No speculation: K = 0 in every step. The worker is SGLang's `TpModelWorker`."""

    REQUIRED_GROUPS = (contract.PLAIN,)

    def _why_k_is_fixed(self, server_args: Any) -> str:
        return "the server runs without speculation"

    def _shape(self, worker: Any) -> tuple[int, int]:
        return 0, 1

    def step_after(self, step: OpenStep | None, result: Any, worker: Any, *args: Any, **kwargs: Any) -> None:
        self._step = None
        if step is None:
            return
        step.ended = self._clock.now()
        self._in_flight.result(step, [0] * len(step.request_ids), [True] * len(step.request_ids))
        self._report_when_due()


class OtherPluginAttachment(WatchedAttachment):
    """An algorithm that another plugin of SGLang has registered: never attached."""

    def worker_after(self, note: None, worker_class: Any, algorithm: Any, server_args: Any) -> None:
        name = known(algorithm, ("name",))["name"] or type(algorithm).__name__
        reason = f"speculative_algorithm={name} is another plugin's (only SGLang's own algorithms are supported)"
        log.warning("adaptive-spec: not attached: %s", reason)
        self.refuse(reason)


OF_WORKER: dict[str, type[WatchedAttachment]] = {"NGRAMWorker": NgramAttachment, "MultiLayerEagleWorkerV2": MultiLayerAttachment}
"""By the name of the worker class that SGLang has chosen."""
