from __future__ import annotations

import pytest

from adaptive_spec.engines.vllm.cpu_kit import CpuKit


@pytest.fixture(scope="session")
def vllm_kit() -> CpuKit:
    """The CPU kit with vLLM, installed: minutes the first time on a machine."""
    kit = CpuKit()
    kit.install()
    return kit
