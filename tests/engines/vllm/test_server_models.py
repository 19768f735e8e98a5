"""One real vLLM server that is swept, pinned and left by its clients, and the sidecar's metrics at the end."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adaptive_spec.config.load import load_settings
from adaptive_spec.domain.step_record import StepFlag
from adaptive_spec.engines.common.server_demonstration import Prompt
from adaptive_spec.engines.vllm.cpu_kit import CANDIDATES, CpuKit
from tests.engines.vllm.server import VllmServer
from tests.support.models_anew import assert_models_are_those_of
from tests.support.processes import assert_one_line, run_cli
from tests.support.ring_trace import RingTrace

pytestmark = [pytest.mark.nightly, pytest.mark.server]

CONFIG = "controller: {policy: {min_dwell_s: 0.2}}\nlog_level: debug\n"


@pytest.fixture(scope="module")
def server(vllm_kit: CpuKit, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    with VllmServer(vllm_kit, tmp_path_factory.mktemp("server"), config=CONFIG) as server:
        yield server


@pytest.fixture(scope="module")
def whole(server: VllmServer) -> Iterator[RingTrace]:
    """All records from the server's first on, until it is stopped."""
    traced = RingTrace(server.runtime_dir, oldest=True)
    yield traced
    traced.end()


def test_sweep_through_the_openai_api(server: VllmServer, whole: RingTrace) -> None:
    """Batch sizes are held by so many streaming requests; every K of the schedule is tried at each."""
    server.sidecar()
    arguments = ("sweep", "--url", f"http://127.0.0.1:{server.port}", "--runtime-dir", server.runtime_dir, "--batch-sizes")
    command = [sys.executable, "-m", "adaptive_spec.cli", *map(str, arguments), "1,3,7"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert "sweep finished: batch sizes 1, 3, 7" in result.stdout
    server.settled()
    tried = {(r.batch_size, r.k) for r in whole.records if r.flags & StepFlag.TRIAL}
    assert tried >= {(size, k) for size in (1, 3, 7) for k in CANDIDATES}
    assert_one_line(run_cli(*arguments, "17"), "--batch-sizes", "1..16")


def test_clients_that_leave_do_no_harm_to_the_others(server: VllmServer, whole: RingTrace) -> None:
    """vLLM aborts a request whose client has gone, in the middle of a step of others."""

    def leave(start: int) -> None:
        with server.api.stream(Prompt("c", start).text, 400) as tokens:
            assert next(count for count in tokens if count >= 20) < 400

    with ThreadPoolExecutor(4) as pool:
        leaving = [pool.submit(leave, start) for start in range(24)]
        assert server.exact(24, 4, seed=3) == 24
        for one in leaving:
            one.result()
    server.settled()
    assert server.report().failures == {}
    assert [record.invalid_reason() for record in whole.records if record.invalid_reason()] == []
    drafted, accepted = (server.own_counter(f"vllm:spec_decode_num_{what}_tokens_total") for what in ("draft", "accepted"))
    recorded = sum(int(record.verify_len.sum()) for record in whole.records)
    assert 0.9 * drafted < recorded <= drafted, "all but the last steps of requests that were aborted"
    assert sum(int(record.accept_len.sum()) for record in whole.records) <= accepted


def test_metrics_are_those_of_models_made_anew_from_the_trace(server: VllmServer, whole: RingTrace, tmp_path: Path) -> None:
    """Sweep, pins, per-request lengths and refits by the clock are all in it. Sidecar and test have other builds of numpy, whose
    last digits may differ: hence one in a million, not equality.
    """
    client = server.sidecar()
    server.wait(lambda: client.status()["mode"] == "active" or server.exact(8, 4) < 0, "the sweep to end")
    for seed, k in enumerate(itertools.islice(itertools.cycle((*CANDIDATES, None)), 10)):
        client.send("unpin") if k is None else client.send("pin", k)
        assert server.exact(6, 3, seed) == 6
    server.settled()
    client.send("refit")
    status, metrics = server.settled(), server.metrics()
    (tmp_path / "config.yaml").write_text(CONFIG)
    settings = load_settings(tmp_path / "config.yaml", {}).controller
    anew = assert_models_are_those_of(whole, status, metrics, server.log.read_text(errors="replace"), settings)
    assert any((record.verify_len < record.k).any() for record in anew.records), "verify lengths were cut"
