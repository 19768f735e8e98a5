"""`register`, in every process of vLLM, without vLLM."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adaptive_spec.engines.common.plugin_settings import PluginSettings
from adaptive_spec.engines.vllm import plugin
from adaptive_spec.engines.vllm.supported_servers import observe_only, refusal
from adaptive_spec.wire.engine_report import read_report
from tests.engines.vllm.stand_in import config


class Hooked:
    """What `register` asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        monkeypatch.setattr(plugin, "hook_scheduler", lambda *_: self.calls.append("scheduler"))
        monkeypatch.setattr(plugin, "hook_worker", lambda *_: self.calls.append("worker"))
        monkeypatch.setattr(plugin, "refusal", lambda *_: None)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = tmp_path / "run"
    made.mkdir(mode=0o700)
    for name in ("MODE", "CONFIG", "FALLBACK"):
        monkeypatch.delenv(f"ADAPTIVE_SPEC_{name}", raising=False)
    monkeypatch.delenv(plugin.IN_ONE_PROCESS, raising=False)
    monkeypatch.setenv("ADAPTIVE_SPEC_RUNTIME_DIR", str(made))
    return made


def registered_in(process: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing, "current_process", lambda: SimpleNamespace(name=process))
    plugin.register()


@pytest.mark.parametrize(
    ("process", "hooked"),
    [("MainProcess", []), ("APIServer_0", []), ("EngineCore", ["scheduler"]), ("EngineCore_DP0", ["scheduler"]),
     ("VllmWorker-0", ["worker"]), ("VllmWorker-3", ["worker"])],
)  # fmt: skip
def test_it_decides_in_the_engine_core_and_measures_in_workers(
    process: str, hooked: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Hooked(monkeypatch)
    registered_in(process, monkeypatch)
    assert seen.calls == [], "inert until it is asked"
    monkeypatch.setenv("ADAPTIVE_SPEC_MODE", "off")
    registered_in(process, monkeypatch)
    assert seen.calls == []
    monkeypatch.setenv("ADAPTIVE_SPEC_MODE", "active")
    registered_in(process, monkeypatch)
    assert seen.calls == hooked


def test_an_engine_in_the_process_that_makes_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Hooked(monkeypatch)
    monkeypatch.setenv("ADAPTIVE_SPEC_MODE", "shadow")
    monkeypatch.setenv(plugin.IN_ONE_PROCESS, "0")
    registered_in("MainProcess", monkeypatch)
    assert seen.calls == ["scheduler"]


@pytest.mark.parametrize("failing", ["plugin_settings", "refusal", "hook_scheduler", "vllm_version"])
def test_no_exception_reaches_vllm(failing: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Hooked(monkeypatch)

    def fail(*_: Any) -> None:
        raise RuntimeError("ours")

    monkeypatch.setenv("ADAPTIVE_SPEC_MODE", "active")
    monkeypatch.setattr(plugin, failing, fail)
    registered_in("EngineCore", monkeypatch)


def test_bad_settings_are_logged(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    seen = Hooked(monkeypatch)
    monkeypatch.setenv("ADAPTIVE_SPEC_MODE", "maybe")
    registered_in("EngineCore", monkeypatch)
    assert seen.calls == []
    assert "ADAPTIVE_SPEC_MODE: must be one of off, shadow, active, got 'maybe'" in caplog.text


@pytest.mark.parametrize("process", ["EngineCore", "VllmWorker-0"])
def test_an_unsupported_release_is_refused_and_reported_once(process: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTIVE_SPEC_MODE", "active")
    monkeypatch.setattr(plugin, "vllm_version", lambda: "0.11.0")
    registered_in(process, monkeypatch)
    report = read_report(folder)
    assert (report is not None) == (process == "EngineCore")
    if report is not None:
        assert report.state == "refused"
        assert "vLLM 0.11.0 is not a supported release" in report.reason
        assert plugin.WAY_OUT in report.reason


def test_a_supported_release_that_lacks_something_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "lacking", lambda groups: "vllm.x: not there")
    assert plugin.refusal(PluginSettings(mode="active"), "0.32.0") == "vLLM 0.32.0 lacks vllm.x: not there"
    assert "supported" in str(plugin.refusal(PluginSettings(mode="active"), "0.29.9"))
    untested = PluginSettings(mode="active", untested_vllm=True)
    assert plugin.refusal(untested, "0.29.9") == "vLLM 0.29.9 lacks vllm.x: not there"


@pytest.mark.parametrize(
    ("version", "v2", "refused"),
    [("0.31.2", True, True), ("0.31.2", False, False), ("0.32.0", True, False), ("0.33.1+cu", True, False)],
)
def test_the_v2_runner_before_it_takes_notice_of_k(version: str, v2: bool, refused: bool) -> None:
    reason = refusal(config(use_v2_model_runner=v2), version)
    assert (reason is not None) == refused
    assert reason is None or "V2 model runner" in reason


def test_data_parallelism_of_a_dense_model_is_known_by_the_title_of_the_process() -> None:
    assert "data parallelism" in str(refusal(config(), "0.32.0", "VLLM::EngineCore_DP0"))
    assert refusal(config(), "0.32.0", "VLLM::EngineCore") is None


def test_observed_servers() -> None:
    assert observe_only(config(), [0, 5]) is None
    assert "no schedule of K" in str(observe_only(config(), None))
    own = SimpleNamespace(enable_adaptive_verification=True)
    assert "adaptive verification" in str(observe_only(config(speculative_config=own), [0, 5]))
