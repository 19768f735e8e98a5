"""The engine process of the demonstration: real traffic, decoded under the policy the sidecar publishes.

    python -m adaptive_spec.engines.embedded.worker --runtime-dir DIR --status FILE [--duration S] [--compare]

Without a sidecar it decodes with its launch K. While the sidecar sweeps, it holds the batch sizes it is asked
for. With --compare the adaptive arm runs alone until the sweep is over (a third of the duration at most), then blocks of the
same prompts alternate between it and every fixed K. It ends after --duration, or on SIGTERM or SIGINT; a last
status is written then.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import click
import numpy as np
import torch

from adaptive_spec.domain.policy import Mode
from adaptive_spec.engine_side.tap import EngineTap
from adaptive_spec.engines.embedded.compare import ADAPTIVE, Arm, Comparison, fixed_arms
from adaptive_spec.engines.embedded.decoder import Decoder, StepOutcome
from adaptive_spec.engines.embedded.load import CONCURRENCIES, Phase, PromptSource, phases
from adaptive_spec.engines.embedded.lossless import LosslessCheck
from adaptive_spec.engines.embedded.models import MAX_BATCH, MAX_K, Models, engine_info, load_models
from adaptive_spec.engines.embedded.requests import PrefixCache, Request
from adaptive_spec.engines.embedded.text import KINDS
from adaptive_spec.engines.embedded.weights import load_prompts
from adaptive_spec.errors import BadInput

STATUS_INTERVAL_S = 0.5
GOODPUT_WINDOW_S = 5.0
CHECK_INTERVAL_S = 3.0
"""Seconds between lossless checks of a finished request; one takes about 0.2 s."""
SIDECAR_WAIT_S = 3.0
_SWEEP_CONCURRENCY = 4


class AcceptanceCount:
    """Verified and accepted draft tokens by kind and position."""

    def __init__(self) -> None:
        self._counts = {kind: np.zeros((2, MAX_K), dtype=np.int64) for kind in KINDS}

    def add(self, kind: str, outcome: StepOutcome) -> None:
        positions = np.arange(MAX_K)
        for row, lengths in enumerate((outcome.verify_len, outcome.accept_len)):
            self._counts[kind][row] += (positions < lengths[:, None]).sum(axis=0)

    def rates(self) -> dict[str, list[float | None]]:
        """Accepted / verified by kind and position; None where nothing was verified."""
        return {kind: [round(int(a) / int(v), 4) if v else None for v, a in counts.T] for kind, counts in self._counts.items()}


class Worker:
    """One run. Times are seconds since its start; `stopping` ends it at the next step."""

    def __init__(
        self, models: Models, tap: EngineTap, status_file: Path, duration_s: float | None, concurrencies: Sequence[int], seed: int
    ) -> None:
        self.stopping = False
        self._models, self._tap, self._status_file = models, tap, status_file
        self._duration_s, self._concurrencies = duration_s, concurrencies
        self._source = PromptSource(load_prompts(), seed)
        self._prefixes = PrefixCache()
        self._decoder = Decoder(models.target, models.draft, tap, MAX_BATCH, MAX_K, self._prefixes, seed)
        self._acceptance = AcceptanceCount()
        self._lossless = LosslessCheck(exact=models.target.device.type == "cpu")
        self._comparison: Comparison | None = None
        self._window: deque[tuple[float, int, float]] = deque()
        self._stage, self._phase = "traffic", Phase(KINDS[0], concurrencies[0], 0.0)
        self._k = self._batch_size = 0
        self._started = time.monotonic()
        self._next_status = self._next_check = 0.0

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._started

    def run(self, compare: bool) -> None:
        """Serve until the duration is over or `stopping`; the last status says done."""
        self._write_status()
        if compare:
            self._run_comparison()
        else:
            for phase in phases(self._duration_s, self._concurrencies):
                self._serve(phase)
                if self._over():
                    break
        self._write_status(done=True)

    def _over(self) -> bool:
        return self.stopping or (self._duration_s is not None and self.elapsed_s >= self._duration_s)

    def _serve(self, phase: Phase) -> None:
        """Closed-loop traffic of one phase on the adaptive decoder."""
        self._phase = phase
        self._decoder.queue.clear()
        while self.elapsed_s < phase.ends_s and not self._over():
            while len(self._decoder.queue) < MAX_BATCH:
                self._decoder.submit(self._source.request(phase.kind))
            outcome = self._decoder.step(phase.concurrency)
            if outcome is not None:
                self._after_step(self._decoder, outcome)
            self._check_one(self._decoder.finished)
            self._decoder.finished.clear()

    def _run_comparison(self) -> None:
        self._stage = "sweep"
        limit_s = self._duration_s / 3.0 if self._duration_s is not None else 120.0
        while self._sweeping() and self.elapsed_s < limit_s and not self._over():
            self._serve(Phase(KINDS[0], _SWEEP_CONCURRENCY, self.elapsed_s + 0.2))
        self._drain()
        self._stage = "compare"
        arms = [Arm(ADAPTIVE, self._decoder), *fixed_arms(self._models, self._prefixes, range(MAX_K + 1))]
        self._comparison = Comparison(arms, self._source)
        began_s = self.elapsed_s
        for block, concurrency in enumerate(itertools.cycle(self._concurrencies)):
            if self._over():
                break
            if self._duration_s is not None:
                kind = KINDS[self.elapsed_s - began_s > (self._duration_s - began_s) / 2.0]
            else:
                kind = KINDS[block // len(self._concurrencies) % 2]
            self._phase = Phase(kind, concurrency, 0.0)
            if self._comparison.run_block(self._phase.kind, concurrency, self._after_step):
                self._check_one(self._comparison.last_requests)

    def _drain(self) -> None:
        """Let the running requests end, so that the first block begins with none."""
        self._decoder.queue.clear()
        while not self._decoder.idle and not self._over():
            outcome = self._decoder.step(MAX_BATCH)
            if outcome is not None:
                self._after_step(self._decoder, outcome)
        self._decoder.finished.clear()

    def _sweeping(self) -> bool:
        """Whether the controller sweeps; before its first policy, whether to wait for one."""
        policy = self._tap.planner.policy
        if policy is None:
            return self.elapsed_s < SIDECAR_WAIT_S
        return policy.mode is Mode.SWEEP

    def _after_step(self, decoder: Decoder, outcome: StepOutcome) -> bool:
        """Count a step of any arm; False when it is time to stop."""
        now = self.elapsed_s
        if decoder is self._decoder:
            self._k, self._batch_size = outcome.k, outcome.batch_size
            self._acceptance.add(self._phase.kind, outcome)
            self._window.append((now, outcome.output_tokens, outcome.step_s))
            while self._window[0][0] < now - GOODPUT_WINDOW_S:
                self._window.popleft()
        if now >= self._next_status:
            self._next_status = now + STATUS_INTERVAL_S
            self._write_status()
        return not self._over()

    def _check_one(self, ended: Sequence[Request]) -> None:
        """Every CHECK_INTERVAL_S, compare one ended request with the target alone."""
        now = self.elapsed_s
        if ended and now >= self._next_check:
            self._next_check = now + CHECK_INTERVAL_S
            self._lossless.check(self._models.target, ended[0])

    def _status(self, done: bool) -> dict[str, Any]:
        seconds = sum(step_s for _, _, step_s in self._window)
        comparison = self._comparison
        return {
            "engine": "embedded", "pid": os.getpid(), "done": done, "elapsed_s": round(self.elapsed_s, 3),
            "model": self._tap.info.model, "gpu": self._tap.info.gpu, "stage": self._stage,
            "phase": {"kind": self._phase.kind, "concurrency": self._phase.concurrency},
            "k": self._k, "batch_size": self._batch_size,
            "decode_steps": self._decoder.steps, "output_tokens": self._decoder.output_tokens,
            "decode_s": round(self._decoder.decode_s, 6),
            "goodput_tokens_per_s": sum(tokens for _, tokens, _ in self._window) / seconds if seconds else 0.0,
            "acceptance": self._acceptance.rates(),
            "compare": comparison.goodput() if comparison is not None else {},
            "compare_blocks": comparison.blocks if comparison is not None else 0,
            "lossless": self._lossless.lossless and (comparison is None or comparison.lossless),
            "lossless_checked": self._lossless.checked, "lossless_ties": self._lossless.ties,
        }  # fmt: skip

    def _write_status(self, done: bool = False) -> None:
        """Write the status file atomically. A write error does not stop the engine."""
        temporary = self._status_file.with_name(f".{self._status_file.name}.{os.getpid()}")
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
                json.dump(self._status(done), file)
            os.replace(temporary, self._status_file)
        except OSError as error:
            if done:
                click.echo(f"status {self._status_file}: cannot be written: {error.strerror}", err=True)


def _parse_concurrencies(text: str) -> tuple[int, ...]:
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(1 <= value <= MAX_BATCH for value in values):
        raise BadInput(f"--concurrency: must be numbers in 1..{MAX_BATCH} such as 1,4,16, got {text!r}")
    return values


@click.command(help=__doc__)
@click.option("--runtime-dir", type=click.Path(path_type=Path), required=True, help="folder shared with the sidecar")
@click.option("--status", "status_file", type=click.Path(path_type=Path), required=True, help="JSON file written every 0.5 s")
@click.option("--duration", type=click.FloatRange(min=0.0, min_open=True), help="seconds; default: until a signal")
@click.option("--compare", is_flag=True, help="run every fixed K on the same prompts too, in alternating blocks")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="of the traffic")
@click.option("--concurrency", default=",".join(map(str, CONCURRENCIES)), show_default=True, help="requests at once, in turn")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(1, 64), default=1, show_default=True, help="CPU threads of a forward")
def main(
    runtime_dir: Path, status_file: Path, duration: float | None, compare: bool, seed: int, concurrency: str, device: str,
    threads: int,
) -> None:  # fmt: skip
    torch.set_num_threads(threads)
    try:
        concurrencies = _parse_concurrencies(concurrency)
        if not status_file.parent.is_dir():
            raise BadInput(f"--status: {str(status_file)!r}: no such folder")
        models = load_models(device)
    except (BadInput, ValueError) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    tap = EngineTap.open(runtime_dir, engine_info(models))
    gc.freeze()  # loaded objects stay alive: garbage collection during a step need not traverse them
    worker = Worker(models, tap, status_file, duration, concurrencies, seed)

    def stop(_signal: int, _frame: FrameType | None) -> None:
        worker.stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    worker.run(compare)
    tap.close()


if __name__ == "__main__":
    main()
