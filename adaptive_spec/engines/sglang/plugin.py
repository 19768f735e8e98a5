"""The entry point SGLang calls in each of its processes (group `sglang.srt.plugins`): `register`.

It does nothing unless ADAPTIVE_SPEC_MODE or a configuration enables it (see `plugin_settings`). Then it checks and hooks only
what lets it see the speculative worker being made, or that there is none. The rest is checked and hooked when that happens: in
the scheduler process, for the algorithm that SGLang has chosen. SGLang drops exceptions of a plugin, so a reason not to attach
is logged once and written to the engine report; SGLang is then not changed.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any

from adaptive_spec.engines.common.hook_guard import Guard
from adaptive_spec.engines.common.identity import known
from adaptive_spec.engines.common.plugin_settings import PluginSettings, plugin_settings
from adaptive_spec.engines.releases import version_refusal
from adaptive_spec.engines.sglang import contract
from adaptive_spec.engines.static_contract import installed, unmet
from adaptive_spec.errors import BadInput
from adaptive_spec.runtime_folder import make_runtime_dir, server_port_of
from adaptive_spec.wire.engine_report import EngineReport, write_report

if TYPE_CHECKING:
    from adaptive_spec.engines.sglang.attachment import Attachment

WAY_OUT = "ADAPTIVE_SPEC_UNTESTED_SGLANG=1"
BUILT_IN = "SpeculativeAlgorithm"
"""Class of SGLang's own algorithms. An algorithm that another plugin has registered is an object of another class."""
MOST_NAMED = 3
"""Names that a reason lists; how many more there are is said."""

log = logging.getLogger("sglang.adaptive_spec")


def register() -> None:
    """Hook into SGLang, or log and report why not."""
    try:
        settings = plugin_settings(os.environ)
    except BadInput as error:
        log.error("adaptive-spec: not attached: %s", error)
        return
    if settings.mode == "off":
        return
    settings = settings.of_server(server_port_of(sys.argv[1:]))
    version = _sglang_version()
    reason = refusal(settings, version)
    if reason is not None:
        log.error("adaptive-spec: not attached: %s", reason)
        _report(settings, EngineReport(os.getpid(), f"sglang {version}", "refused", reason))
        return
    _install(settings, f"sglang {version}")


def refusal(settings: PluginSettings, version: str) -> str | None:
    """Why the plugin does not hook into this SGLang, None if it does."""
    if not settings.untested_sglang:
        reason = version_refusal("SGLang", version, contract.SUPPORTED_RELEASES, WAY_OUT)
        if reason is not None:
            return reason
    missing = lacking((contract.OBSERVE,))
    return f"SGLang {version} lacks {missing}" if missing else None


def lacking(groups: Iterable[str]) -> str:
    """What the installed SGLang lacks of some groups of `contract`, one line; "" if nothing."""
    tree = installed("sglang")
    if tree is None:
        return "its source: it is not installed as a package"
    found = [str(one) for one in unmet(tree, contract.needs_of(groups))]
    more = f"; and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
    return "; ".join(found[:MOST_NAMED]) + more


