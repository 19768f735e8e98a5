from __future__ import annotations

from pathlib import Path

import pytest

from adaptive_spec.engines.common.plugin_settings import PluginSettings, plugin_settings
from adaptive_spec.errors import BadInput
from adaptive_spec.runtime_folder import DEFAULT_SERVER_PORT, default_runtime_dir, server_port_of


def test_inert_unless_asked() -> None:
    assert plugin_settings({}) == PluginSettings()
    assert plugin_settings({"ADAPTIVE_SPEC_MODE": "off", "ADAPTIVE_SPEC_CONFIG": "/no/such/file"}).mode == "off"
    assert plugin_settings({"ADAPTIVE_SPEC_MODE": ""}).mode == "off"


def test_environment_and_configuration(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    policy = "{max_age_s: 5, fallback: launch}"
    config.write_text(f"runtime_dir: /dev/shm/here\ncontroller: {{mode: shadow, policy: {policy}}}\n")
    settings = plugin_settings({"ADAPTIVE_SPEC_CONFIG": str(config)})
    assert (settings.mode, settings.runtime_dir) == ("shadow", Path("/dev/shm/here"))
    assert settings.max_age_s == 5.0
    assert settings.fallback == "launch"
    assert plugin_settings({"ADAPTIVE_SPEC_CONFIG": str(config), "ADAPTIVE_SPEC_FALLBACK": "stock"}).fallback == "stock"
    assert plugin_settings({"ADAPTIVE_SPEC_MODE": "active"}).fallback == "stock"
    settings = plugin_settings({
        "ADAPTIVE_SPEC_CONFIG": str(config), "ADAPTIVE_SPEC_MODE": "Active", "ADAPTIVE_SPEC_RUNTIME_DIR": "/dev/shm/there",
        "ADAPTIVE_SPEC_CONFIDENCES": "off",
        "ADAPTIVE_SPEC_RANKS_TIMEOUT_S": "4", "ADAPTIVE_SPEC_BATCH_SCORES": "off", "ADAPTIVE_SPEC_UNTESTED_SGLANG": "1",
    })  # fmt: skip
    assert (settings.mode, settings.runtime_dir) == ("active", Path("/dev/shm/there"))
    assert (settings.ranks_timeout_s, settings.batch_scores, settings.untested_sglang) == (4, "off", True)
    assert settings.confidences == "off"
    assert plugin_settings({"ADAPTIVE_SPEC_MODE": "active"}).confidences == "on"
    config.write_text("controller: {acceptance: {confidences: off}}\n")
    assert plugin_settings({"ADAPTIVE_SPEC_CONFIG": str(config)}).confidences == "off"
    environment = {"ADAPTIVE_SPEC_CONFIG": str(config), "ADAPTIVE_SPEC_CONFIDENCES": "on"}
    assert plugin_settings(environment).confidences == "on", "the environment takes precedence"
    assert plugin_settings({"ADAPTIVE_SPEC_MODE": "active"}).runtime_dir == default_runtime_dir()


@pytest.mark.parametrize(
    ("environment", "config", "folder"),
    [
        ({}, "controller: {}", default_runtime_dir(8000)),
        ({"ADAPTIVE_SPEC_RUNTIME_DIR": "/dev/shm/there"}, "controller: {}", Path("/dev/shm/there")),
        ({}, "runtime_dir: /dev/shm/here", Path("/dev/shm/here")),
        ({}, "server_port: 9000", default_runtime_dir(9000)),
    ],
)
def test_the_default_folder_is_of_the_servers_port(
    tmp_path: Path, environment: dict[str, str], config: str, folder: Path
) -> None:
    (tmp_path / "c.yaml").write_text(config)
    environment |= {"ADAPTIVE_SPEC_MODE": "active", "ADAPTIVE_SPEC_CONFIG": str(tmp_path / "c.yaml")}
    assert plugin_settings(environment).of_server(8000).runtime_dir == folder


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("MODE", "on", "must be one of off, shadow, active"),
        ("BATCH_SCORES", "yes", "must be one of auto, on, off"),
        ("FALLBACK", "static", "must be one of stock, launch"),
        ("CONFIDENCES", "auto", "must be one of on, off"),
        ("RANKS_TIMEOUT_S", "0", "must be a whole number in 1..3600"),
        ("RANKS_TIMEOUT_S", "ten", "must be a whole number in 1..3600"),
        ("CONFIG", "/no/such/file", "cannot be read"),
    ],
)
def test_bad_values_are_named(name: str, value: str, allowed: str) -> None:
    environment = {"ADAPTIVE_SPEC_MODE": "active", f"ADAPTIVE_SPEC_{name}": value}
    with pytest.raises(BadInput, match=allowed) as error:
        plugin_settings(environment)
    assert "\n" not in str(error.value)
    assert value in str(error.value)


def test_a_number_of_thousands_of_digits_is_one_line() -> None:
    with pytest.raises(BadInput, match=r"^ADAPTIVE_SPEC_RANKS_TIMEOUT_S: must be a whole number in 1..3600, got '9{100}'$"):
        plugin_settings({"ADAPTIVE_SPEC_MODE": "active", "ADAPTIVE_SPEC_RANKS_TIMEOUT_S": "9" * 5000})
    assert server_port_of(["--port", "9" * 5000]) == DEFAULT_SERVER_PORT
