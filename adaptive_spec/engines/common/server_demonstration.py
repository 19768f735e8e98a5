"""The demonstration on a real server of any engine: traffic whose acceptance changes, checked outputs, and fixed K beside it.

Requests go through the server's HTTP API, and every output is compared with the target model's output, which is known. Half-way
the prompts change from high to low acceptance. To compare, alternating rounds of the same prompts (`rounds`) run with the
adaptive K, the server's own policy and pinned K. The duration counts from the first request.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import click

from adaptive_spec.client.server import LlmServer
from adaptive_spec.client.sidecar import ControlClient
from adaptive_spec.engines.common.ring_follower import RingFollower
from adaptive_spec.engines.common.rounds import ADAPTIVE, Arm, Rounds
from adaptive_spec.errors import BadInput
from adaptive_spec.sidecar.supervisor import end_with_parent

KINDS = {"predictable": "aabc", "erratic": "deff"}
"""Regions of each kind's prompts; see `Prompt`."""
CONCURRENCIES = (1, 4, 8, 2)
PHASE_S, KIND_S = 4.0, 30.0
TOKENS = (60, 160)
START_TIMEOUT_S = 900.0
"""A server that ended is known at once; a slow start, on a machine with other work, is waited for."""
SWEEP_TIMEOUT_S = 60.0
STATUS_INTERVAL_S = 0.5
REQUESTS = (1.0, 8.0)
"""Fewest and most requests of a round's phase, times its concurrency."""
PASS_S = 30.0
"""Seconds of all phases of a round on one arm, without a duration: 3 to 4 s a phase on an idle machine."""
LEAST_ROUNDS = 2
"""Rounds that a run with a duration and no number of rounds leaves time for."""


REGIONS = "abcdef"
REGION_TOKENS, SPECIAL_TOKENS = 128, 8


class Prompt(NamedTuple):
    """Two consecutive tokens of a region of the kits' models; the target model continues the cycle of the region's 128 tokens.

    region: "a" (every draft token is accepted) to "f" (none is). start: 0..127.
    """

    region: str
    start: int

    @property
    def text(self) -> str:
        return f"{self.region}{self.start} {self.region}{(self.start + 1) % REGION_TOKENS}"

    def ids(self, tokens: int = 2) -> list[int]:
        """Ids of the first tokens of the prompt's cycle."""
        base = SPECIAL_TOKENS + REGIONS.index(self.region) * REGION_TOKENS
        return [base + (self.start + i) % REGION_TOKENS for i in range(tokens)]

    def continuation(self, tokens: int, prompt_tokens: int = 2) -> list[int]:
        """Ids of the target's own greedy output."""
        return self.ids(prompt_tokens + tokens)[prompt_tokens:]


class Traffic:
    """Sends prompts and checks the outputs. failed: requests without an answer. wrong: outputs that differ from the target's."""

    def __init__(self, api: LlmServer, seed: int) -> None:
        self._api, self._random, self._lock = api, random.Random(seed), threading.Lock()
        self.checked = self.wrong = self.failed = 0

    def prompts(self, kind: str, count: int) -> list[tuple[Prompt, int]]:
        with self._lock:
            dice = self._random
            return [(Prompt(dice.choice(KINDS[kind]), dice.randrange(128)), dice.randint(*TOKENS)) for _ in range(count)]

    def one(self, prompt: Prompt, tokens: int) -> int:
        """Send one prompt; return the number of tokens received, 0 when it failed."""
        try:
            ids = self._api.generate(prompt.text, tokens).ids
        except (OSError, http.client.HTTPException, ValueError, KeyError):
            with self._lock:
                self.failed += 1
            time.sleep(0.1)
            return 0
        with self._lock:
            self.checked += 1
            self.wrong += ids != prompt.continuation(tokens)
        return len(ids)


