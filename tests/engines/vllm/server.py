"""A real vLLM server on the CPU kit, started by `adaptive-spec serve`, and everything a test asks of it."""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import subprocess
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from adaptive_spec.client.sidecar import ControlClient
from adaptive_spec.client.vllm import ServerApi
from adaptive_spec.domain.step_record import StepRecord
from adaptive_spec.engine_side.tap import RING_NAME
from adaptive_spec.engines.common.server_demonstration import REGIONS, Prompt, free_port
from adaptive_spec.engines.vllm.cpu_kit import MODEL, SERVER_MODULE, CpuKit
from adaptive_spec.errors import BadInput
from adaptive_spec.wire.engine_report import EngineReport, read_report
from adaptive_spec.wire.ring import RingReader
from tests.support.models_anew import Metrics, metrics_of

START_PATIENCE_S = 1800.0
PATIENCE_S = 600.0


class VllmServer:
    """Server and sidecar; ended with everything they started when the block is left. direct: the server alone, no `serve`."""

    def __init__(
        self, kit: CpuKit, folder: Path, *, mode: str = "active", direct: bool = False, environment: dict[str, str] | None = None,
        config: str = "", **flags: Any,
    ) -> None:  # fmt: skip
        self.runtime_dir, self.port, self.log = folder / "run", free_port(), folder / "serve.log"
        server_flags = kit.server_flags(self.port, **flags)
        command = ["python", "-m", SERVER_MODULE, *server_flags]
        if not direct:
            (folder / "config.yaml").write_text(config)
            command = ["adaptive-spec", "serve", "--engine", "vllm", "--mode", mode, "--runtime-dir", str(self.runtime_dir)]
            command += ["--port", "0", "--profile-dir", str(folder / "profiles"), "--config", str(folder / "config.yaml")]
            command += ["--", *server_flags]
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("ADAPTIVE_SPEC_")}
        kept = {k: v for k, v in os.environ.items() if k in ("ADAPTIVE_SPEC_VLLM_HOME", "ADAPTIVE_SPEC_VLLM_KIT")}
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                kit.command(*command), stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
                env={**inherited, **kept, **(environment or {})},
            )  # fmt: skip
        self.api = ServerApi(f"http://127.0.0.1:{self.port}", model=MODEL)

    def __enter__(self) -> Self:
        try:
            self.wait(self.healthy, "the server to answer", START_PATIENCE_S)
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
                self.process.wait(60.0)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def healthy(self) -> bool:
        assert self.process.poll() is None, self.log.read_text(errors="replace")[-3000:]
        with contextlib.suppress(OSError, http.client.HTTPException):
            return len(self.api.generate(Prompt("a", 0).text, 2).ids) == 2
        return False

    def wait(self, condition: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> Any:
        deadline_s = time.monotonic() + patience_s
        while time.monotonic() < deadline_s:
            found = condition()
            if found:
                return found
            time.sleep(0.1)
        raise AssertionError(f"waited {patience_s:g} s for {what}: {self.log.read_text(errors='replace')[-3000:]}")

    def exact(self, count: int, concurrency: int, seed: int = 0) -> int:
        """Send random prompts; return how many outputs are the target's own."""
        dice = random.Random(seed)
        jobs = [(Prompt(dice.choice(REGIONS), dice.randrange(128)), dice.randint(30, 100)) for _ in range(count)]
        with ThreadPoolExecutor(concurrency) as pool:
            ids = list(pool.map(lambda job: self.api.generate(job[0].text, job[1]).ids, jobs))
        return sum(got == prompt.continuation(n) for got, (prompt, n) in zip(ids, jobs, strict=True))

    def sidecar(self) -> ControlClient:
        def find() -> ControlClient | None:
            with contextlib.suppress(BadInput):
                client = ControlClient.find(self.runtime_dir, None, None)
                return client if client.status().get("engine") else None
            return None

        found: ControlClient = self.wait(find, "the sidecar with an engine")
        return found

    def report(self) -> EngineReport:
        found = read_report(self.runtime_dir)
        assert found is not None
        return found

    def settled(self) -> dict[str, Any]:
        """The sidecar's status once it has counted every record of an idle server."""
        client = self.sidecar()

        def counted() -> dict[str, Any] | None:
            with self.ring() as ring:
                status = client.status()
                return status if status["decode_steps"] == ring.cursor > 0 else None

        found: dict[str, Any] = self.wait(counted, "all records to be counted")
        return found

    def ring(self) -> RingReader:
        return RingReader.open(self.runtime_dir / RING_NAME)

    def metrics(self) -> Metrics:
        """The sidecar's metrics."""
        return metrics_of(urllib.request.urlopen(self.sidecar().url + "/metrics", timeout=10.0).read().decode())

    def own_counter(self, name: str) -> float:
        """The sum of one of vLLM's own counters."""
        page = urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10.0).read().decode()
        return sum(float(line.rsplit(" ", 1)[1]) for line in page.splitlines() if line.startswith(f"{name}{{"))


def all_records(ring: RingReader) -> list[StepRecord]:
    found: list[StepRecord] = []
    while some := ring.poll(256):
        found += some
    return found
