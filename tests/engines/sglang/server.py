"""A real SGLang server on the CPU kit, started by `adaptive-spec serve`, and everything a test asks of it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from adaptive_spec.domain.step_record import StepRecord
from adaptive_spec.engine_side.tap import RING_NAME
from adaptive_spec.engines.common.server_demonstration import REGIONS, Prompt
from adaptive_spec.engines.sglang.cpu_kit import CpuKit
from adaptive_spec.wire.engine_report import EngineReport, read_report
from adaptive_spec.wire.ring import RingReader
from tests.support.models_anew import metrics_of
from tests.support.ring_trace import RingTrace

START_PATIENCE_S = 600.0
PATIENCE_S = 120.0
ANSWER_S = 60.0
"""Patience with an answer of the sidecar: on a machine with ten times the work it can do, 5 s were too few."""


class Answer(NamedTuple):
    """exact: the output is the target's own. meta: SGLang's meta_info."""

    exact: bool
    tokens: int
    meta: dict[str, Any]


@contextlib.contextmanager
def beside(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """Run `work` in a thread of its own meanwhile; it is told when to end."""
    ended = threading.Event()
    thread = threading.Thread(target=work, args=(ended,))
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def some_prompts(
    count: int, seed: int = 0, regions: str = REGIONS, tokens: tuple[int, int] = (40, 120)
) -> list[tuple[Prompt, int]]:
    """Prompts and how many tokens to ask for."""
    dice = random.Random(seed)
    return [(Prompt(dice.choice(regions), dice.randrange(128)), dice.randint(*tokens)) for _ in range(count)]


class SglangServer:
    """Server and sidecar; ended with everything they started when the block is left.

    direct: no `serve`, the server alone with the given environment. start_s: patience with its start.
    """

    def __init__(
        self, folder: Path, *, mode: str = "active", config: str = "", environment: dict[str, str] | None = None,
        direct: bool = False, start_s: float = START_PATIENCE_S, **flags: Any,
    ) -> None:  # fmt: skip
        self.kit, self._start_s = CpuKit(), start_s
        self.runtime_dir, self.profile_dir = folder / "run", folder / "profiles"
        self.port = _free_port()
        self.log = folder / "serve.log"
        server_flags = self.kit.server_flags(self.port, **flags)
        if direct:
            command = ["python", "-m", "sglang.launch_server", *server_flags]
        else:
            (folder / "config.yaml").write_text(config)
            command = ["adaptive-spec", "serve", "--mode", mode, "--runtime-dir", str(self.runtime_dir), "--port", "0"]
            command += ["--profile-dir", str(self.profile_dir), "--config", str(folder / "config.yaml"), "--", *server_flags]
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("ADAPTIVE_SPEC_")}
        kept = {k: v for k, v in os.environ.items() if k in ("ADAPTIVE_SPEC_SGLANG_HOME", "ADAPTIVE_SPEC_SGLANG_KIT")}
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                self.kit.command(*command), stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
                env={**inherited, **kept, **(environment or {})},
            )  # fmt: skip

    def __enter__(self) -> Self:
        try:
            self.wait(self.healthy, "the server to answer", self._start_s)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def _end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30.0)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    # -- asking the server ---------------------------------------------------------------------------------------------

    def healthy(self) -> bool:
        assert self.process.poll() is None, self.log_tail()
        with contextlib.suppress(OSError):
            return bool(_get(f"http://127.0.0.1:{self.port}/health", 2.0) is not None)
        return False

    def generate(self, prompt: Prompt, tokens: int) -> Answer:
        body = {"text": prompt.text, "sampling_params": {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            document = json.load(answer)
        ids = document["output_ids"]
        return Answer(ids == prompt.continuation(tokens), len(ids), document["meta_info"])

    def load(self, prompts: Sequence[tuple[Prompt, int]], concurrency: int) -> list[Answer]:
        """All the prompts, so many at once. Raises what a failed request raises."""
        with ThreadPoolExecutor(concurrency) as pool:
            return list(pool.map(lambda one: self.generate(*one), prompts))

    # -- asking the sidecar --------------------------------------------------------------------------------------------

    @property
    def sidecar(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads((self.runtime_dir / "sidecar.json").read_bytes())
        return document

    def status(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(_get(self.sidecar["url"] + "/status.json", ANSWER_S))
        return document

    def wait_status(self, condition: Callable[[dict[str, Any]], Any], what: str) -> dict[str, Any]:
        def look() -> dict[str, Any] | None:
            with contextlib.suppress(OSError, ValueError, KeyError):
                status = self.status()
                return status if condition(status) else None
            return None

        found: dict[str, Any] = self.wait(look, what)
        return found

    def metrics(self) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
        """Samples by name and labels, without the constant ones."""
        return metrics_of(_get(self.sidecar["url"] + "/metrics", ANSWER_S).decode())

    def total(self, name: str) -> float:
        """Sum of a metric over its labels."""
        return sum(self.metrics().get(name, {}).values())

    def report(self) -> EngineReport | None:
        return read_report(self.runtime_dir)

    def control(self, *arguments: str) -> str:
        command = self.kit.command("adaptive-spec", "ctl", *arguments, "--runtime-dir", str(self.runtime_dir))

        def answered() -> subprocess.CompletedProcess[str] | None:
            result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
            busy = "did not answer within" in result.stderr or "timed out" in result.stderr  # the machine: try again
            return None if busy else result

        result: subprocess.CompletedProcess[str] = self.wait(answered, "the sidecar to take a command")
        assert result.returncode == 0, result.stderr
        return result.stdout

    def settled(self) -> dict[str, Any]:
        """Status once every record of an idle server is counted."""
        return self.wait_status(lambda s: s["decode_steps"] and s["decode_steps"] == self._written(), "all records to be counted")

    def _written(self) -> int:
        """Records the engine has written."""
        with RingReader.open(self.runtime_dir / RING_NAME) as ring:
            return ring.cursor

    def kill_sidecar(self, number: int = signal.SIGKILL) -> int:
        pid = int(self.sidecar["pid"])
        os.kill(pid, number)
        return pid

    def wait(self, condition: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> Any:
        deadline_s = time.monotonic() + patience_s
        while time.monotonic() < deadline_s:
            value = condition()
            if value:
                return value
            time.sleep(0.1)
        raise AssertionError(f"in vain: waited for {what}\n{self.log_tail()}")

    def log_tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(line[:300] for line in lines[-40:])


@contextlib.contextmanager
def trace(server: SglangServer) -> Iterator[list[StepRecord]]:
    """Every record the engine writes meanwhile."""
    traced = RingTrace(server.runtime_dir)
    try:
        yield traced.records
    finally:
        traced.end()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def _get(url: str, timeout_s: float) -> bytes:
    with urllib.request.urlopen(url, timeout=timeout_s) as answer:
        data: bytes = answer.read()
        return data