class DemoServer:
    """The server of one demonstration, started with the plugin. engine: its name. command: starts it. api: asks it."""

    def __init__(self, engine: str, command: Sequence[str], api: LlmServer, runtime_dir: Path, log: Path) -> None:
        self.engine, self.api, self._log = engine, api, log
        environment = {**os.environ, "ADAPTIVE_SPEC_MODE": "active", "ADAPTIVE_SPEC_RUNTIME_DIR": str(runtime_dir)}
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                list(command), env=environment,
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, preexec_fn=end_with_parent,
            )  # fmt: skip

    def wait(self, stopping: threading.Event) -> None:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline_s and not stopping.is_set():
            self.check()
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError, KeyError, BadInput):
                if self.api.generate(Prompt("a", 0).text, 2).ids:
                    return
            time.sleep(0.25)
        if not stopping.is_set():
            raise BadInput(f"the {self.engine} server did not answer within {START_TIMEOUT_S:g} s")

    def check(self) -> None:
        """Raise BadInput when the server has ended."""
        if self._process.poll() is not None:
            lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
            raise BadInput(
                f"the {self.engine} server ended with status {self._process.returncode}: {lines[-1][:300] if lines else ''}"
            )

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(20.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


class Phase(NamedTuple):
    """Traffic of one kind, so many requests at once."""

    kind: str
    concurrency: int
    prompts: list[tuple[Prompt, int]]


class DemoPlan(NamedTuple):
    """What a run does.

    duration_s: None: until it is stopped, or until its rounds are done. rounds: alternating rounds before traffic goes on; None:
    none, or with `compare` as many as fit. compare: rounds with every K that the server runs at each batch size of the traffic,
    not the launch K alone.
    """

    duration_s: float | None
    seed: int
    rounds: int | None
    compare: bool


class Demonstration:
    """One run. Times are seconds since the first request. own: name and command of the server's own policy, if it has one."""

    def __init__(self, server: DemoServer, runtime_dir: Path, status_file: Path, plan: DemoPlan, own: Arm | None) -> None:
        self._server, self._runtime_dir, self._status_file, self._plan, self._own = server, runtime_dir, status_file, plan, own
        self._duration_s = plan.duration_s
        self._traffic = Traffic(server.api, plan.seed)
        self._follower = RingFollower(runtime_dir, KINDS)
        self._rounds: Rounds | None = None
        self._by_traffic: dict[str, dict[str, list[float]]] = {}
        """Tokens and seconds of the rounds by traffic and arm, rounds that were not counted included."""
        self._stage, self._kind, self._concurrency = "traffic", next(iter(KINDS)), 0
        self._started_s, self._tokens_per_s = time.monotonic(), 0.0
        self.stopping = threading.Event()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._started_s

    def run(self) -> None:
        writer = threading.Thread(target=self._report, daemon=True)
        try:
            self._server.wait(self.stopping)
            self._started_s = time.monotonic()
            self._follower.start()
            writer.start()
            if self._plan.rounds or self._plan.compare:
                self._sweep()
                self._alternate()
            if self._duration_s is not None or not self._rounds:
                self._go_on()
            time.sleep(0.1)
            self._follower.stop()
            self._write_status(done=True)
        finally:
            self.stopping.set()
            self._server.end()

    def _go_on(self) -> None:
        """Traffic until the end; its kind changes half-way."""
        self._stage, began_s = "traffic", self.elapsed_s
        for index, concurrency in enumerate(itertools.cycle(CONCURRENCIES)):
            if self._over():
                return
            since_s = self.elapsed_s - began_s
            kind = int(since_s / ((self._duration_s - began_s) / 2.0 if self._duration_s is not None else KIND_S))
            self._serve(
                list(KINDS)[min(kind, 1) if self._duration_s is not None else kind % 2],
                concurrency,
                began_s + (index + 1) * PHASE_S,
            )

    def _over(self) -> bool:
        self._server.check()
        return self.stopping.is_set() or (self._duration_s is not None and self.elapsed_s >= self._duration_s)

    def _serve(self, kind: str, concurrency: int, until_s: float) -> None:
        """Closed-loop traffic: `concurrency` requests at once until `until_s`."""
        self._kind, self._concurrency = kind, concurrency
        self._follower.kind = kind

        def one_after_another(_: int) -> None:
            while self.elapsed_s < until_s and not self._over():
                for prompt, tokens in self._traffic.prompts(kind, 1):
                    self._traffic.one(prompt, tokens)

        with ThreadPoolExecutor(concurrency) as pool:
            list(pool.map(one_after_another, range(concurrency)))

    def _sweep(self) -> None:
        """Traffic of every kind and concurrency until the sidecar has swept, for a quarter of the duration at most."""
        self._stage = "sweep"
        limit_s = min(self._duration_s / 4.0, SWEEP_TIMEOUT_S) if self._duration_s is not None else SWEEP_TIMEOUT_S
        turns = [(kind, concurrency) for concurrency in CONCURRENCIES for kind in KINDS]
        for index, (kind, concurrency) in enumerate(itertools.cycle(turns)):
            if self.elapsed_s >= limit_s or self._over() or (index >= len(turns) and not self._sweeping()):
                break
            self._serve(kind, concurrency, self.elapsed_s + limit_s / (4 * len(turns)))
        self._tokens_per_s = self._follower.output_tokens / max(self.elapsed_s, 1e-3)

    def _sweeping(self) -> bool:
        with contextlib.suppress(BadInput):
            return bool(self._sidecar().status()["mode"] == "sweep")
        return True

    def _sidecar(self) -> ControlClient:
        return ControlClient.find(self._runtime_dir, None, None)

    def _alternate(self) -> None:
        """The rounds; those of a run with a duration are as long as fits."""
        info, plan = self._follower.info, self._plan
        everywhere = set.intersection(*(set(info.allowed_k(batch_size)) for batch_size in CONCURRENCIES))
        fixed = sorted(everywhere) if plan.compare else [info.launch_k]
        arms = [Arm(ADAPTIVE, "active"), *([self._own] if self._own else []), *map(Arm.fixed, fixed)]
        self._rounds = rounds = Rounds(self._sidecar, arms, self.stopping)
        self._stage = "rounds"
        while not self._over() and (plan.rounds is None or len(rounds.found) < plan.rounds):
            rounds.run(self._phases(self._requests(len(arms))), self._send)
        self._follower.arm = ""
        rounds.release()

    def _requests(self, arms: int) -> float:
        """Requests of a phase, times its concurrency."""
        pass_s = PASS_S
        if self._duration_s is not None:
            assert self._rounds is not None  # made before the first round
            left = max((self._plan.rounds or LEAST_ROUNDS) - len(self._rounds.found), 1)
            pass_s = (self._duration_s - self.elapsed_s) / left / arms
        fewest, most = REQUESTS
        once_tokens = statistics.mean(TOKENS) * sum(CONCURRENCIES) * len(KINDS)
        return min(max(self._tokens_per_s * pass_s / once_tokens, fewest), most)

    def _phases(self, requests: float) -> list[Phase]:
        return [
            Phase(kind, concurrency, self._traffic.prompts(kind, int(requests * concurrency)))
            for concurrency in CONCURRENCIES
            for kind in KINDS
        ]

    def _send(self, phase: Phase) -> tuple[int, float]:
        """Tokens received, and seconds."""
        self._kind, self._concurrency = phase.kind, phase.concurrency
        self._follower.kind, self._follower.arm = phase.kind, self._rounds.arm if self._rounds else ""
        begun_s = time.perf_counter()
        with ThreadPoolExecutor(phase.concurrency) as pool:
            tokens = sum(pool.map(lambda one: self._traffic.one(*one), phase.prompts))
        seconds = time.perf_counter() - begun_s
        arms = self._by_traffic.setdefault(f"{phase.kind} x{phase.concurrency}", {})
        total = arms.setdefault(self._follower.arm, [0.0, 0.0])
        total[0] += tokens
        total[1] += seconds
        return tokens, seconds

    def _report(self) -> None:
        while not self.stopping.wait(STATUS_INTERVAL_S):
            self._write_status()

    def _status(self, done: bool) -> dict[str, Any]:
        traffic = self._traffic
        return {
            **self._follower.figures(), "engine": self._server.engine.lower(), "done": done,
            "elapsed_s": round(self.elapsed_s, 3),
            "stage": self._stage, "phase": {"kind": self._kind, "concurrency": self._concurrency},
            **(self._rounds.figures() if self._rounds else {}), "rounds_planned": self._plan.rounds,
            "by_traffic": {
                traffic: {arm: round(tokens / max(seconds, 1e-9), 1) for arm, (tokens, seconds) in arms.copy().items()}
                for traffic, arms in self._by_traffic.copy().items()
            },
            "lossless": traffic.checked > 0 and traffic.wrong == 0 and traffic.failed == 0,
            "lossless_checked": traffic.checked, "lossless_ties": 0, "failed_requests": traffic.failed,
        }  # fmt: skip

    def _write_status(self, done: bool = False) -> None:
        temporary = self._status_file.with_name(f".{self._status_file.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            temporary.write_text(json.dumps(self._status(done)))
            os.replace(temporary, self._status_file)
        except OSError as error:
            if done:
                click.echo(f"status {self._status_file}: cannot be written: {error.strerror}", err=True)


def free_port() -> int:
    """A port of the loopback interface that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def demonstrate(server: DemoServer, runtime_dir: Path, status_file: Path, plan: DemoPlan, own: Arm | None = None) -> None:
    """Run until the duration is over, the rounds are done, or SIGTERM or SIGINT. Raises BadInput when the server fails."""
    demonstration = Demonstration(server, runtime_dir, status_file, plan, own)

    def stop(_signal: int, _frame: FrameType | None) -> None:
        demonstration.stopping.set()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    demonstration.run()
