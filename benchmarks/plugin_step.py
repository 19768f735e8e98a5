"""Python time that the SGLang plugin adds to one decode step of an EAGLE server, by rows and by what decides K.

The real hooks (`EagleAttachment`, its guard, tap, ring and policy page) run around functions that do nothing in place of
SGLang's; the same functions without hooks are taken off. Included: PyTorch's calls for the draft confidences, on a vocabulary
of 32, so without their arithmetic (see `benchmarks.confidences`). Not included: SGLang's own hook registry, and the sidecar,
which is another process. Times are CPU time of the thread, so what other programs take is not in them, except for their
share of the caches.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import click
import numpy as np
import torch
from numpy.typing import NDArray

from adaptive_spec.domain.policy import Granularity, Mode, Policy
from adaptive_spec.domain.survival import GRID_POINTS, SurvivalMap
from adaptive_spec.engine_side.tap import PAGE_NAME, RING_NAME
from adaptive_spec.engines.common.hook_guard import Guard
from adaptive_spec.engines.common.plugin_settings import PluginSettings
from adaptive_spec.engines.sglang.attachment import Place
from adaptive_spec.engines.sglang.eagle_attachment import EagleAttachment
from adaptive_spec.wire.policy_page import PolicyPage, payload_bytes
from adaptive_spec.wire.ring import RingReader
from benchmarks.surroundings import folder_in_memory

K, CANDIDATES, MAX_BATCH, VOCABULARY = 3, (1, 3, 5, 7), 256, 32
ROWS = (1, 64, 256)
QUANTILES = {"p10": 0.1, "median": 0.5, "p99": 0.99}


class Case(NamedTuple):
    """What decides K, and the plugin's mode. policy: mode of the policy on the page. None of them: SGLang's own policy."""

    name: str
    mode: Literal["shadow", "active"]
    policy: Mode


CASES = (
    Case("shadow", "shadow", Mode.ACTIVE), Case("active, K pinned", "active", Mode.PINNED),
    Case("active, with step choice", "active", Mode.ACTIVE),
)  # fmt: skip


class OwnPolicy:
    """In place of SGLang's own policy; decides K = 3 and learns nothing, so that only our calls are measured."""

    candidate_steps = CANDIDATES

    def set_cuda_graph_bs(self, cuda_graph_bs: list[int] | None) -> None: ...

    def cuda_graph_bs_for_step(self, step: int) -> list[int] | None:
        return None

    def get_steps_for_batch(self, batch_size: int) -> int:
        return K

    def on_verify_complete(self, counts: list[int], batch_size: int) -> None: ...


class Server:
    """The objects of SGLang that the hooks touch, and one decode step in SGLang's order of calls. hooked: with the plugin."""

    def __init__(self, folder: Path, case: Case, rows: int, hooked: bool) -> None:
        outputs = SimpleNamespace(logits_output=SimpleNamespace(next_token_logits=torch.rand(rows, VOCABULARY)))
        self._draft = SimpleNamespace(
            draft_runner=SimpleNamespace(forward=lambda *_: outputs),
            speculative_num_steps=K,
            cuda_graph_runner_for_draft_extend=None,
        )
        self._worker = SimpleNamespace(
            device="cpu", topk=1, speculative_num_steps=K, _draft_worker=self._draft,
            _target_worker=SimpleNamespace(model_runner=SimpleNamespace(max_running_requests=MAX_BATCH)),
            adaptive_controller=SimpleNamespace(_states=dict.fromkeys(CANDIDATES)),
            server_args=SimpleNamespace(model_path="/model"),
        )  # fmt: skip
        self._policy: Any = OwnPolicy()
        names = ("step", "draft", "draft_forward", "verify", "draft_extend", "results")
        self._around: dict[str, Callable[..., Any]] = {name: lambda original, *args: original(*args) for name in names}
        self.attachment: EagleAttachment | None = None
        if hooked:
            guard = Guard("SGLang", "")
            side = self.attachment = EagleAttachment(PluginSettings(case.mode, folder), guard, "sglang benchmark")
            side._supported = True
            side._place = lambda: Place(0, 1)  # type: ignore[method-assign]  # no process groups here
            self._policy = side.draft_policy(self._worker, self._policy)
            self._worker.adaptive_controller.params = self._policy
            side.attach(lambda _: None, self._worker)
            for name in names:
                before, after, first = (getattr(side, f"{name}_{part}", None) for part in ("before", "after", "first"))
                self._around[name] = guard.around(name, before, after, first)
            self.guard = guard
        mode = SimpleNamespace(is_extend=lambda: False, is_idle=lambda: False)
        requests = [SimpleNamespace(rid=f"{i:032x}", is_retracted=False, finished=lambda: False) for i in range(rows)]
        self._batch = SimpleNamespace(
            forward_mode=mode, is_extend_in_batch=False, reqs=requests, seq_lens_sum=rows * 800, has_grammar=False,
            return_logprob=False, spec_info=SimpleNamespace(topk_p=torch.full((rows, 1), 0.9)),
        )  # fmt: skip
        self._rows, self._accepted = rows, [2] * rows

    def step(self) -> None:
        around = self._around
        result = around["step"](self._forward, self._worker, self._batch)
        around["results"](lambda *_: [], None, result, self._batch)
        self._policy.on_verify_complete(self._accepted, self._rows)

    def _forward(self, worker: Any, batch: Any) -> Any:
        around, draft = self._around, self._draft
        self._policy.get_steps_for_batch(self._rows)
        around["draft"](lambda *_: around["draft_forward"](self._draft_forwards, draft, batch), draft, batch)
        around["verify"](lambda *_: None, worker, batch)
        result = SimpleNamespace(num_correct_drafts_per_req_cpu=self._accepted, next_draft_input=batch.spec_info)
        around["draft_extend"](lambda *_: draft.draft_runner.forward(), draft, batch, result)
        return result

    def _draft_forwards(self, *_arguments: Any) -> None:
        for _ in range(K - 1):
            self._draft.draft_runner.forward()


