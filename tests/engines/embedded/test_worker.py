import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from adaptive_spec.domain.policy import Mode, Trial
from adaptive_spec.domain.step_record import StepFlag
from adaptive_spec.engines.embedded.models import MAX_K
from adaptive_spec.engines.embedded.worker import main
from adaptive_spec.wire.policy_page import PolicyPage, payload_bytes
from adaptive_spec.wire.ring import RingReader
from tests.support.wire import policy_of


def worker(folder: Path, *options: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-W", "error", "-m", "adaptive_spec.engines.embedded.worker"]
    command += ["--runtime-dir", str(folder / "run"), "--status", str(folder / "status.json"), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def status(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "status.json").read_text()))


def wait_for(folder: Path, wanted: str, above: float = 0, within_s: float = 40.0) -> dict[str, Any]:
    """Wait until a number of the status has risen above a value."""
    ends = time.monotonic() + within_s
    while time.monotonic() < ends:
        if (folder / "status.json").exists() and (found := status(folder))[wanted] > above:
            return found
        time.sleep(0.05)
    raise AssertionError(f"{wanted} did not rise above {above} within {within_s} s")


def finish(process: "subprocess.Popen[str]") -> None:
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "")


def test_it_serves_without_a_sidecar_and_ends_by_itself(tmp_path: Path) -> None:
    finish(worker(tmp_path, "--duration", "3", "--concurrency", "3", "--seed", "1"))
    final = status(tmp_path)
    assert final["done"]
    assert final["k"] == 3  # the launch K
    assert 3.0 <= final["elapsed_s"] < 12.0
    assert final["goodput_tokens_per_s"] > 0
    assert final["lossless"]
    assert final["lossless_checked"] >= 1
    assert 0 < final["acceptance"]["prose"][0] < 1
    with RingReader.open(tmp_path / "run" / "records.ring") as ring:
        records = ring.poll()
        assert ring.info.gpu == final["gpu"]
    assert records[-1].step == final["decode_steps"]
    assert [r.invalid_reason() for r in records if r.invalid_reason()] == []
    assert all(r.flags & StepFlag.FALLBACK for r in records)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_it_follows_the_policy_holds_batches_and_stops_on_a_signal(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o700)
    with PolicyPage.create_or_open(tmp_path / "run" / "policy.page", payload_bytes(64, 7)) as page:
        trials = (Trial(7, 2, 0, 5), Trial(2, 5, 8, 5))
        page.publish(policy_of(1, k=1, trials=trials, mode=Mode.SWEEP))
        page.heartbeat(time.monotonic_ns())
        process = worker(tmp_path, "--concurrency", "3")
        try:
            wait_for(tmp_path, "decode_steps", above=100)
            process.send_signal(signal.SIGTERM)
            finish(process)
        finally:
            process.kill()
    with RingReader.open(tmp_path / "run" / "records.ring") as ring:
        records = ring.poll()
    tried = [(r.batch_size, r.k) for r in records if r.flags & StepFlag.TRIAL]
    assert tried == [(7, 2)] * 5 + [(2, 5)] * 5
    # A request close to its end verifies less than it is asked for, never more.
    assert all(r.num_tokens <= 8 for r in records if r.flags & StepFlag.TRIAL and r.batch_size == 2)
    after = [r for r in records if r.policy_version == 1 and not r.flags & StepFlag.TRIAL]
    assert {r.k for r in after} == {1}
    assert after[-1].batch_size == 3
    assert status(tmp_path)["done"]


def test_compare_runs_every_fixed_k_on_the_same_prompts(tmp_path: Path) -> None:
    process = worker(tmp_path, "--compare", "--concurrency", "2")
    try:
        found = wait_for(tmp_path, "compare_blocks")
        process.send_signal(signal.SIGINT)
        finish(process)
    finally:
        process.kill()
    assert set(found["compare"]) == {"adaptive", *(f"static-{k}" for k in range(MAX_K + 1))}
    assert all(np.isfinite(value) and value > 0 for value in found["compare"].values())
    assert status(tmp_path)["lossless"]
    assert status(tmp_path)["stage"] == "compare"
    assert status(tmp_path)["pid"] == process.pid != os.getpid()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--concurrency", "0"), "--concurrency: must be numbers in 1..16 such as 1,4,16, got '0'"),
        (("--concurrency", "1,x"), "--concurrency: must be numbers in 1..16 such as 1,4,16, got '1,x'"),
        (("--concurrency", "99"), "1..16"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    arguments = ["--runtime-dir", str(tmp_path), "--status", str(tmp_path / "status.json"), *options]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_status_file_in_no_folder_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["--runtime-dir", str(tmp_path), "--status", str(tmp_path / "none" / "status.json")])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "none/status.json" in result.stderr
