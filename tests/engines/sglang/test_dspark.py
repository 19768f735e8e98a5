from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from adaptive_spec.engines.sglang.cpu_kit import CpuKit

pytestmark = pytest.mark.server


@pytest.mark.parametrize("name", ["dspark_swap_checks.py", "dspark_attachment_checks.py"])
def test_in_the_environment_that_has_sglang(kit: CpuKit, name: str) -> None:
    """SGLang's own planner under our swaps, and its own DSpark worker with the plugin in it."""
    checks = Path(__file__).with_name(name)
    command = kit.command(
        "python", "-m", "pytest", "-q", "-c", "/dev/null", "-p", "no:cacheprovider", "-W", "ignore", str(checks)
    )
    result = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout
