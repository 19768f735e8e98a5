from __future__ import annotations

from pathlib import Path

import pytest

from adaptive_spec import __version__
from adaptive_spec.cli.main import cli, dashboards
from tests.support.processes import assert_one_line, run_cli


def test_help_of_everything() -> None:
    result = run_cli("--help")
    assert result.returncode == 0
    nested = [*cli.commands.items(), *dashboards.commands.items()]
    assert len(nested) == 15
    for name, command in nested:
        assert name in result.stdout or name in dashboards.commands
        assert command.get_short_help_str()
        text = command.get_help(command.make_context(name, [], resilient_parsing=True))
        assert "--help" in text
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert parameter.to_info_dict()["help"], f"{name} {parameter.name} says nothing"


def test_version() -> None:
    assert run_cli("--version").stdout == f"adaptive-spec, version {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ("Missing command",)),
        (["dance"], ("No such command", "dance")),
        (["fit", "--color"], ("No such option", "--color")),
        (["sidecar", "--port", "99999"], ("--port", "99999", "0<=x<=65535")),
        (["sidecar", "--config", "none.yaml"], ("none.yaml", "cannot be read")),
        (["ctl"], ("Missing argument", "resweep")),
        (["ctl", "stop"], ("stop", "status", "resweep")),
        (["ctl", "pin"], ("K: required for pin",)),
        (["ctl", "pin", "33"], ("K: required for pin: must be a whole number in 0..32, got 33",)),
        (["ctl", "explain", "0"], ("BATCH: must be a whole number in 1..4096, got 0",)),
        (["ctl", "explain", "x"], ("x",)),
        (["ctl", "pause", "3"], ("K: only allowed for pin, got 3 with pause",)),
        (["ctl", "status", "--runtime-dir", "none"], ("--runtime-dir", "no sidecar runs there")),
        (["ctl", "status", "--url", "127.0.0.1:1"], ("--url", "must begin with http:// or https://")),
        (["ctl", "pause", "--url", "http://127.0.0.1:1"], ("http://127.0.0.1:1", "no sidecar answers")),
        (["ctl", "pause", "--url", "http://127.0.0.1:1", "--token-file", "none"], ("--token-file", "cannot be read")),
        (["sweep", "--runtime-dir", "none"], ("no sidecar runs there",)),
        (["sweep", "--timeout", "0"], ("--timeout", "0.0")),
        (["sweep", "--timeout", "nan"], ("--timeout", "'nan' is not a finite number")),
        (["record", "--out", "x", "--duration", "inf"], ("--duration", "'inf' is not a finite number")),
        (["fit", "--out", "x", "--jump-threshold", "nan"], ("--jump-threshold", "'nan' is not a finite number")),
        (["sweep", "--url", "ftp://somewhere", "--runtime-dir", "none"], ("no sidecar runs there",)),
        (["serve", "--", "--model-path", "m"], ("serve", "sglang is not installed")),
        (["serve", "--mode", "on"], ("--mode", "on", "active", "shadow")),
        (["candidates"], ("Missing argument", "PROFILE")),
        (["demo", "--engine", "abacus"], ("--engine", "abacus")),
        (["demo", "--duration", "soon"], ("--duration", "soon")),
        (["demo", "--json", "none/out.json"], ("--json", "none/out.json", "no such folder")),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, arguments: list[str], words: tuple[str, ...]) -> None:
    assert_one_line(run_cli(*arguments, cwd=tmp_path), *words)
