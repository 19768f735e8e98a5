from __future__ import annotations

from pathlib import Path

import pytest

from adaptive_spec.config.load import load_settings
from adaptive_spec.config.settings import SidecarSettings
from adaptive_spec.errors import BadInput


def _load(tmp_path: Path, text: str) -> SidecarSettings:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return load_settings(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("port: 99999", "port: must be at most 65535, got 99999"),
        ("port: '9477'", "port: must be a whole number, got '9477'"),
        ("port: true", "port: must be a whole number, got True"),
        ("port: 1.5", "port: must be a whole number, got 1.5"),
        ("controller: {latency: {jump_threshold: 9}}", "controller.latency.jump_threshold: must be at most 2, got 9"),
        ("controller: {latency: {jump_threshold: .nan}}", "controller.latency.jump_threshold: must be at most 2, got nan"),
        ("controller: {latency: {jump_threshold: low}}", "must be a number, got 'low'"),
        ("controller: {policy: {probe_budget: -0.1}}", "controller.policy.probe_budget: must be at least 0, got -0.1"),
        ("controller: {policy: {k_min: 5, k_max: 2}}", "controller.policy.k_min: must be at most k_max, which is 2, got 5"),
        ("controller: {mode: fast}", "controller.mode: must be 'active' or 'shadow', got 'fast'"),
        ("controller: 3", "controller: must be a section of keys and values, got 3"),
        ("controller: {sweep: }", "controller.sweep: must be a section of keys and values, got None"),
        ("contrller: {}", "contrller: unknown key; must be one of runtime_dir, profile_dir"),
        ("controller: {policy: {kmax: 3}}", "controller.policy.kmax: unknown key; must be one of k_min, k_max"),
        ("host: ''", "host: must be text that is not empty, got ''"),
        ("runtime_dir: 7", "runtime_dir: must be text, got 7"),
        ("- 1", "must be keys and values, got a list"),
        ("port: 1\nport: 2", "line 2: not valid YAML: duplicate key 'port'"),
        ("port: [1", "line 1: not valid YAML"),
        ("{1: 2}", "1: unknown key"),
        ("!!python/object:os.system {}", "not valid YAML"),
        ("\x00", "not valid YAML"),
    ],
)
def test_bad_configuration_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(BadInput) as error:
        _load(tmp_path, text)
    assert str(error.value).startswith(f"{tmp_path}/config.yaml: ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_unreadable(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be read: No such file"):
        load_settings(tmp_path / "none.yaml")
    with pytest.raises(BadInput, match="cannot be read: Is a directory"):
        load_settings(tmp_path)
    (tmp_path / "latin").write_bytes(b"host: \xe9")
    with pytest.raises(BadInput, match="not UTF-8"):
        load_settings(tmp_path / "latin")


def test_values_and_defaults(tmp_path: Path) -> None:
    assert _load(tmp_path, "") == SidecarSettings()
    settings = _load(tmp_path, "runtime_dir: /run/x\ncheckpoint_interval_s: 5\ncontroller: {policy: {k_max: 6}}\n")
    assert settings.runtime_dir == Path("/run/x")
    assert settings.checkpoint_interval_s == 5.0
    assert settings.controller.policy.k_max == 6
    assert settings.controller.latency == SidecarSettings().controller.latency


def test_overrides_take_precedence(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("port: 1000\nhost: localhost\n")
    settings = load_settings(path, {"port": 2000, "runtime_dir": Path("/run/y")})
    assert (settings.port, settings.host, settings.runtime_dir) == (2000, "localhost", Path("/run/y"))
