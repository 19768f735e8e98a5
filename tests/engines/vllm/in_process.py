"""One run of the plugin in a real vLLM, without a server: engine, worker and a publisher of policies in one process.

    examples/vllm-cpu/run.sh python -m tests.engines.vllm.in_process '{"method": "eagle", ...}'

Policies with random K, random calibrations and random step times are published on a real policy page every few steps, so that K
and the verify lengths change all the time; outputs are compared with those of the target, which are known. Prints one JSON line.
Keys of the argument: method; async (asynchronous scheduling forced, with stand-ins for CUDA's streams); policy (random, keep);
requests; engine (arguments of vLLM's LLM); sampling (of SamplingParams); lora; faults; seed; models.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from adaptive_spec.domain.policy import Granularity, Mode, Policy
from adaptive_spec.domain.step_record import StepFlag, StepRecord
from adaptive_spec.domain.survival import GRID_POINTS, SurvivalMap
from adaptive_spec.engine_side.tap import PAGE_NAME, RING_NAME
from adaptive_spec.engines.common.server_demonstration import REGIONS, Prompt
from adaptive_spec.engines.vllm.cpu_kit import CpuKit
from adaptive_spec.wire.engine_report import read_report
from adaptive_spec.wire.policy_page import PolicyPage, payload_bytes
from adaptive_spec.wire.ring import RingReader

K, SEQS = 5, 8
CANDIDATES = (0, 1, 2, 3, 4, 5)
PUBLISH_S = 0.02


def force_async() -> None:
    """Let vLLM's CPU platform keep asynchronous scheduling, with stand-ins for what it takes from CUDA."""
    import torch
    from vllm.platforms.cpu import CpuPlatform

    checked = CpuPlatform.check_and_update_config.__func__

    def keep(cls: Any, config: Any) -> None:
        checked(cls, config)
        config.scheduler_config.async_scheduling = True

    class Nothing:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def __getattr__(self, name: str) -> Any:
            return lambda *_, **__: None

    stand_ins: Any = torch
    CpuPlatform.check_and_update_config = classmethod(keep)
    stand_ins.cuda.Stream = stand_ins.Event = stand_ins.cuda.Event = Nothing
    stand_ins.cuda.stream = lambda *_: contextlib.nullcontext()
    stand_ins.cuda.current_stream = lambda *_: Nothing()


def random_policy(version: int, dice: np.random.Generator) -> Policy:
    """K by batch size, calibration and step times at random: verification cheap or dear against the rest."""
    table = dice.integers(0, K + 1, (SEQS + 1, 1)).astype(np.uint8)
    fixed = np.full((K + 1, SEQS + 1), dice.uniform(0.001, 0.01), np.float32)
    verify = (0.001 + dice.choice([0.0, 0.001, 0.004]) * np.arange(SEQS * (K + 1) + 1)).astype(np.float32)
    slope = np.sort(dice.uniform(0.0, 1.0, (K, GRID_POINTS)), axis=1).astype(np.float32)
    return Policy(
        version, Mode.ACTIVE, True, Granularity.REQUEST, K, table, np.zeros(0, np.float32), fixed, verify, 0.0,
        SurvivalMap(slope, True), False,
    )  # fmt: skip


class Publisher:
    """Publishes a random policy every PUBLISH_S, in a thread; keep: none at all."""

    def __init__(self, runtime_dir: Path, seed: int, keep: bool) -> None:
        self._page = None if keep else PolicyPage.create_or_open(runtime_dir / PAGE_NAME, payload_bytes(SEQS, K))
        self._dice, self._ended = np.random.default_rng(seed), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        version = 0
        while self._page is not None and not self._ended.is_set():
            version += 1
            self._page.publish(random_policy(version, self._dice))
            self._page.heartbeat(time.monotonic_ns())
            self._ended.wait(PUBLISH_S)

    def end(self) -> None:
        self._ended.set()
        self._thread.join()


class Records:
    """Reads the ring in a thread, so that it does not wrap."""

    def __init__(self, path: Path) -> None:
        self._ring, self._ended = RingReader.open(path), threading.Event()
        self.records: list[StepRecord] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(0.02):
            self.records += self._ring.poll(256)

    def end(self) -> list[StepRecord]:
        self._ended.set()
        self._thread.join()
        while found := self._ring.poll(256):
            self.records += found
        return self.records


