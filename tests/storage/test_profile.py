from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from adaptive_spec.control.controller import Controller
from adaptive_spec.domain.engine_info import fingerprint_of
from adaptive_spec.domain.policy import Granularity, Mode
from adaptive_spec.errors import BadInput
from adaptive_spec.sidecar.profile_plots import start_plots
from adaptive_spec.storage.profile import (
    Profile,
    ProfileError,
    check_writable,
    load_profile,
    other_profiles,
    profiled_engine,
    save_profile,
)
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


def test_a_profile_with_a_fingerprint_knows_its_engine_and_names_what_differs(folder: Path, server: SimulatedServer) -> None:
    profile = load_profile(folder, server.info)
    assert profile is not None
    infos = [replace(server.info, fingerprint=fingerprint_of({"dtype": "bf16", "version": version})) for version in ("1", "2")]
    places = [folder.parent / info.profile_name for info in infos]
    for info, place in zip(infos, places, strict=True):
        save_profile(place, info, profile, {"candidates": [0, 1], "table": [[0], [0]]})
        assert load_profile(place, profiled_engine(place)) is not None
    assert len({folder, *places}) == 3
    assert any("version: must be 2, got 1" in words for words in other_profiles(places[1], infos[1]))


def test_the_name_without_the_hash_leads_to_the_newest_profile(folder: Path, server: SimulatedServer, tmp_path: Path) -> None:
    profile = load_profile(folder, server.info)
    assert profile is not None
    infos = [replace(server.info, fingerprint=fingerprint_of({"dtype": dtype})) for dtype in ("fp8", "bf16")]
    for info in infos:
        save_profile(tmp_path / "p" / info.profile_name, info, profile, {"candidates": [0, 1], "table": [[0], [0]]})
        link = tmp_path / "p" / info.readable_name
        assert os.readlink(link) == info.profile_name
        assert load_profile(link, info) is not None
    plain = tmp_path / "q" / infos[0].readable_name
    plain.mkdir(parents=True)
    save_profile(tmp_path / "q" / infos[0].profile_name, infos[0], profile, {"candidates": [0, 1], "table": [[0], [0]]})
    assert not plain.is_symlink(), "a folder is never replaced"
    assert sorted(path.name for path in (tmp_path / "q").iterdir()) == sorted([plain.name, infos[0].profile_name])


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
