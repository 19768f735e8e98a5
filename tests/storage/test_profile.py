from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from adaptive_spec.control.controller import Controller
from adaptive_spec.domain.policy import Granularity, Mode
from adaptive_spec.errors import BadInput
from adaptive_spec.sidecar.profile_plots import start_plots
from adaptive_spec.storage.profile import Profile, ProfileError, check_writable, load_profile, save_profile
from tests.support.simulated_server import SimulatedServer, engine_info, staircase


@pytest.fixture(scope="module")
def server() -> SimulatedServer:
    """A controller that has finished its sweep."""
    server = SimulatedServer(engine_info(Granularity.REQUEST, max_batch=16, holds_batch=True), staircase(16), batch_size=4)
    for _ in range(40):
        server.run(50)
        if server.controller.mode is Mode.ACTIVE:
            return server
    raise AssertionError("the sweep does not end")


@pytest.fixture
def folder(tmp_path: Path, server: SimulatedServer) -> Path:
    folder = tmp_path / server.info.profile_name
    save_profile(
        folder,
        server.info,
        Profile(server.controller.latency_state(), server.controller.calibration_state()),
        server.controller.policy_summary(),
    )
    return folder


def test_a_new_controller_starts_with_the_models_of_the_profile(folder: Path, server: SimulatedServer) -> None:
    profile = load_profile(folder, server.info)
    assert profile is not None
    fresh = Controller(server.settings, server.info)
    fresh.restore_profile(profile.latency, profile.calibration)
    assert fresh.mode is Mode.ACTIVE
    fresh.refit(1.0)
    found = [b.tokens for b in fresh.snapshot(1.0).boundaries]
    assert found == [b.tokens for b in server.controller.snapshot(1.0).boundaries]
    assert found[:3] == [16, 32, 48]


def test_no_profile_is_none(tmp_path: Path, server: SimulatedServer) -> None:
    assert load_profile(tmp_path / "none", server.info) is None
    (tmp_path / "empty" / "plots").mkdir(parents=True)
    assert load_profile(tmp_path / "empty", server.info) is None


@pytest.mark.parametrize("name", ["latency_model.npz", "calibration.npz", "policy.json"])
def test_damaged_or_missing(folder: Path, server: SimulatedServer, name: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(ProfileError, match=f"{name}.*damaged"):
        load_profile(folder, server.info)
    (folder / name).unlink()
    with pytest.raises(ProfileError, match=f"{name} is missing"):
        load_profile(folder, server.info)


def test_foreign(folder: Path, server: SimulatedServer) -> None:
    with pytest.raises(ProfileError, match="another engine: simulated toy none tp1"):
        load_profile(folder, replace(server.info, tp=2))


def test_policy_file(folder: Path, server: SimulatedServer) -> None:
    document = json.loads((folder / "policy.json").read_text())
    assert document["policy"]["mode"] == "active"
    document["policy"]["mode"] = "paused"
    (folder / "policy.json").write_text(json.dumps(document))
    with pytest.raises(ProfileError, match="checksum"):
        load_profile(folder, server.info)


def test_npz_files_can_be_read_with_numpy_alone(folder: Path) -> None:
    with np.load(folder / "latency_model.npz", allow_pickle=False) as file:
        assert "array/boundaries" in file.files


def test_plots_are_drawn_by_another_process(folder: Path, server: SimulatedServer) -> None:
    process = start_plots(folder, server.controller.snapshot(1.0))
    assert process is not None
    assert process.wait(60) == 0
    for name in ("latency_model", "calibration", "token_distribution"):
        assert (folder / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_unwritable_folder(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"profile_dir: '.*file/x': Not a directory; must be a writable folder"):
        check_writable(tmp_path / "file" / "x")
