"""`adaptive-spec sweep --url`: a cold-start sweep of a running SGLang or vLLM server, one batch size after the other.

These engines have no command to hold a batch size, but they have one when that many requests run. This keeps 1, 2, 4, ...
requests running through the server's HTTP API and lets the sidecar try every captured K at each size. The models accumulate in
the sidecar.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from adaptive_spec.client import sglang, vllm
from adaptive_spec.client.server import HeldBatch, LlmServer
from adaptive_spec.client.sidecar import ControlClient
from adaptive_spec.client.tls import ClientTls
from adaptive_spec.domain.policy import Mode
from adaptive_spec.errors import BadInput

LARGEST_DEFAULT = 64
REQUEST_TOKENS = 256
FILL_TIMEOUT_S = 60.0
SETTLE_S = 0.5
"""Wait after the last prefill, so that the sidecar has seen a step of the full batch."""
POLL_S = 0.1
PROMPTS = (
    "Explain step by step how a suspension bridge carries its load to the ground.",
    "Write a Python function that merges two sorted lists, and its tests.",
    "Summarise the causes of the industrial revolution in ten sentences.",
    "List the planets of the solar system with their moons and distances.",
)


def is_sidecar(url: str, runtime_dir: Path, tls: ClientTls) -> bool:
    """Whether a sidecar answers at this address, not an LLM server."""
    try:
        return "sidecar_pid" in ControlClient.find(runtime_dir, url, None, tls).status()
    except BadInput:
        return False


def server_api(url: str, api_key: str, client: ControlClient) -> LlmServer:
    """Client of the server at a URL: of the engine that is attached to the sidecar, of SGLang where none is. Raises BadInput."""
    engine = client.status().get("engine") or {}
    return vllm.ServerApi(url, api_key) if engine.get("name") == "vllm" else sglang.ServerApi(url, api_key)


def default_batch_sizes(largest: int) -> list[int]:
    """Return 1, 2, 4, ... and the largest itself, up to LARGEST_DEFAULT."""
    limit = min(max(largest, 1), LARGEST_DEFAULT)
    return sorted({size for size in (1 << e for e in range(limit.bit_length())) if size <= limit} | {limit})


def parse_batch_sizes(text: str, largest: int) -> list[int]:
    """Parse "1,2,8". Raises BadInput."""
    try:
        sizes = sorted({int(part) for part in text.split(",")})
    except ValueError:
        sizes = []
    if not sizes or sizes[0] < 1 or sizes[-1] > largest:
        raise BadInput(f"--batch-sizes: must be whole numbers in 1..{largest}, like 1,2,4,8, got {text!r}")
    return sizes


def read_prompts(path: Path | None) -> Sequence[str]:
    """Read one prompt per line; None: the built-in prompts. Raises BadInput."""
    if path is None:
        return PROMPTS
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--prompts: '{path}': cannot be read") from error
    if not prompts:
        raise BadInput(f"--prompts: '{path}': file is empty; must contain one prompt per line")
    return prompts


def sweep_server(
    api: LlmServer,
    client: ControlClient,
    batch_sizes: str | None,
    prompts: Sequence[str],
    timeout_s: float,
    tokens: int = REQUEST_TOKENS,
) -> None:
    """Sweep all batch sizes. Raises BadInput when server or sidecar refuse, or a batch size takes longer than timeout_s."""
    largest = api.max_running_requests() or LARGEST_DEFAULT
    engine = client.status().get("engine")
    if engine is None:
        raise BadInput(
            f"{client.url}: no engine is attached to this sidecar; run the server with the plugin, see adaptive-spec doctor"
        )
    largest = min(largest, int(engine["max_batch"]))
    sizes = parse_batch_sizes(batch_sizes, largest) if batch_sizes else default_batch_sizes(largest)
    columns = (
        TextColumn("sweep"), BarColumn(), TextColumn("{task.completed} of {task.total} batch sizes, {task.fields[doing]}"),
        TimeElapsedColumn(),
    )  # fmt: skip
    steps = 0
    with Progress(*columns, console=Console(stderr=True, markup=False, emoji=False)) as progress:
        task = progress.add_task("sweep", total=len(sizes), doing="")
        for size in sizes:
            progress.update(task, doing=f"filling a batch of {size}")
            with HeldBatch(api, size, prompts, tokens) as batch:
                if not batch.wait(FILL_TIMEOUT_S):
                    reason = batch.failure or f"{size} concurrent requests did not start within {FILL_TIMEOUT_S:g} s"
                    raise BadInput(f"--url: '{api.url}': {reason}")
                time.sleep(SETTLE_S)
                progress.update(task, doing=f"every K at batch size {size}")
                client.send("resweep")
                steps += _await_sweep_end(client, batch, timeout_s, size)
            progress.advance(task)
    status = client.status()
    boundaries = ", ".join(map(str, status["boundaries"])) or "none"
    table = ", ".join(f"{b}: {k}" for b, k in status["k_by_batch_size"].items())
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(f"sweep finished: batch sizes {', '.join(map(str, sizes))}, {steps} steps, tile boundaries {boundaries}")
    console.print(f"K by batch size {table}")


def _await_sweep_end(client: ControlClient, batch: HeldBatch, timeout_s: float, size: int) -> int:
    """Wait until the sidecar's sweep at this batch size ends; returns its trial steps. Raises BadInput."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        status = client.status()
        if status["mode"] == Mode.SHADOW:
            raise BadInput(f"sweep: cannot run: {status['reason']}")
        if status["mode"] != Mode.SWEEP:
            return int(status["sweep"]["steps"])
        if batch.failure is not None:
            raise BadInput(f"--url: a request failed: {batch.failure}")
        if time.monotonic() > deadline_s:
            raise BadInput(f"--timeout: the sweep at batch size {size} did not end within {timeout_s:g} s")
        time.sleep(POLL_S)
