from __future__ import annotations

import contextlib
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from adaptive_spec.cli.candidates import candidates_of, engine_of
from adaptive_spec.domain.policy import Granularity, Mode
from adaptive_spec.errors import BadInput
from adaptive_spec.offline.draft_length_choice import BatchRange, Choice, schedule_document
from adaptive_spec.storage.archive import load_archive, save_archive
from adaptive_spec.storage.profile import CALIBRATION, Profile, _checksum, save_profile
from tests.support.processes import assert_one_line, run_cli
from tests.support.simulated_server import SimulatedServer, engine_info, staircase


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    server = SimulatedServer(engine_info(Granularity.BATCH, max_batch=16, holds_batch=True), staircase(16), batch_size=4)
    for _ in range(60):
        server.run(50)
        if server.controller.mode is Mode.ACTIVE:
            break
    server.run(200)
    folder = tmp_path_factory.mktemp("profiles") / server.info.profile_name
    controller = server.controller
    profile = Profile(controller.latency_state(), controller.calibration_state())
    save_profile(folder, server.info, profile, controller.policy_summary())
    return folder


def test_command_writes_what_sglang_reads(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "adaptive.json"
    result = run_cli("candidates", folder, "--states", "3", "--out", out, "--json")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    config = json.loads(out.read_text())
    assert config == document["config"]
    assert len(document["states"]) <= 3
    assert {k for entry in config.values() for k in entry["candidate_steps"]} <= set(document["states"])
    assert min(map(int, config)) == 1
    assert 0.0 <= document["loss"] < 0.2
    assert set(document["dropping"]) == {str(k) for k in document["states"]}
    more = json.loads(run_cli("candidates", folder, "--states", "8", "--json").stdout)
    assert more["loss"] <= document["loss"]
    words = run_cli("candidates", folder)
    assert words.returncode == 0, words.stderr
    assert "mean loss" in words.stdout


def test_bad_input_is_one_line(folder: Path, tmp_path: Path) -> None:
    assert_one_line(run_cli("candidates", tmp_path), "PROFILE", "policy.json is missing")
    assert_one_line(run_cli("candidates", folder, "--states", "0"), "--states", "1<=x<=33")
    assert_one_line(run_cli("candidates", folder, "--out", tmp_path / "no" / "such" / "file"), "--out", "No such file")
    (tmp_path / "policy.json").write_text("{}")
    assert_one_line(run_cli("candidates", tmp_path), "PROFILE", "damaged")


def test_vllms_schedule_has_every_k_of_the_choice() -> None:
    ranges = (BatchRange(1, 3, (1, 5)), BatchRange(4, 20, (0, 3)))
    schedule = schedule_document(Choice((0, 1, 3, 5), 0.0, ranges, {}))
    assert {k for _, _, k in schedule} == {0, 1, 3, 5}
    assert schedule[0][0] == 1
    assert schedule[-1][1] == 20
    assert [first for first, _, _ in schedule[1:]] == [last + 1 for _, last, _ in schedule[:-1]]
    assert schedule[0] == [1, 3, 5]


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("engine", None), ("engine", [1]), ("engine", f"a b c tp{'9' * 5000}"), ("engine", "a b c tp0"), ("policy", []),
        ("table", 5), ("table", [0] * 100_000), ("candidates", "0123"), ("candidates", [float("inf")]),
        ("candidates", [0, 10**12]),
        ("candidates", [-5, -1]), ("candidates", []), ("candidates", list(range(10_000))), ("candidates", [4, 2, 2]),
    ],
)  # fmt: skip
def test_whatever_a_policy_file_says_it_is_one_line(folder: Path, tmp_path: Path, where: str, value: object) -> None:
    shutil.copytree(folder, tmp_path / "profile")
    path = tmp_path / "profile" / "policy.json"
    document = json.loads(path.read_text())
    document.pop("sha256")
    (document if where in document else document["policy"])[where] = value
    path.write_text(json.dumps({**document, "sha256": _checksum(document)}))
    for read in (engine_of, partial(candidates_of, states=4, max_batch=None)):
        with pytest.raises(BadInput, match=r"^PROFILE: '.*': policy.json is damaged: [^\n]{1,300}; must be a profile folder$"):
            read(tmp_path / "profile")


def test_whatever_its_arrays_hold_it_is_one_line(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "profile")
    path = tmp_path / "profile" / "calibration.npz"
    archive = load_archive(path, CALIBRATION)
    for name, array in archive.arrays.items():
        save_archive(path, CALIBRATION, {**archive.arrays, name: np.zeros((), array.dtype)}, archive.meta)
        with contextlib.suppress(BadInput):  # some need no more than one number
            candidates_of(tmp_path / "profile", 4, None)
