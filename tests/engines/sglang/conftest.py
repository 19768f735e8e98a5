from __future__ import annotations

import pytest

from adaptive_spec.engines.sglang.cpu_kit import CpuKit


@pytest.fixture(scope="session")
def kit() -> CpuKit:
    """The CPU kit, installed: minutes the first time on a machine."""
    kit = CpuKit()
    kit.install()
    return kit