def main(asked: dict[str, Any]) -> dict[str, Any]:
    kit, seed = CpuKit(), int(asked.get("seed", 1))
    runtime_dir = Path(tempfile.mkdtemp(prefix="adaptive-spec-vllm-"))
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING", "ADAPTIVE_SPEC_MODE": asked.get("mode", "active"),
        "ADAPTIVE_SPEC_RUNTIME_DIR": str(runtime_dir), "ADAPTIVE_SPEC_INJECT_FAULT": asked.get("faults", ""),
    }  # fmt: skip
    if asked.get("async"):
        force_async()
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import StructuredOutputsParams

    models = str(asked.get("models", "models"))
    arguments: dict[str, Any] = {
        "model": str(kit.home / models / "target"), "dtype": "float32", "enforce_eager": True, "max_model_len": 512,
        "max_num_seqs": SEQS, "seed": 0, "kv_cache_memory_bytes": 1 << 27,
        "speculative_config": kit.speculative_config(asked.get("method", "eagle"), models, K, CANDIDATES, SEQS),
        "disable_log_stats": False,
    }  # fmt: skip
    if asked.get("lora"):
        arguments |= {"enable_lora": True, "max_lora_rank": 8}
    llm = LLM(**{"enable_prefix_caching": False, **arguments, **asked.get("engine", {})})
    dice = random.Random(seed)
    jobs = [
        (Prompt(dice.choice(REGIONS), dice.randrange(128)), dice.randrange(2, 40), dice.randrange(20, 120))
        for _ in range(int(asked.get("requests", 24)))
    ]
    prompts = [{"prompt_token_ids": prompt.ids(length)} for prompt, length, _ in jobs]
    more = dict(asked.get("sampling", {}))
    if "structured_outputs" in more:
        more["structured_outputs"] = StructuredOutputsParams(**more["structured_outputs"])
    sampling = [SamplingParams(**{"temperature": 0, "max_tokens": n, "ignore_eos": True, **more}) for _, _, n in jobs]
    lora = LoRARequest("small", 1, str(kit.home / models / "lora")) if asked.get("lora") else None
    attached = (runtime_dir / RING_NAME).exists()
    records = Records(runtime_dir / RING_NAME) if attached else None
    publisher = Publisher(runtime_dir, seed, asked.get("policy", "random") == "keep")
    begun_s = time.perf_counter()
    outputs: list[Any] = llm.generate(prompts, sampling, use_tqdm=False, lora_request=lora)
    seconds = time.perf_counter() - begun_s
    publisher.end()
    exact = 0
    for output, (prompt, length, n) in zip(outputs, jobs, strict=True):
        ids = list(output.outputs[0].token_ids)
        wanted = prompt.continuation(n, length)
        exact += len(ids) > 0 and ids == wanted[: len(ids)] and (len(ids) == n or len(ids) + length >= 64)
    own = {m.name: getattr(m, "value", None) for m in llm.get_metrics() if "spec_decode_num" in m.name or "preempt" in m.name}
    core: Any = llm.llm_engine.engine_core
    scheduler = core.engine_core.scheduler
    report = read_report(runtime_dir)
    found = records.end() if records is not None else []
    return {
        "exact": exact, "requests": len(jobs), "seconds": round(seconds, 2), "scheduler": type(scheduler).__name__,
        "lookup": scheduler.dynamic_sd_lookup, "vllm": own, "state": report.state if report else None,
        "reason": report.reason if report else "", "failures": dict(report.failures) if report else {},
        "level": report.level if report else None, **figures(found),
    }  # fmt: skip


def figures(records: list[StepRecord]) -> dict[str, Any]:
    """What the records say. Known confidences are counted by draft token, in steps that are neither CENSORED nor DISTURBED."""
    clean = [r for r in records if not r.flags & (StepFlag.CENSORED | StepFlag.DISTURBED)]
    return {
        "records": len(records), "invalid": sorted({r.invalid_reason() or "" for r in records} - {""}),
        "k": sorted({r.k for r in records}),
        "cut": sum(bool((r.verify_len < r.k).any()) for r in records),
        "ragged": sum(len(set(r.verify_len.tolist())) > 1 for r in records),
        "verified": sum(int(r.verify_len.sum()) for r in records),
        "accepted": sum(int(r.accept_len.sum()) for r in records),
        "batch_sizes": sorted({r.batch_size for r in records}),
        "disturbed": sum(bool(r.flags & StepFlag.DISTURBED) for r in records),
        "censored": sum(bool(r.flags & StepFlag.CENSORED) for r in records),
        "whole": sum(bool(r.flags & StepFlag.WHOLE) for r in records),
        "fallback": sum(bool(r.flags & StepFlag.FALLBACK) for r in records),
        "versions": len({r.policy_version for r in records}),
        "confidences": int(sum(np.count_nonzero(r.confidences) for r in clean)),
        "draft_tokens": int(sum(r.confidences.size for r in clean)),
        "sure_accepted": _rate(clean, 0.99, 1.01), "unsure_accepted": _rate(clean, 0.0, 0.8),
        "times_ms": [round(1e3 * float(np.median([getattr(r, t) for r in clean] or [0.0])), 3) for t in (
            "draft_s", "verify_s", "step_s")],
    }  # fmt: skip


def _rate(records: list[StepRecord], low: float, high: float) -> float | None:
    """Share of verified first draft tokens with a confidence in [low, high) that were accepted."""
    verified = accepted = 0
    for r in records:
        if r.k:
            rows = (r.verify_len > 0) & (r.confidences[:, 0] >= max(low, 1e-6)) & (r.confidences[:, 0] < high)
            verified += int(rows.sum())
            accepted += int((rows & (r.accept_len > 0)).sum())
    return round(accepted / verified, 3) if verified else None


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(main(json.loads(sys.argv[1]))) + "\n")
