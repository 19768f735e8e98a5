"""What a fresh process loads, and that no file names a path of one machine. `make lint` checks the imports between packages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "adaptive_spec"


def _loaded_by(module: str) -> set[str]:
    """Top-level modules that a fresh process has loaded after one import."""
    code = f"import sys, json, {module}; print(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(result.stdout))


def test_the_tap_brings_numpy_and_the_standard_library_only() -> None:
    extra = _loaded_by("adaptive_spec.engine_side.tap") - _loaded_by("numpy") - sys.stdlib_module_names
    assert extra == {"adaptive_spec"}


def test_the_plugin_brings_numpy_and_the_standard_library_only() -> None:
    """torch and SGLang are imported inside the hooks, in a server that has loaded them already."""
    attachments = [path.stem for path in (PACKAGE / "engines" / "sglang").glob("*attachment.py")]
    assert attachments
    for module in ("plugin", *attachments):
        extra = _loaded_by(f"adaptive_spec.engines.sglang.{module}") - _loaded_by("numpy") - sys.stdlib_module_names
        assert extra == {"adaptive_spec"}, module


def test_the_sidecar_brings_neither_torch_nor_matplotlib() -> None:
    loaded = _loaded_by("adaptive_spec.sidecar.process")
    assert "river" in loaded
    assert not loaded & {"torch", "matplotlib", "sglang", "rich", "fsspec"}


def test_nothing_names_a_machine_path() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert "/home/" not in path.read_text(), path
        assert "/root/" not in path.read_text(), path
