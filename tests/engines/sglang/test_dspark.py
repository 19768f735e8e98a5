from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from adaptive_spec.engines.sglang.cpu_kit import CpuKit

pytestmark = pytest.mark.server


def test_real_planner_classes(kit: CpuKit) -> None:
    """dspark_checks.py, in the environment that has SGLang's planner."""
    checks = Path(__file__).with_name("dspark_checks.py")
    command = kit.command(
        "python", "-m", "pytest", "-q", "-c", "/dev/null", "-p", "no:cacheprovider", "-W", "ignore", str(checks)
    )
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout
