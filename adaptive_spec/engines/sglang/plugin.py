"""The entry point SGLang calls in each of its processes (group `sglang.srt.plugins`): `register`.

Inert unless asked (see `plugin_settings`). SGLang swallows what a plugin raises, so whatever keeps this one from its work is
said once in the log and written to the engine's report, and SGLang is left as it is.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from importlib import metadata
from typing import Any

from adaptive_spec.engine_report import EngineReport, write_report
from adaptive_spec.engines.sglang.hooks import TARGETS, TESTED_VERSIONS, Guard, missing_targets
from adaptive_spec.engines.sglang.plugin_settings import PluginSettings, plugin_settings
from adaptive_spec.errors import BadInput

log = logging.getLogger("sglang.adaptive_spec")


def register() -> None:
    """Hook into SGLang, or say why not."""
    try:
        settings = plugin_settings(os.environ)
    except BadInput as error:
        log.error("adaptive-spec: left SGLang alone: %s", error)
        return
    if settings.mode == "off":
        return
    version = _sglang_version()
    reason = refusal(settings, version)
    if reason is not None:
        log.error("adaptive-spec: left SGLang alone: %s", reason)
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
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from adaptive_spec.engines.sglang.attachment import Attachment

    guard = Guard()
    attachment = Attachment(settings, guard, engine)

    def controller(original: Callable[..., None], self: Any, worker: Any, policy: Any) -> None:
        chosen = policy
        try:
            chosen = attachment.draft_policy(worker, policy)
        except Exception:
            guard.failed("controller")
        original(self, worker, chosen)

    own: dict[str, Callable[..., Any]] = {"controller": controller, "attach": attachment.attach}
    for target in TARGETS:
        hook = own.get(target.hook)
        if hook is None:
            before = getattr(attachment, f"{target.hook}_before", None)
            hook = guard.around(target.hook, before, getattr(attachment, f"{target.hook}_after"))
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
