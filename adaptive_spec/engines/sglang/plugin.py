"""The entry point SGLang calls in each of its processes (group `sglang.srt.plugins`): `register`.

It does nothing unless ADAPTIVE_SPEC_MODE or a configuration enables it (see `plugin_settings`). SGLang drops exceptions of a
plugin, so a reason not to attach is logged once and written to the engine report; SGLang is then not changed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

from adaptive_spec.engines.sglang.hook_guard import Guard
from adaptive_spec.engines.sglang.hook_targets import (
    DSPARK_NEEDED,
    DSPARK_TARGETS,
    TARGETS,
    TESTED_VERSIONS,
    Target,
    missing_targets,
)
from adaptive_spec.engines.sglang.plugin_settings import PluginSettings, plugin_settings
from adaptive_spec.errors import BadInput
from adaptive_spec.wire.engine_report import EngineReport, write_report

if TYPE_CHECKING:
    from adaptive_spec.engines.sglang.attachment import Attachment

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
    version = _sglang_version()
    reason = refusal(settings, version)
    if reason is not None:
        log.error("adaptive-spec: not attached: %s", reason)
        _report_refusal(settings, f"sglang {version}", reason)
        return
    _install(settings, f"sglang {version}")


def refusal(settings: PluginSettings, version: str) -> str | None:
    """Why the plugin does not hook into this SGLang, None if it does."""
    if version not in TESTED_VERSIONS and not settings.untested_sglang:
        return (
            f"SGLang {version} is not one of the tested versions ({', '.join(TESTED_VERSIONS)}); "
            "ADAPTIVE_SPEC_UNTESTED_SGLANG=1 tries it"
        )
    missing = missing_targets()
    return f"SGLang {version} lacks {'; '.join(missing)}" if missing else None


def _install(settings: PluginSettings, engine: str) -> None:
    """Hook EAGLE's functions and those all algorithms share. DSpark's are imported only for a DSPARK server."""
    from adaptive_spec.engines.sglang.eagle_attachment import EagleAttachment

    guard = Guard()
    attachment = EagleAttachment(settings, guard, engine)
    side: list[Attachment] = [attachment]
    """The attachment in use: EAGLE's until SGLang has chosen DSPARK."""

    def controller(original: Callable[..., None], self: Any, worker: Any, policy: Any) -> None:
        chosen = policy
        try:
            chosen = attachment.draft_policy(worker, policy)
        except Exception:
            guard.failed("controller")
        original(self, worker, chosen)

    def worker(note: None, worker_class: Any, algorithm: Any, server_args: Any) -> None:
        if not algorithm.is_dspark():
            attachment.worker_after(note, worker_class, algorithm, server_args)
        elif side[0] is attachment:
            side[0] = dspark_side(settings, guard, engine, worker_class, algorithm, server_args)

    def results_after(*args: Any, **kwargs: Any) -> None:
        side[0].results_after(*args, **kwargs)

    own: dict[str, Callable[..., Any]] = {
        "worker": guard.around("worker", None, worker),
        "controller": controller,
        "attach": attachment.attach,
        "results": guard.around("results", attachment.results_before, results_after),
    }
    _hook(TARGETS, own, guard, attachment)


def dspark_side(
    settings: PluginSettings, guard: Guard, engine: str, worker_class: Any, algorithm: Any, server_args: Any
) -> Attachment:
    """Hook a DSPARK server before its worker is made, or do not attach and report why."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    from adaptive_spec.engines.sglang.dspark_attachment import DSparkAttachment

    side = DSparkAttachment(settings, guard, engine)
    side.worker_after(None, worker_class, algorithm, server_args)
    if guard.closed is not None:
        return side
    missing = missing_targets(DSPARK_TARGETS, DSPARK_NEEDED)
    if missing:
        reason = f"{engine} lacks {'; '.join(missing)}"
        log.error("adaptive-spec: not attached: %s", reason)
        side.refuse(reason)
        return side
    _hook(DSPARK_TARGETS, {"attach": side.attach}, guard, side)
    HookRegistry.apply_hooks()
    return side


def _hook(targets: Sequence[Target], own: Mapping[str, Callable[..., Any]], guard: Guard, side: Attachment) -> None:
    """Register a hook per target: that of `own`, else the side's `{hook}_before`, `_after` and `_first`, where it has them."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for target in targets:
        hook = own.get(target.hook)
        if hook is None:
            before, after, first = (getattr(side, f"{target.hook}_{part}", None) for part in ("before", "after", "first"))
            hook = guard.around(target.hook, before, after, first)
        HookRegistry.register(target.path, hook, HookType.AROUND)


def _sglang_version() -> str:
    try:
        return metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return "unknown"


def _report_refusal(settings: PluginSettings, engine: str, reason: str) -> None:
    try:
        settings.runtime_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_report(settings.runtime_dir, EngineReport(os.getpid(), engine, "refused", reason))
    except OSError as error:
        log.warning("adaptive-spec: the report could not be written: %s", error)
