"""What the vLLM plugin costs the server: CPU time of a step without it, in shadow, with a pinned K, and with lengths per request.

    python -m benchmarks.vllm_overhead [--rounds N] [--models models|models-64m] [--arm NAME ...] [--json OUT]

Every arm is a process with a real vLLM whose EngineCore and worker run in one thread, so that nothing spins while it waits and
CPU time is work; the arms with the plugin have a sidecar beside them. K is 5 in all of them. Each round gives every arm the same
prompts in rotated order; all but `lengths` run the same steps. Two figures, with quartiles over rounds:

    hooks       CPU time inside the plugin's hooks, and its share of the CPU time of all; both from the same steps, so that it
                holds on a busy machine too
    / without   ratio of the CPU time of a step to that of the arm without the plugin, in the same round: for a quiet machine

Not in it: the pickling of the worker's note from process to process.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click

from adaptive_spec.client.sidecar import ControlClient
from adaptive_spec.engines.common.hook_guard import Guard
from adaptive_spec.engines.common.server_demonstration import REGIONS, Prompt
from adaptive_spec.engines.vllm.cpu_kit import CpuKit
from adaptive_spec.errors import BadInput

K, TOKENS = 5, 60
ARMS = {"without": None, "shadow": "shadow", "pinned": "active", "lengths": "active"}
"""Mode of the plugin by arm."""
BATCHES = (1, 8)
"""Requests at once."""
START_TIMEOUT_S = 240.0
WARM_UP_BLOCKS = 6


class Stopwatch:
    """CPU seconds of this thread inside the plugin's hooks, without the microsecond of each hook's wrapper."""

    def __init__(self) -> None:
        self.seconds, self._depth = 0.0, 0

    def run(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._depth:
            return call(*args, **kwargs)
        self._depth, begun_s = 1, time.thread_time()
        try:
            return call(*args, **kwargs)
        finally:
            self._depth = 0
            self.seconds += time.thread_time() - begun_s

    def watch(self) -> None:
        """Measure all hooks that are made from now on."""
        around, part = Guard.around, Guard.part
        changed: Any = Guard

        def timed(call: Callable[..., Any] | None) -> Any:
            return call and functools.partial(self.run, call)

        changed.around = lambda guard, hook, before, after: around(guard, hook, timed(before), timed(after))
        changed.part = lambda guard, hook, call, *args: self.run(part, guard, hook, call, *args)


def serve(models: str) -> None:
    """The process of an arm: for each number on stdin, one block of prompts for each of `BATCHES`, and a JSON line of figures."""
    from vllm import LLM, SamplingParams

    stopwatch = Stopwatch()
    stopwatch.watch()
    kit = CpuKit()
    llm = LLM(
        model=str(kit.home / models / "target"), dtype="float32", enforce_eager=True, max_model_len=512, max_num_seqs=BATCHES[-1],
        seed=0, kv_cache_memory_bytes=1 << 28, enable_prefix_caching=False, disable_log_stats=False,
        speculative_config=kit.speculative_config("eagle", models, K, (K,), BATCHES[-1]),
    )  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)

    def steps() -> int:
        return sum(m.count for m in llm.get_metrics() if m.name == "vllm:iteration_tokens_total")

    sys.stdout.write("\nready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        number, found = int(line), {}
        for batch in BATCHES:
            prompts = [Prompt(REGIONS[(number + i) % len(REGIONS)], (7 * number + 16 * i) % 128) for i in range(BATCHES[-1])]
            before, cpu_s, begun_s, hooks_s = steps(), time.process_time(), time.perf_counter(), stopwatch.seconds
            for first in range(0, len(prompts) if batch > 1 else 2, batch):
                some = prompts[first : first + batch]
                outputs = llm.generate([{"prompt_token_ids": p.ids()} for p in some], sampling, use_tqdm=False)
                for output, prompt in zip(outputs, some, strict=True):
                    if list(output.outputs[0].token_ids) != prompt.continuation(TOKENS):
                        raise SystemExit("an output differs from the target's")
            cpu_s, hooks_s = time.process_time() - cpu_s, stopwatch.seconds - hooks_s
            found[batch] = (cpu_s, time.perf_counter() - begun_s, hooks_s, steps() - before)
        sys.stdout.write("\n" + json.dumps(found) + "\n")
        sys.stdout.flush()


class Arm:
    """A process of `serve`. cpu_ms, wall_ms, hooks_us: of a step by batch size and round. share: of the hooks in the CPU time."""

    def __init__(self, kit: CpuKit, folder: Path, name: str, models: str) -> None:
        self.name, self._log = name, folder / f"{name}.log"
        mode = ARMS[name]
        self.runtime_dir = folder / name
        plugin = {"ADAPTIVE_SPEC_MODE": mode, "ADAPTIVE_SPEC_RUNTIME_DIR": str(self.runtime_dir)} if mode else {}
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                kit.command("python", "-m", "benchmarks.vllm_overhead", "--serve", "--models", models), stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
                env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING", **plugin},
            )  # fmt: skip
        self.cpu_ms, self.wall_ms, self.hooks_us, self.share = ({batch: list[float]() for batch in BATCHES} for _ in range(4))
        self.steps = dict.fromkeys(BATCHES, 0)

    def read(self, start: str) -> str:
        """The next line of stdout that begins with `start`."""
        assert self.process.stdout is not None  # a pipe
        for line in self.process.stdout:
            if line.startswith(start):
                return str(line)
        raise BadInput(f"{self.name}: vLLM ended: {self._log.read_text(errors='replace')[-2000:]}")

    def block(self, number: int, keep: bool = True) -> None:
        assert self.process.stdin is not None  # a pipe
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        for text, (cpu_s, wall_s, hooks_s, steps) in json.loads(self.read("{")).items():
            if keep:
                batch = int(text)
                self.cpu_ms[batch].append(1e3 * cpu_s / steps)
                self.wall_ms[batch].append(1e3 * wall_s / steps)
                self.hooks_us[batch].append(1e6 * hooks_s / steps)
                self.share[batch].append(hooks_s / cpu_s)
                self.steps[batch] += steps


@contextmanager
def sidecar(arm: Arm, folder: Path, mode: str) -> Iterator[ControlClient]:
    """A sidecar of its own for an arm."""
    config, log_file = folder / f"{arm.name}.yaml", folder / f"{arm.name}-sidecar.log"
    config.write_text(f"controller: {{mode: {mode}}}\n")
    command = [
        sys.executable, "-m", "adaptive_spec.cli", "sidecar", "--config", str(config), "--runtime-dir", str(arm.runtime_dir),
        "--port", "0", "--profile-dir", str(folder / "profiles" / arm.name),
    ]  # fmt: skip
    with log_file.open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                client = ControlClient.find(arm.runtime_dir, None, None)
                if client.status().get("engine"):
                    break
            except BadInput:
                if process.poll() is not None or time.monotonic() > deadline_s:
                    raise BadInput(f"{arm.name}: no sidecar: {log_file.read_text(errors='replace')[-2000:]}") from None
            time.sleep(0.2)
        yield client
    finally:
        process.terminate()
        process.wait()


def quartiles(values: list[float], digits: int = 3) -> str:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


@click.command(help=__doc__)
@click.option("--rounds", type=click.IntRange(2), default=20, show_default=True)
@click.option("--models", type=click.Choice(["models", "models-64m"]), default="models-64m", show_default=True)
@click.option("--arm", "names", type=click.Choice(list(ARMS)), multiple=True, help="Arms to run; default: all.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="File to write the results to.")
@click.option("--serve", "as_arm", is_flag=True, hidden=True)
def main(rounds: int, models: str, names: tuple[str, ...], json_file: Path | None, as_arm: bool) -> None:
    if as_arm:
        serve(models)
        return
    kit = CpuKit()
    kit.install(*(("--large",) if models == "models-64m" else ()))
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        arms = [Arm(kit, folder, arm, models) for arm in ARMS if arm in names or not names]
        for arm in arms:
            stack.callback(arm.process.wait)
            stack.callback(arm.process.terminate)
        for arm in arms:
            arm.read("ready")
        for arm in arms:
            mode = ARMS[arm.name]
            client = stack.enter_context(sidecar(arm, folder, mode)) if mode else None
            if client is not None and arm.name == "pinned":
                client.send("pin", K)
            for number in range(WARM_UP_BLOCKS):  # of `lengths`, the sweep
                arm.block(-number, keep=False)
            if client is not None:
                click.echo(f"{arm.name}: mode {client.status()['mode']}")
        for number in range(1, rounds + 1):
            turn = number % len(arms)
            for arm in arms[turn:] + arms[:turn]:
                arm.block(number)
            figures = ", ".join(f"{a.name} " + " ".join(f"{a.cpu_ms[b][-1]:.3f}" for b in BATCHES) for a in arms)
            click.echo(f"round {number}: CPU ms per step at batch {BATCHES[0]} and {BATCHES[1]}: {figures}")
        result: dict[str, Any] = {"models": models, "rounds": rounds, "arms": {}}
        for batch in BATCHES:
            for arm in arms:
                text = f"batch {batch} {arm.name:8} {arm.steps[batch]} steps, CPU ms per step {quartiles(arm.cpu_ms[batch])}"
                if ARMS[arm.name]:
                    percent = [100.0 * share for share in arm.share[batch]]
                    text += f"; hooks {quartiles(arm.hooks_us[batch], 0)} us, {quartiles(percent, 2)} % of the CPU time"
                if arms[0].name == "without" and arm is not arms[0]:
                    ratios = [a / b for a, b in zip(arm.cpu_ms[batch], arms[0].cpu_ms[batch], strict=True)]
                    text += f"; / without {quartiles(ratios, 4)}"
                click.echo(text)
                result["arms"].setdefault(arm.name, {})[batch] = {
                    "cpu_ms": arm.cpu_ms[batch], "wall_ms": arm.wall_ms[batch], "hooks_us": arm.hooks_us[batch],
                    "share": arm.share[batch],
                }  # fmt: skip
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        sys.exit(str(error))
