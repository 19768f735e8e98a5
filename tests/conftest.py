from __future__ import annotations

import contextlib

import pytest

from adaptive_spec.engines.sglang.cpu_kit import CpuKit

with contextlib.suppress(ImportError):  # not in the environment of a server under test
    from hypothesis import settings

    # Speed is for benchmarks: on a busy machine a deadline fails a test that has nothing wrong.
    settings.register_profile("adaptive-spec", deadline=None)
    settings.load_profile("adaptive-spec")


@pytest.fixture(scope="session")
def kit() -> CpuKit:
    """The CPU kit, installed: minutes the first time on a machine."""
    kit = CpuKit()
    kit.install()
    return kit
