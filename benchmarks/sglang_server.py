"""A real SGLang server on the CPU kit with and without the plugin: the overhead of observing, and the gain of adaptive K.

    python -m benchmarks.sglang_server overhead [--rounds N] [--models models-64m]
    python -m benchmarks.sglang_server adaptive [--rounds N] [--models models-64m]

Every arm is its own server. One of them runs at a time, the others are stopped (SIGSTOP). Each round gives every arm the same
prompts, in rotated order, so that background load affects all alike. Ratios are taken round by round; their median and quartiles
are printed. Latencies are those of plain PyTorch on a CPU.

overhead: CPU time of SGLang's scheduler process, in which the model and the plugin run, per decode step, one request at a time:
what other programs take is not in it, except for their share of caches and memory. Where the sidecar runs on cores of its own,
this is what the plugin costs. adaptive: goodput, output tokens of the whole block over its wall time at the client, prefills,
HTTP and the sidecar on the same cores included.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import click

from adaptive_spec.client.sglang import ServerApi
from adaptive_spec.client.sidecar import ControlClient
from adaptive_spec.engines.common.ring_follower import RingFollower
from adaptive_spec.engines.common.server_demonstration import Prompt
from adaptive_spec.engines.sglang.cpu_kit import CpuKit
from adaptive_spec.errors import BadInput

START_TIMEOUT_S = 240.0
PHASES = (("aab", 1), ("def", 1), ("aab", 8), ("eff", 8), ("abc", 4), ("cde", 4))
"""Regions of the prompts, and requests at once."""
PROMPTS_OF_A_ROUND = 4
WINDOW_S = 80.0
LOCK_VARIABLE = "BENCH_LOCK"
"""Environment variable with a file to lock exclusively while measuring, released every WINDOW_S; for shared machines."""
OTHERS_S = 30.0
"""Seconds between two windows, so that others get the lock, which is not fair."""


@dataclass
class Arm:
    """A server under one way of choosing K. rates: tokens/s by round."""

    name: str
    process: subprocess.Popen[bytes]
    api: ServerApi
    runtime_dir: Path
    rates: list[float] = field(default_factory=list)
    by_phase: dict[int, list[float]] = field(default_factory=dict)

    def signal(self, number: int) -> None:
        """Signal the server and all processes it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)
        with contextlib.suppress(OSError, ValueError, KeyError):
            os.kill(int(json.loads((self.runtime_dir / "sidecar.json").read_bytes())["pid"]), number)
        # `serve` starts the server in its own session.
        for child in _children(self.process.pid):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(child, number)


def _children(pid: int) -> list[int]:
    found = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *_children(int(child))]
    return found


def start(
    kit: CpuKit, folder: Path, name: str, models: str, candidates: Sequence[int], mode: str | None, flags: Sequence[str] = ()
) -> Arm:  # fmt: skip
    """Start a server; mode None: without the plugin. candidates: K it captures, none for no speculation. flags: more flags."""
    folder = folder / name
    folder.mkdir()
    (folder / "adaptive.json").write_text(
        json.dumps({"1": {"candidate_steps": list(candidates), "warmup_batches": 5, "update_interval": 3}})
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    k = 3 if 3 in candidates else max(candidates, default=0)
    flags = [*kit.server_flags(port, "EAGLE" if candidates else "", models, str(folder / "adaptive.json"), k), *flags]
    command = ["python", "-m", "sglang.launch_server", *flags]
    if mode is not None:
        command = [
            "adaptive-spec",
            "serve",
            "--mode",
            mode,
            "--runtime-dir",
            str(folder / "run"),
            "--profile-dir",
            str(folder / "p"),
        ]
        command += ["--port", "0", "--", *flags]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            kit.command(*command), stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )
    arm = Arm(name, process, ServerApi(f"http://127.0.0.1:{port}"), folder / "run")
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            raise BadInput(f"{name}: the server ended: {(folder / 'log').read_text(errors='replace')[-500:]}")
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{arm.api.url}/health", timeout=2):
            break
        time.sleep(0.5)
    block(arm, prompts("abcdef", 6, 0), 2)
    return arm


