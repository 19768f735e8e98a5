"""What a process loads: the server's nothing heavy, the sidecar no torch. For imports between packages see `make lint`."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "adaptive_spec"


def _imports(module: str) -> set[str]:
    """Top-level names a module imports anywhere in its text; of our own package the module below it."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            found.add(f"ours:{parts[1]}" if parts[0] == "adaptive_spec" else parts[0])
    return found


def _loaded_by(module: str) -> set[str]:
    """Top-level modules that a fresh process has loaded after one import."""
    code = f"import sys, json, {module}; print(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(result.stdout))


def test_the_tap_brings_numpy_and_the_standard_library_only() -> None:
    extra = _loaded_by("adaptive_spec.engine_side.tap") - _loaded_by("numpy") - sys.stdlib_module_names
    assert extra == {"adaptive_spec"}


def test_the_plugin_brings_numpy_and_the_standard_library_only() -> None:
    """What else it needs (torch, SGLang) is there when a hook runs; nothing of the sidecar's ever is."""
    for module in ("plugin", "eagle_attachment", "dspark_attachment"):
        extra = _loaded_by(f"adaptive_spec.engines.sglang.{module}") - _loaded_by("numpy") - sys.stdlib_module_names
        assert extra == {"adaptive_spec"}, module


def test_only_the_plugin_imports_sglang_and_the_benchmark_that_compares_with_its_policy() -> None:
    for path in PACKAGE.rglob("*.py"):
        module = str(path.relative_to(PACKAGE).with_suffix(""))
        if not module.startswith("engines/sglang/") and module != "engines/simulated/peers/sglang_ema":
            assert "sglang" not in _imports(module), module


def test_the_sidecar_brings_neither_torch_nor_matplotlib() -> None:
    loaded = _loaded_by("adaptive_spec.sidecar.process")
    assert "river" in loaded
    assert not loaded & {"torch", "matplotlib", "sglang", "rich", "fsspec"}


def test_nothing_names_a_machine_path() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert "/home/" not in path.read_text(), path
        assert "/root/" not in path.read_text(), path
