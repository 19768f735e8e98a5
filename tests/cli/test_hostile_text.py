"""Names and paths that a terminal or its library could obey: markup, control characters, bytes that are not Unicode."""

from __future__ import annotations

import ast
import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

import adaptive_spec
from adaptive_spec.cli.watch import Watch
from adaptive_spec.errors import BadInput
from adaptive_spec.sidecar.listening import check_port
from adaptive_spec.storage.trace import Trace, save_trace
from tests.engines.simulated.test_scenario import written
from tests.support.processes import assert_one_line, run_cli
from tests.support.wire import engine, record_of

PACKAGE = Path(adaptive_spec.__file__).parent
MARKUP = "[/x] [red]y"


def test_no_console_takes_text_for_markup() -> None:
    """Text comes from files and from other processes: `[/x]` would be an exception, `:x:` another text."""
    found = 0
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Console":
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert (options.get("markup"), options.get("emoji")) == ("False", "False"), f"{path}:{node.lineno}"
                found += 1
    assert found > 10


def test_a_model_with_markup_in_its_name_is_shown_as_it_is(tmp_path: Path) -> None:
    info = replace(engine(), model=MARKUP)
    save_trace(tmp_path / "t.npz", Trace(info, tuple(record_of(i, rows=2, k=2) for i in range(1, 60)), 0))
    result = run_cli("replay", tmp_path / "t.npz", "--policies", "static")
    assert result.returncode == 0, result.stderr
    assert MARKUP in result.stdout
    console = Console(width=120, record=True, file=io.StringIO())
    document = {"mode": "active", "engine": {"name": "test", "model": MARKUP, "gpu": "cpu"}, "events": []}
    console.print(Watch(f"http://[::1]/{MARKUP}", console).view(document, 0.0))
    assert console.export_text().count(MARKUP) == 2


def test_a_scenario_with_markup_in_its_name_is_shown_as_it_is(tmp_path: Path) -> None:
    result = run_cli("bench", written(tmp_path, {"name": MARKUP, "duration_s": 1}), "--policies", "static-1", "--jobs", "1")
    assert result.returncode == 0, result.stderr
    assert MARKUP in result.stdout


def test_messages_are_printable() -> None:
    assert_one_line(run_cli("fit", "--latency", "\x1b[31m\udcff", "--out", "x"), r"\x1b[31m\udcff: cannot be read")


def test_a_path_that_is_not_unicode_is_printed() -> None:
    command = [os.fsencode(sys.executable), b"-m", b"adaptive_spec.cli", b"doctor", b"--alive", b"--runtime-dir", b"/none/\xff"]
    result = subprocess.run(command, capture_output=True, timeout=180, check=False)
    assert (result.returncode, result.stderr) == (1, b"")
    assert result.stdout.startswith(b"/none/\\udcff: not alive: ")


@pytest.mark.parametrize("host", ["a" * 70, "\udcff", "a" * 300])
def test_a_host_that_cannot_be_encoded_is_one_line(host: str) -> None:
    with pytest.raises(BadInput, match=r"^--port: 0 on host '"):
        check_port(host, 0)
