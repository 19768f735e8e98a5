from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from adaptive_spec.cli.demo import result_document
from adaptive_spec.cli.demo_view import DemoState, DemoView, compare_table, live_view, plain_line
from adaptive_spec.cli.main import main
from tests.support.processes import PATIENCE_S, assert_one_line, run_cli, wait_for

CONTRACT = {
    "engine": str, "duration_s": float, "sweep_s": float, "decode_steps": int, "output_tokens": int,
    "goodput_tokens_per_s": float, "policy_swaps": int, "boundaries": list, "calibration_error": (float, type(None)),
    "drift_events": dict, "lossless": bool, "compare": dict,
}  # fmt: skip

ENGINE: dict[str, Any] = {
    "engine": "embedded", "pid": 11, "done": False, "elapsed_s": 12.5, "model": "byte-5m", "gpu": "some CPU", "stage": "compare",
    "phase": {"kind": "prose", "concurrency": 4}, "k": 3, "batch_size": 4, "decode_steps": 100, "output_tokens": 900,
    "decode_s": 0.5, "goodput_tokens_per_s": 1700.0, "acceptance": {"prose": [0.5, None], "code": [0.9, 0.8]},
    "compare": {"adaptive": 1800.0, "static-0": 900.0, "static-2": 1500.0}, "lossless": True, "lossless_checked": 2,
}  # fmt: skip
SIDECAR: dict[str, Any] = {
    "mode": "active", "reason": "sweep done", "policy_version": 4, "k_by_batch_size": {"1": 5, "2": 5, "3": 2},
    "boundaries": [3, 6], "sidecar_pid": 12, "latency_points": [[1, 1.0, 3], [3, 1.1, 3], [4, 1.6, 3], [7, 2.2, 3]],
    "swaps": {"sweep": 1, "gain": 2}, "sweep": {"progress": 1.0, "steps": 80, "duration_s": 1.5},
    "calibration": {"kind": "chain", "ece": 0.02}, "drift_events": {"latency": 0, "calibration": 1}, "measured_gain": 0.25,
    "events": [{"time_s": 1.0, "age_s": 3.0, "kind": "swap", "text": "K 3 to 5 at batch 2"}],
}  # fmt: skip


def _pid(file: Path) -> int | None:
    """What a sidecar wrote of itself; None while one has gone and the next has not begun."""
    try:
        return int(json.loads(file.read_bytes())["pid"])
    except (OSError, ValueError):
        return None


STATE = DemoState(90.0, ENGINE, SIDECAR, True)


def _text(thing: Any) -> str:
    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115 - closed with the console's life
    with console.file:
        console.print(thing)
    return console.export_text()


def test_document_of_a_run() -> None:
    document = result_document(STATE)
    for name, kind in CONTRACT.items():
        assert isinstance(document[name], kind), name  # type: ignore[arg-type]  # a type or a tuple of types
    assert document["goodput_tokens_per_s"] == 1800.0
    assert document["policy_swaps"] == 3
    assert document["sweep_s"] == 1.5
    assert document["calibration_error"] == 0.02
    json.dumps(document)


def test_document_when_nothing_was_heard() -> None:
    document = result_document(DemoState(None))
    assert document["decode_steps"] == 0
    assert document["lossless"] is False


def test_the_live_view_shows_both_processes() -> None:
    text = _text(live_view(STATE, "http://127.0.0.1:9477"))
    words = (
        "active",
        "prose, 4 concurrent requests",
        "K 3 at batch 4",
        "1:5 2:5 3:2",
        "3, 6",
        "K 3 to 5 at batch 2",
        "pids: engine 11, sidecar 12",
    )
    for word in (*words, "0.50", "12 of 90 s", "+25.0% over the launch K (estimate)", "http://127.0.0.1:9477"):
        assert word in text, word
    assert "no sidecar" in _text(live_view(DemoState(None, ENGINE), ""))
    assert "loading" in _text(live_view(DemoState(None), ""))


def test_plain_lines() -> None:
    assert "active   prose x4  K 3  1,700 tokens/s  boundaries 3, 6  policy 4  K by batch 1-2: 5, 3: 2" in plain_line(STATE)
    assert "no sidecar" in plain_line(DemoState(None, ENGINE, SIDECAR, False))
    assert plain_line(DemoState(None)) == "loading the models"


def test_events_are_printed_once() -> None:
    console = Console(width=160, record=True, quiet=False, file=open(os.devnull, "w"), force_terminal=False)  # noqa: SIM115 - below
    with console.file, DemoView("http://x", console) as view:
        view.show(STATE)
        view.show(STATE)
    assert console.export_text().count("K 3 to 5 at batch 2") == 1


