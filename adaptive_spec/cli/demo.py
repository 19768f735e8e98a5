"""`adaptive-spec demo`: runs an engine and the sidecar as two processes and shows what they do until the end.

When the sidecar dies (try `kill -9`) the engine continues. A new sidecar is started, with growing delays, and continues from the
checkpoint. All files of the run are in one folder, in memory where possible, which is removed at the end.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from adaptive_spec.cli.demo_view import DemoState, DemoView
from adaptive_spec.cli.output_files import check_folder_of, write_json
from adaptive_spec.cli.processes import last_line, stop_signals
from adaptive_spec.client.sidecar import ADDRESS_NAME, ControlClient
from adaptive_spec.errors import BadInput
from adaptive_spec.sidecar.listening import check_port
from adaptive_spec.sidecar.supervisor import Supervisor, end, end_with_parent

UPDATE_S = 0.25
END_TIMEOUT_S = 30.0
START_TIMEOUT_S = 60.0
SWEEP_TOKENS, SWEEP_STEPS = 32, 500
CHECKPOINT_INTERVAL_S = 2.0
WORKERS = {
    "embedded": "adaptive_spec.engines.embedded.worker",
    "sglang": "adaptive_spec.engines.sglang.demo_worker",
    "vllm": "adaptive_spec.engines.vllm.demo_worker",
}


@dataclass(frozen=True)
class DemoOptions:
    """The options of `adaptive-spec demo`.

    duration_s None: until Ctrl-C, or until the rounds are done. profile_dir None: a new one for every run. rounds: alternating
    rounds of an SGLang or vLLM server, None: none. neighbours: programs beside the engine that take a core in bursts.
    """

    duration_s: float | None
    host: str
    port: int
    json_file: Path | None
    compare: bool
    seed: int
    profile_dir: Path | None
    engine: str = "embedded"
    rounds: int | None = None
    neighbours: int = 0


def run_demo(options: DemoOptions) -> int:
    """Run the demo; returns the exit status: 0, or 1 when an output differed from that of the target model alone.

    Raises BadInput when a requirement is missing and when the engine fails.
    """
    if options.engine == "embedded" and not all(importlib.util.find_spec(name) for name in ("torch", "safetensors")):
        raise BadInput(
            "demo: torch or safetensors is not installed: install the extra 'engine' (pip install '.[engine]' in a checkout)"
        )
    if options.json_file:
        check_folder_of(options.json_file, "--json")
    check_port(options.host, options.port)
    with _folder() as folder, stop_signals() as stopping:
        demo = _Demo(options, folder)
        try:
            state = demo.watch(stopping)
        finally:
            demo.end()
    document = result_document(state, options.neighbours)
    if options.json_file:
        write_json(options.json_file, document, "--json")
    demo.view.conclude(document, state)
    return 0 if document["lossless"] else 1


def result_document(state: DemoState, neighbours: int = 0) -> dict[str, Any]:
    """Return what `--json` writes."""
    engine, sidecar = state.engine, state.sidecar
    decode_s = engine.get("decode_s") or 0.0
    return {
        "engine": engine.get("engine", "embedded"),
        "duration_s": engine.get("elapsed_s", 0.0),
        "sweep_s": (sidecar.get("sweep") or {}).get("duration_s", 0.0),
        "decode_steps": engine.get("decode_steps", 0),
        "output_tokens": engine.get("output_tokens", 0),
        "goodput_tokens_per_s": engine.get("output_tokens", 0) / decode_s if decode_s else 0.0,
        "policy_swaps": sum((sidecar.get("swaps") or {}).values()),
        "boundaries": sidecar.get("boundaries", []),
        "calibration_error": (sidecar.get("calibration") or {}).get("ece"),
        "drift_events": sidecar.get("drift_events", {"latency": 0, "calibration": 0}),
        "lossless": bool(engine.get("lossless", False)),
        "compare": engine.get("compare") or {},
        "lossless_checked": engine.get("lossless_checked", 0),
        "compare_blocks": engine.get("compare_blocks", 0),
        "rounds_planned": engine.get("rounds_planned"),
        "rounds": engine.get("rounds", []),
        "arms": engine.get("arms", {}),
        "rounds_repeated": engine.get("rounds_repeated", 0),
        "ratios": engine.get("ratios", {}),
        "by_traffic": engine.get("by_traffic", {}),
        "k_switches": engine.get("k_switches"),
        "steps_not_as_asked": engine.get("steps_not_as_asked"),
        "acceptance": engine.get("acceptance", {}),
        "k_by_batch_size": sidecar.get("k_by_batch_size", {}),
        "jump_ratios": sidecar.get("jump_ratios", []),
        "sweep_steps": (sidecar.get("sweep") or {}).get("steps", 0),
        "sidecar_restarts": state.sidecar_restarts,
        "events": sidecar.get("events", []),
        "neighbours": neighbours,
        "model": engine.get("model"),
        "gpu": engine.get("gpu"),
    }


class _Demo:
    """The two processes of one run, and their newest state."""

    def __init__(self, options: DemoOptions, folder: Path) -> None:
        self._options, self._folder = options, folder
        self._runtime_dir, self._status_file = folder / "runtime", folder / "engine.json"
        settings = {
            "runtime_dir": str(self._runtime_dir),
            "profile_dir": str((options.profile_dir or folder / "profiles").absolute()),
            "host": options.host,
            "port": options.port,
            "checkpoint_interval_s": CHECKPOINT_INTERVAL_S,
            # The demo is short and its batches are small, so the sweep measures only the token counts they reach.
            "controller": {"sweep": {"max_tokens": SWEEP_TOKENS, "max_steps": SWEEP_STEPS}},
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
        self.state = DemoState(options.duration_s)
        self._engine: subprocess.Popen[bytes] | None = None
        self._neighbours: list[subprocess.Popen[bytes]] = []
        self._supervisor = Supervisor(self._start_sidecar, time.monotonic())
        self._client: ControlClient | None = None
        self._await_sidecar()
        arguments = ["--runtime-dir", str(self._runtime_dir), "--status", str(self._status_file), "--seed", str(options.seed)]
        if options.duration_s is not None:
            arguments += ["--duration", str(options.duration_s)]
        if options.compare:
            arguments.append("--compare")
        if options.rounds is not None:
            arguments += ["--rounds", str(options.rounds)]
        self._engine = self._start(WORKERS[options.engine], arguments, "engine.log")
        for n in range(options.neighbours):
            self._neighbours.append(self._start("adaptive_spec.cli.neighbour", [str(options.seed + n)], "neighbours.log"))
        self.view = DemoView(self._client.url if self._client else "")

    def watch(self, stopping: list[int]) -> DemoState:
        """Show the run until the engine ends or a stop signal comes. Raises BadInput if the engine fails."""
        engine = self._engine
        assert engine is not None  # started in __init__
        stopped_s: float | None = None
        with self.view:
            while engine.poll() is None:
                self._update()
                self.view.show(self.state)
                if stopping and stopped_s is None:
                    stopped_s = time.monotonic()
                    engine.terminate()
                if stopped_s is not None and time.monotonic() - stopped_s > END_TIMEOUT_S:
                    engine.kill()
                time.sleep(UPDATE_S)
            time.sleep(2 * UPDATE_S)  # so that the sidecar reads the last records
            self._update()
        if engine.returncode != 0:
            raise BadInput(f"demo: the engine ended with status {engine.returncode}: {last_line(self._folder / 'engine.log')}")
        return self.state

    def end(self) -> None:
        """Stop all processes."""
        for process in (*self._neighbours, self._engine, self._supervisor.process):
            if process is not None:
                end(process)

    def _update(self) -> None:
        self._supervisor.look(time.monotonic())
        self.state.sidecar_restarts = self._supervisor.restarts
        with contextlib.suppress(OSError, ValueError):
            self.state.engine = json.loads(self._status_file.read_bytes())
        try:
            url = json.loads((self._runtime_dir / ADDRESS_NAME).read_bytes())["url"]
            self.state.sidecar = ControlClient(url, timeout_s=1.0).status()
            self.state.sidecar_answers = True
        except (BadInput, OSError, ValueError, KeyError):
            self.state.sidecar_answers = False

    def _await_sidecar(self) -> None:
        """Wait until the first sidecar serves. Raises BadInput with its last line when it ends, and on a timeout."""
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline_s:
            with contextlib.suppress(BadInput):
                self._client = ControlClient.find(self._runtime_dir, None, None)
                return
            if self._supervisor.process.poll() is not None:
                raise BadInput(last_line(self._folder / "sidecar.log").removeprefix("adaptive-spec: "))
            time.sleep(0.05)
        self.end()
        raise BadInput(f"demo: the sidecar did not start within {START_TIMEOUT_S:g} s")

    def _start_sidecar(self) -> subprocess.Popen[bytes]:
        return self._start("adaptive_spec.cli", ["sidecar", "--config", str(self._folder / "config.yaml")], "sidecar.log")

    def _start(self, module: str, arguments: list[str], log: str) -> subprocess.Popen[bytes]:
        with (self._folder / log).open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, preexec_fn=end_with_parent,
            )  # fmt: skip


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """Yield a new folder for this run, in /dev/shm where that exists; it is removed afterwards."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="adaptive-spec-demo-", dir=memory if memory.is_dir() else None))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