def _install(settings: PluginSettings, engine: str) -> None:
    """Hook what makes the worker; the first call of it decides what else is hooked."""
    guard = Guard("SGLang")
    folder_of = settings
    made: list[Attachment] = []

    def closed() -> None:
        """Closed before there is an attachment, which reports for itself."""
        _report(folder_of, EngineReport(os.getpid(), engine, "detached", guard.closed or "", dict(guard.failures)))

    guard.on_close = closed

    def worker(note: None, worker_class: Any, algorithm: Any, server_args: Any) -> None:
        nonlocal folder_of
        if not made:
            port = known(server_args, ("port",))["port"]
            folder_of = settings.of_server(port) if isinstance(port, int) else settings
            dp_rank = _dp_rank()
            if dp_rank is not None:
                make_runtime_dir(folder_of.runtime_dir)
                folder_of = folder_of.of_dp_rank(dp_rank)
            made.append(_attachment(folder_of, guard, engine, worker_class, algorithm))
            attach(made[0], guard, engine, worker_class, algorithm, server_args)

    def scheduler(scheduler: Any, *args: Any, **kwargs: Any) -> None:
        """Before SGLang makes a worker. Without speculation, and for another plugin's algorithm, `worker` is not called."""
        algorithm = scheduler.spec_algorithm
        if algorithm.is_none() or type(algorithm).__name__ != BUILT_IN:
            worker(None, None, algorithm, scheduler.server_args)

    for need in contract.hooks_of(contract.OBSERVE):
        _register(need.path, guard.around(need.hook, None, worker))
    if not lacking((contract.PLAIN,)):
        [need] = [need for need in contract.hooks_of(contract.PLAIN) if need.hook == "scheduler"]
        _register(need.path, guard.around(need.hook, scheduler, None))


def _dp_rank() -> int | None:
    """The data-parallel rank of this scheduler: of a replica, or of attention DP. None without data parallelism."""
    from sglang.srt.runtime_context import get_parallel

    from adaptive_spec.engines.sglang.attachment import rank_of

    return rank_of(get_parallel(), "dp_rank")


def _attachment(settings: PluginSettings, guard: Guard, engine: str, worker_class: Any, algorithm: Any) -> Attachment:
    from adaptive_spec.engines.sglang.watched_attachment import OF_WORKER, OtherPluginAttachment, PlainAttachment

    if worker_class is None:
        return (PlainAttachment if algorithm.is_none() else OtherPluginAttachment)(settings, guard, engine)
    watched = OF_WORKER.get(known(worker_class, ("__name__",))["__name__"])
    if watched is not None:
        return watched(settings, guard, engine)
    if algorithm.is_dspark():
        from adaptive_spec.engines.sglang.dspark_attachment import DSparkAttachment

        return DSparkAttachment(settings, guard, engine)
    from adaptive_spec.engines.sglang.eagle_attachment import EagleAttachment

    return EagleAttachment(settings, guard, engine)


def attach(attachment: Attachment, guard: Guard, engine: str, worker_class: Any, algorithm: Any, server_args: Any) -> None:
    """Hook the groups of an algorithm before its worker is made. Without one of its required groups it is not attached; without
    another group it is attached at the level below.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry

    attachment.worker_after(None, worker_class, algorithm, server_args)
    if guard.closed is not None:
        return
    for group in attachment.REQUIRED_GROUPS:
        missing = lacking((group,))
        if missing:
            reason = f"{engine} lacks {missing}"
            log.error("adaptive-spec: not attached: %s", reason)
            attachment.refuse(reason)
            return
    hooked = list(attachment.REQUIRED_GROUPS)
    for group in attachment.OPTIONAL_GROUPS:
        missing = lacking((group,))
        if missing:
            guard.lose(group, f"{engine} lacks {missing}")
            break  # each level needs those below it
        hooked.append(group)
    own: Mapping[str, Callable[..., Any]] = attachment.own_hooks()
    for group in hooked:
        for need in contract.hooks_of(group):
            if need.hook == "scheduler":
                continue  # hooked from the beginning
            hook = own.get(need.hook)
            if hook is None:
                parts = (getattr(attachment, f"{need.hook}_{part}", None) for part in ("before", "after", "first"))
                hook = guard.around(need.hook, *parts)
            _register(need.path, hook)
    HookRegistry.apply_hooks()


def _register(path: str, hook: Callable[..., Any]) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(path, hook, HookType.AROUND)


def _sglang_version() -> str:
    try:
        return metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return "unknown"


def _report(settings: PluginSettings, report: EngineReport) -> None:
    try:
        write_report(settings.runtime_dir, report)
    except OSError as error:
        log.warning("adaptive-spec: the report could not be written: %s", error)
