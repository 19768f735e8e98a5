"""What the plugin hooks: by release, by what SGLang has, and by the algorithm; SGLang's hook registry is a stand-in."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from adaptive_spec.engines.common.hook_guard import FAULT_VARIABLE, Guard
from adaptive_spec.engines.common.plugin_settings import PluginSettings
from adaptive_spec.engines.sglang import contract, plugin
from adaptive_spec.engines.sglang.eagle_attachment import EagleAttachment
from adaptive_spec.engines.static_contract import Unmet
from adaptive_spec.runtime_folder import dp_rank_dirs
from adaptive_spec.wire.engine_report import read_report

EAGLE = SimpleNamespace(is_dspark=lambda: False)


class Registry:
    """hooked: by target, in order. applied: how many were there at the last `apply_hooks`."""

    def __init__(self) -> None:
        self.hooked: dict[str, Callable[..., Any]] = {}
        self.applied = 0
        self.dp_rank: int | None = None

    def register(self, target: str, hook: Callable[..., Any], hook_type: Any) -> None:
        self.hooked[target] = hook

    def apply_hooks(self) -> None:
        self.applied = len(self.hooked)

    @property
    def names(self) -> set[str]:
        return {need.hook for need in contract.NEEDS if need.hook and need.path in self.hooked}


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    registry = Registry()
    module = ModuleType("sglang.srt.plugins.hook_registry")
    module.HookRegistry, module.HookType = registry, SimpleNamespace(AROUND="around")  # type: ignore[attr-defined]  # a stand-in
    for name in ("sglang", "sglang.srt", "sglang.srt.plugins"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    context = ModuleType("sglang.srt.runtime_context")
    context.get_parallel = lambda: SimpleNamespace(dp_rank=registry.dp_rank)  # type: ignore[attr-defined]  # a stand-in
    monkeypatch.setitem(sys.modules, context.__name__, context)
    monkeypatch.setattr(EagleAttachment, "worker_after", lambda side, *_: setattr(side, "_supported", True))
    return registry


def _missing(monkeypatch: pytest.MonkeyPatch, *groups: str) -> None:
    def lacking(asked: tuple[str, ...]) -> str:
        return "sglang.gone: not there" if set(asked) & set(groups) else ""

    monkeypatch.setattr(plugin, "lacking", lacking)


@pytest.mark.parametrize("version", ["0.5.20", "0.5.23", "0.5.23+cu130"])
def test_a_supported_release_with_any_local_suffix(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    _missing(monkeypatch)
    assert plugin.refusal(PluginSettings("active"), version) is None


@pytest.mark.parametrize("version", ["0.5.24.dev3+g1a2b3c4", "99.0", "unknown"])
def test_another_version_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    _missing(monkeypatch)
    reason = plugin.refusal(PluginSettings("active"), version)
    assert reason is not None
    assert version in reason
    assert "ADAPTIVE_SPEC_UNTESTED_SGLANG=1" in reason
    assert plugin.refusal(PluginSettings("active", untested_sglang=True), version) is None
    _missing(monkeypatch, contract.OBSERVE)
    reason = plugin.refusal(PluginSettings("active", untested_sglang=True), version)
    assert reason == f"SGLang {version} lacks sglang.gone: not there"


def test_what_is_lacking_is_one_short_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plugin.lacking((contract.OBSERVE,)) == "its source: it is not installed as a package"
    monkeypatch.setattr(plugin, "installed", lambda _: object())
    monkeypatch.setattr(plugin, "unmet", lambda *_: [Unmet("g", f"a.b{i}", "not there") for i in range(5)])
    assert plugin.lacking((contract.OBSERVE,)) == "a.b0: not there; a.b1: not there; a.b2: not there; and 2 more"


def _hook_eagle(registry: Registry, folder: Path) -> None:
    plugin._install(PluginSettings("active", folder), "sglang test")
    assert registry.names <= {"worker", "scheduler"}, "nothing else before SGLang has chosen an algorithm"
    [worker] = [hook for path, hook in registry.hooked.items() if path.endswith(".create_worker")]
    assert worker(lambda *_: "its worker", EAGLE, None) == "its worker"


def test_the_rest_is_hooked_when_the_worker_is_made(monkeypatch: pytest.MonkeyPatch, registry: Registry, tmp_path: Path) -> None:
    _missing(monkeypatch)
    _hook_eagle(registry, tmp_path)
    names = {need.hook for need in contract.needs_of(contract.LEVELS) if need.hook}
    assert registry.names - {"scheduler"} == names, "that of several ranks only where K is decided for several"
    assert not any("dspark" in target for target in registry.hooked)
    assert registry.applied == len(registry.hooked)


@pytest.mark.parametrize(
    ("group", "lost"),
    [
        (contract.CONFIDENCES, {contract.CONFIDENCES}),
        (contract.STAGE_TIMES, {contract.STAGE_TIMES, contract.CONFIDENCES}),
    ],
)
def test_without_a_level_those_below_are_hooked(
    monkeypatch: pytest.MonkeyPatch, registry: Registry, tmp_path: Path, group: str, lost: set[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    _missing(monkeypatch, group)
    _hook_eagle(registry, tmp_path)
    kept = set(contract.LEVELS) - lost
    assert registry.names - {"scheduler"} == {need.hook for need in contract.needs_of(kept) if need.hook}
    assert [record.getMessage() for record in caplog.records] == [
        f"adaptive-spec: continues without {group}: sglang test lacks sglang.gone: not there"
    ]


def test_without_counts_and_k_nothing_is_hooked(monkeypatch: pytest.MonkeyPatch, registry: Registry, tmp_path: Path) -> None:
    _missing(monkeypatch, contract.COUNTS_AND_K)
    _hook_eagle(registry, tmp_path)
    assert registry.names == {"worker", "scheduler"}
    report = read_report(tmp_path)
    assert report is not None
    assert (report.state, report.reason, report.level) == ("refused", "sglang test lacks sglang.gone: not there", 0)


def test_a_data_parallel_rank_has_its_own_folder(monkeypatch: pytest.MonkeyPatch, registry: Registry, tmp_path: Path) -> None:
    _missing(monkeypatch, contract.COUNTS_AND_K)
    registry.dp_rank = 3
    folder = tmp_path / "run"
    _hook_eagle(registry, folder)
    assert read_report(folder) is None
    assert list(dp_rank_dirs(folder)) == [3]
    report = read_report(folder / "dp-3")
    assert report is not None
    assert report.state == "refused"
    assert [path.stat().st_mode & 0o777 for path in (folder, folder / "dp-3")] == [0o700, 0o700]


def test_a_failure_before_there_is_an_attachment_is_reported(
    monkeypatch: pytest.MonkeyPatch, registry: Registry, tmp_path: Path
) -> None:
    monkeypatch.setenv(FAULT_VARIABLE, "worker/after")
    _hook_eagle(registry, tmp_path)
    report = read_report(tmp_path)
    assert report is not None
    assert (report.state, report.reason) == ("detached", "hook worker failed while the server started")
    assert report.failures == {"worker": 1}


def test_a_controller_is_given_the_sidecars_policy_and_keeps_its_arguments(tmp_path: Path) -> None:
    side = EagleAttachment(PluginSettings("shadow", tmp_path), Guard("SGLang", ""), "sglang test")
    side._supported = True
    seen: list[Any] = []
    stock = SimpleNamespace(candidate_steps=[1, 3])

    def original(*args: Any, **kwargs: Any) -> None:
        seen.extend([args, kwargs])

    side.controller(original, "controller", SimpleNamespace(speculative_num_steps=3), stock, "more", later=1)
    (controller, _, policy, more), named = seen
    assert (controller, more, named) == ("controller", "more", {"later": 1})
    assert policy._stock is stock