def page_policy(mode: Mode) -> Policy:
    """K = 3 throughout, on a staircase of 64-token tiles."""
    tokens = np.arange(MAX_BATCH * (max(CANDIDATES) + 1) + 1)
    staircase = (4e-3 + 1e-6 * tokens + 1.2e-3 * (np.maximum(tokens - 1, 0) // 64)).astype(np.float32)
    max_k = max(CANDIDATES)
    return Policy(
        1, mode, True, Granularity.BATCH, max_k, np.full((MAX_BATCH + 1, 1), K, np.uint8), np.zeros(0, np.float32),
        np.full((max_k + 1, MAX_BATCH + 1), 1e-3, np.float32), staircase, 0.0,
        SurvivalMap(np.full((max_k, GRID_POINTS), 0.7, np.float32), True), True, switch_s=1e-4,
    )  # fmt: skip


def _times_ns(server: Server, page: PolicyPage, steps: int) -> NDArray[np.float64]:
    clock, taken = time.thread_time_ns, np.empty(steps)
    gc.disable()
    try:
        for i in range(-min(steps, 100), steps):
            if i % 256 == 0 or (i < 0 and i % 50 == 0):
                page.heartbeat(time.monotonic_ns())
            begun = clock()
            server.step()
            if i >= 0:
                taken[i] = clock() - begun
    finally:
        gc.enable()
    return taken


def _quantiles_us(taken_ns: NDArray[np.float64]) -> dict[str, float]:
    return {name: float(np.quantile(taken_ns, q)) / 1e3 for name, q in QUANTILES.items()}


def measure(folder: Path, case: Case, rows: int, steps: int) -> dict[str, float]:
    """What the plugin adds to a step, microseconds: quantiles, each less that of a step without it.

    The tenth percentile is what other programs' use of the caches disturbs least.
    """
    with PolicyPage.create_or_open(folder / PAGE_NAME, payload_bytes(MAX_BATCH, max(CANDIDATES))) as page:
        page.publish(page_policy(case.policy))
        page.heartbeat(time.monotonic_ns())
        with_plugin = Server(folder, case, rows, True)
        hooked = _quantiles_us(_times_ns(with_plugin, page, steps))
        plain = _quantiles_us(_times_ns(Server(folder, case, rows, False), page, steps))
    attachment = with_plugin.attachment
    assert attachment is not None  # a hooked server has one
    assert attachment._tap is not None  # it attached
    reader = RingReader.open(folder / RING_NAME, "oldest")
    records = reader.poll(4096)
    reader.close()
    unlike = [r for r in records[-64:] if r.batch_size != rows or r.k != K or bool(r.policy_version) != (case.mode == "active")]
    if with_plugin.guard.failures or attachment._tap.counters.hook_failures or not records or unlike:
        raise RuntimeError(f"{case.name}: not what was to be measured: {dict(with_plugin.guard.failures)}, {unlike[:1]}")
    return {name: round(hooked[name] - plain[name], 1) for name in hooked}


@click.command()
@click.option("--steps", type=click.IntRange(100, 1_000_000), default=3000, show_default=True, help="Steps measured each.")
def main(steps: int) -> None:
    """Measure the Python time of the SGLang plugin in one decode step."""
    torch.set_num_threads(1)
    click.echo(f"{'added to a step, K 3, in us':40s} {'rows':>5s}" + "".join(f"{name:>10s}" for name in QUANTILES))
    for case in CASES:
        for rows in ROWS:
            with folder_in_memory() as folder:
                figures = measure(folder, case, rows, steps)
            click.echo(f"{case.name:40s} {rows:5d}" + "".join(f"{figures[name]:10.1f}" for name in QUANTILES))


if __name__ == "__main__":
    main()
