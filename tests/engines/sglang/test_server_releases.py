"""The CPU kit with other releases of SGLang: their wheel, unpacked, comes first on the path; all else of the kit is the same."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from adaptive_spec.engines.sglang import contract
from adaptive_spec.engines.sglang.cpu_kit import CpuKit
from tests.engines.release_matrix import cache_folder, cached_wheel
from tests.engines.sglang.server import SglangServer, some_prompts, trace

pytestmark = [pytest.mark.server, pytest.mark.nightly]

OTHERS = sorted({*contract.SUPPORTED_RELEASES, *contract.CHECKED_RELEASES} - {"0.5.23"})
"""All but the one that the kit installs, which every other test runs."""


@pytest.mark.parametrize("release", OTHERS)
def test_a_release_decodes_by_the_sidecars_policy(kit: CpuKit, tmp_path: Path, release: str) -> None:
    wheel = cached_wheel("sglang", release, cache_folder("sglang"))
    if wheel is None:
        pytest.skip(f"no wheel of sglang {release}: make sglang-matrix fetches it")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    environment = {"PYTHONPATH": str(site), "ADAPTIVE_SPEC_UNTESTED_SGLANG": "1"}
    with SglangServer(tmp_path, environment=environment) as server:
        status = server.wait_status(lambda s: s["engine_attached"], "the sidecar to attach")
        assert status["engine_report"]["engine"] == f"sglang {release}"
        with trace(server) as records:
            answers = server.load(some_prompts(40, seed=1), 6)
        assert all(answer.exact for answer in answers)
        assert len({record.k for record in records}) >= 3, "K is switched"
        assert any(record.policy_version for record in records)
        assert sum(int(r.accept_len.sum()) for r in records) == sum(a.meta.get("spec_num_correct_drafts", 0) for a in answers)
        report = server.report()
        assert report is not None
        assert (report.state, report.level, dict(report.failures)) == ("attached", 3, {})