def prompts(regions: str, count: int, seed: int, tokens: int = 48) -> list[tuple[Prompt, int]]:
    generator = random.Random(seed)
    return [(Prompt(generator.choice(regions), generator.randrange(128)), tokens) for _ in range(count)]


def block(arm: Arm, requests: list[tuple[Prompt, int]], concurrency: int) -> float:
    """Tokens per second of one block; every output must equal the target's."""

    def one(request: tuple[Prompt, int]) -> int:
        prompt, tokens = request
        ids = arm.api.generate(prompt.text, tokens).ids
        if ids != prompt.continuation(tokens):
            raise BadInput(f"{arm.name}: an output differs from the target's")
        return len(ids)

    begun_s = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        total = sum(pool.map(one, requests))
    return total / (time.perf_counter() - begun_s)


@contextlib.contextmanager
def measuring() -> Iterator[None]:
    """Hold the lock named by LOCK_VARIABLE, if it is set."""
    path = os.environ.get(LOCK_VARIABLE)
    if not path:
        yield
        return
    import fcntl

    with open(path, "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def rounds(arms: Sequence[Arm], count: int, phases: Sequence[tuple[str, int]], requests: int) -> None:
    """All phases on every arm in turn, `count` times."""
    for arm in arms:
        arm.signal(signal.SIGSTOP)
    turn = 0
    while turn < count:
        if turn and os.environ.get(LOCK_VARIABLE):
            time.sleep(OTHERS_S)
        with measuring():
            until_s = time.monotonic() + WINDOW_S
            while turn < count and time.monotonic() < until_s:
                order = [*arms[turn % len(arms) :], *arms[: turn % len(arms)]]
                for arm in order:
                    arm.signal(signal.SIGCONT)
                    tokens = seconds = 0.0
                    for index, (regions, concurrency) in enumerate(phases):
                        batch = prompts(regions, max(requests * concurrency // 2, 2), 1000 * turn + index)
                        rate = block(arm, batch, concurrency)
                        arm.by_phase.setdefault(index, []).append(rate)
                        tokens += sum(n for _, n in batch)
                        seconds += sum(n for _, n in batch) / rate
                    arm.rates.append(tokens / seconds)
                    arm.signal(signal.SIGSTOP)
                turn += 1
                click.echo(f"round {turn}: " + "  ".join(f"{arm.name} {arm.rates[-1]:.1f}" for arm in arms))


def quartiles(ratios: Sequence[float]) -> str:
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return f"median {middle:.4f}, quartiles {low:.4f} .. {high:.4f}, n = {len(ratios)}"


@contextlib.contextmanager
def servers(started: list[Arm]) -> Iterator[None]:
    """End the servers with the block, also on SIGTERM: they are in sessions of their own, and most of them are stopped."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        for arm in started:
            arm.signal(signal.SIGCONT)
            arm.process.terminate()
        for arm in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                arm.process.wait(30)
            if arm.process.poll() is None:
                arm.signal(signal.SIGKILL)


@click.group(help=__doc__)
def main() -> None: ...


_rounds = click.option("--rounds", "count", type=click.IntRange(1), default=12, show_default=True)
_models = click.option("--models", type=click.Choice(["models", "models-64m"]), default="models-64m", show_default=True)


@main.command()
@_rounds
@_models
def overhead(count: int, models: str) -> None:
    """CPU time per step of SGLang alone, in shadow and in active mode. K is 3 on all arms, so that only the plugin differs."""
    kit = CpuKit()
    kit.install("--large")
    started: list[Arm] = []
    with tempfile.TemporaryDirectory() as folder, servers(started):
        for name, mode, candidates in (("without", None, (3,)), ("shadow", "shadow", (3,)), ("pinned", "active", (1, 3, 5))):
            # An idle scheduler would spin, and its CPU time would count.
            started.append(start(kit, Path(folder), name, models, candidates, mode, ["--sleep-on-idle"]))
            if name == "pinned":
                ControlClient.find(started[-1].runtime_dir, None, None).send("pin", 3)
            started[-1].signal(signal.SIGSTOP)
        steps_ms: dict[str, list[float]] = {arm.name: [] for arm in started}
        for turn in range(count):
            found = {}
            for arm in [*started[turn % len(started) :], *started[: turn % len(started)]]:
                arm.signal(signal.SIGCONT)
                found[arm.name] = _cpu_per_step(arm, prompts("abcdef", PROMPTS_OF_A_ROUND, turn, 60))
                arm.signal(signal.SIGSTOP)
            if len({steps for _, steps in found.values()}) > 1:
                raise BadInput(f"the arms did not run the same steps: {found}")
            for name, (seconds, steps) in found.items():
                steps_ms[name].append(1e3 * seconds / steps)
            click.echo(f"round {turn + 1}: " + "  ".join(f"{arm.name} {steps_ms[arm.name][-1]:.3f}" for arm in started) + " ms")
        base = steps_ms["without"]
        click.echo(f"without: {statistics.median(base):.3f} ms of CPU time a step, models {models}")
        for arm in started[1:]:
            mine = steps_ms[arm.name]
            more_us = statistics.median(1e3 * (a - b) for a, b in zip(mine, base, strict=True))
            ratio = quartiles([a / b for a, b in zip(mine, base, strict=True)])
            click.echo(f"{arm.name} / without: {ratio}; {more_us:+.0f} us a step")


def _cpu_per_step(arm: Arm, requests: list[tuple[Prompt, int]]) -> tuple[float, int]:
    """CPU seconds of the scheduler process and decode steps, one request after another."""
    pid = _scheduler(arm)
    arm.api.generate(requests[0][0].text, 4)  # what was waiting while it was stopped
    begun_s, steps = _cpu_s(pid), 0
    for prompt, tokens in requests:
        output = arm.api.generate(prompt.text, tokens)
        if output.ids != prompt.continuation(tokens):
            raise BadInput(f"{arm.name}: an output differs from the target's")
        steps += int(output.meta["spec_verify_ct"])
    return _cpu_s(pid) - begun_s, steps


def _scheduler(arm: Arm) -> int:
    for child in _children(arm.process.pid):
        with contextlib.suppress(OSError):
            if (Path("/proc") / str(child) / "cmdline").read_bytes().startswith(b"sglang::scheduler"):
                return child
    raise BadInput(f"{arm.name}: no scheduler process")


def _cpu_s(pid: int) -> float:
    """CPU time of all threads of another process: the kernel's clock of that process, to the nanosecond."""
    return time.clock_gettime((~pid << 3) | 2)


@main.command()
@_rounds
@_models
def adaptive(count: int, models: str) -> None:
    """Adaptive K against every static K and SGLang's own adaptive policy, on traffic that changes in kind and concurrency."""
    kit = CpuKit()
    kit.install("--large")
    started: list[Arm] = []
    with tempfile.TemporaryDirectory() as folder, servers(started):
        for name, candidates, mode in (
            ("adaptive", (0, 1, 3, 5), "active"), ("sglang-own", (0, 1, 3, 5), None),
            ("no-speculation", (), None), *((f"static-{k}", (k,), None) for k in (1, 3, 5)),
        ):  # fmt: skip
            started.append(start(kit, Path(folder), name, models, candidates, mode))
            if mode is not None:  # the first sweep, at each concurrency
                for seed, (regions, concurrency) in enumerate(PHASES):
                    block(started[-1], prompts(regions, 4 * concurrency, seed), concurrency)
                click.echo(f"swept: {ControlClient.find(started[-1].runtime_dir, None, None).status()['k_by_batch_size']}")
            started[-1].signal(signal.SIGSTOP)
        follower = RingFollower(started[0].runtime_dir, ["all"])
        follower.start()
        rounds(started, count, PHASES, 2)
        follower.stop()
        mine = started[0].rates
        for arm in started[1:]:
            click.echo(f"adaptive / {arm.name}: {quartiles([a / b for a, b in zip(mine, arm.rates, strict=True)])}")
        for index, (regions, concurrency) in enumerate(PHASES):
            figures = "  ".join(f"{arm.name} {statistics.median(arm.by_phase[index]):.1f}" for arm in started)
            click.echo(f"{regions} x{concurrency}: {figures} tokens/s")
        click.echo(f"K switched {follower.switches} times in {follower.steps} steps")


if __name__ == "__main__":
    sys.exit(main())