ROUNDS: dict[str, Any] = {
    "rounds": [{"adaptive": 120.0, "sglang-own": 100.0}, {"adaptive": 110.0, "sglang-own": 100.0}], "rounds_planned": 8,
    "ratios": {"sglang-own": {"by_round": [1.2, 1.1], "median": 1.15, "quartiles": [1.125, 1.175]}}, "round": 3,
    "arm": "sglang-own", "steps_not_as_asked": 1, "k_switches": 12, "arms": {"adaptive": {"steps": 50}}, "rounds_repeated": 0,
}  # fmt: skip


def test_rounds_against_other_policies_are_shown() -> None:
    state = DemoState(None, ENGINE | ROUNDS, SIDECAR, True)
    document = result_document(state)
    assert {name: document[name] for name in ROUNDS if name not in ("round", "arm")} == {
        name: value for name, value in ROUNDS.items() if name not in ("round", "arm")
    }
    assert "active   round 3, sglang-own: prose x4" in plain_line(state)
    assert "adaptive / sglang-own" in _text(live_view(state, ""))
    console = Console(width=160, record=True, file=open(os.devnull, "w"), force_terminal=False)  # noqa: SIM115 - below
    with console.file, DemoView("http://x", console) as view:
        view.show(state)
        view.show(state)
        view.conclude(document, state)
    text = console.export_text()
    assert text.count("round 2: adaptive 110, sglang-own 100 tokens/s") == 1
    for words in ("1.150", "1 of 100 steps ran another K than was asked for (1.00%)", "2 of 8 done"):
        assert words in text, words


def test_rounds_are_for_servers() -> None:
    assert_one_line(run_cli("demo", "--rounds", "2"), "--rounds", "2", "sglang or vllm")


def test_compare_table_names_the_best_fixed_k() -> None:
    text = _text(compare_table(ENGINE["compare"]))
    assert "static-2 (best fixed)" in text
    assert "x 1.200" in text
    assert "x 2.000" in text


@pytest.mark.parametrize("status", [0, 1])
def test_the_status_of_the_run_is_the_commands_own(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    monkeypatch.setattr("adaptive_spec.cli.demo.run_demo", lambda _options: status)
    monkeypatch.setattr(sys, "argv", ["adaptive-spec", "demo", "--port", "0"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == status


def test_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert_one_line(run_cli("demo", "--port", port, "--duration", "1"), "--port", port, "Address already in use")


@pytest.fixture
def demo_folders() -> set[Path]:
    return set(Path("/dev/shm").glob("adaptive-spec-demo-*"))


def test_a_run_with_a_killed_sidecar(tmp_path: Path, demo_folders: set[Path]) -> None:
    """The whole demo for some seconds: engine, sidecar, kill -9 of the sidecar, the end after the duration."""
    out = tmp_path / "out.json"
    command = [
        sys.executable,
        "-m",
        "adaptive_spec.cli",
        "demo",
        "--duration",
        "12",
        "--port",
        "0",
        "--json",
        str(out),
        "--neighbours",
        "1",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as demo:
        try:
            folder = wait_for(
                lambda: set(Path("/dev/shm").glob("adaptive-spec-demo-*")) - demo_folders, "the demo's folder"
            ).pop()
            checkpoint = folder / "runtime" / "checkpoint.npz"
            wait_for(checkpoint.exists, "a checkpoint")
            steps = json.loads((folder / "engine.json").read_bytes())["decode_steps"]
            first = json.loads((folder / "runtime" / "sidecar.json").read_bytes())["pid"]
            os.kill(first, signal.SIGKILL)
            wait_for(lambda: _pid(folder / "runtime" / "sidecar.json") not in (None, first), "another sidecar")
            assert "continuing from the checkpoint" in wait_for(lambda: _has(folder / "sidecar.log", "continuing"), "its word")
            assert json.loads((folder / "engine.json").read_bytes())["decode_steps"] > steps, (
                "the engine did not wait for the sidecar"
            )
            text, _ = demo.communicate(timeout=PATIENCE_S)
        finally:
            demo.kill()
    assert demo.returncode == 0, text
    assert "Traceback" not in text
    document = json.loads(out.read_text())
    assert {name for name, kind in CONTRACT.items() if not isinstance(document[name], kind)} == set()  # type: ignore[arg-type]
    assert document["lossless"] is True
    assert document["lossless_checked"] > 0
    assert document["sidecar_restarts"] == 1
    assert document["neighbours"] == 1
    assert document["decode_steps"] > 20
    assert document["output_tokens"] >= document["decode_steps"]
    assert document["goodput_tokens_per_s"] > 0
    assert not folder.exists(), "nothing is left behind"


def _has(path: Path, word: str) -> str | None:
    text = path.read_text()
    return text if word in text else None
