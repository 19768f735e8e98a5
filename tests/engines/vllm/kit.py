"""Runs of `in_process` in the kit's environment, one process each."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from adaptive_spec.engines.vllm.cpu_kit import CpuKit

PATIENCE_S = 1800.0


def other_release(site: Path) -> dict[str, str]:
    """The environment in which the kit runs the vLLM that is unpacked at `site` in place of its own."""
    return {"PYTHONPATH": str(site), "ADAPTIVE_SPEC_UNTESTED_VLLM": "1"}


def in_process(kit: CpuKit, **asked: Any) -> dict[str, Any]:
    """What `in_process` prints; the test fails with the end of its output when it fails. site: see `other_release`."""
    site = asked.pop("site", None)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ADAPTIVE_SPEC_")}
    kept = {k: v for k, v in os.environ.items() if k in ("ADAPTIVE_SPEC_VLLM_HOME", "ADAPTIVE_SPEC_VLLM_KIT")}
    done = subprocess.run(
        kit.command("python", "-m", "tests.engines.vllm.in_process", json.dumps(asked)),
        env={**environment, **kept, **(other_release(site) if site else {})},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def agrees(found: dict[str, Any]) -> None:
    """Outputs are the target's, records are valid, and they count what vLLM counts itself.

    vLLM counts requests that end in the step too; a record has only rows that go on or end in it, so both are equal unless a
    request was aborted.
    """
    assert found["exact"] == found["requests"], found
    assert found["invalid"] == [], found
    assert found["verified"] == found["vllm"]["vllm:spec_decode_num_draft_tokens"], found
    assert found["accepted"] == found["vllm"]["vllm:spec_decode_num_accepted_tokens"], found
