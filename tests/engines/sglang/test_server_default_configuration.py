"""A real server with SGLang's default adaptive configuration: other K at every batch size, and every step is as asked."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from adaptive_spec.domain.step_record import StepFlag
from adaptive_spec.engines.sglang.cpu_kit import CpuKit
from tests.engines.sglang.server import SglangServer, some_prompts, trace

pytestmark = pytest.mark.server

ALLOWED = {1: {1, 3, 5, 7}, 8: {0, 1, 3}}
"""SGLang's default up to 16 requests; 3 is the launch K."""
CONFIG = "controller: {policy: {max_age_s: 1, min_dwell_s: 0.2}}\n"


def test_every_step_is_as_asked(kit: CpuKit, tmp_path: Path) -> None:
    with SglangServer(tmp_path, config=CONFIG, adaptive="") as server:
        status = server.wait_status(lambda s: s["engine_attached"], "the sidecar to attach")
        assert status["engine"]["candidates"] == [0, 1, 3, 5, 7]
        with trace(server) as records:
            for seed, concurrency in enumerate((1, 16, 4, 12, 8, 2)):
                answers = server.load(some_prompts(2 * concurrency + 6, seed), concurrency)
                assert all(answer.exact for answer in answers)
        ran = Counter((record.batch_size, record.k) for record in records)
        assert all(k in ALLOWED[8 if batch_size >= 8 else 1] for batch_size, k in ran), ran
        limited = [record for record in records if record.flags & StepFlag.LIMITED]
        assert not limited, f"{len(limited)} of {len(records)} steps were not as asked: {Counter(r.k for r in limited)}"
        assert {batch_size for batch_size, _ in ran} >= {1, 2, 4, 8, 12, 16}
        assert any(record.flags & StepFlag.TRIAL for record in records)
        report = server.report()
        assert report is not None
        assert (report.state, report.level, dict(report.failures)) == ("attached", 3, {})
