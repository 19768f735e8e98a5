from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from adaptive_spec.engines.sglang.cpu_kit import CpuKit

pytestmark = pytest.mark.server


def test_in_the_environment_that_has_sglang(kit: CpuKit) -> None:
    """SGLang's own adaptive policy, behind the plugin's; its own arguments and classes of servers that are only observed."""
    command = ["python", "-m", "pytest", "-q", "-c", "/dev/null", "-p", "no:cacheprovider", "-W", "ignore"]
    checks = [str(Path(__file__).with_name(name)) for name in ("own_policy_checks.py", "server_kinds_checks.py")]
    result = subprocess.run(kit.command(*command, *checks), capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout
