"""The images agree with the package, the compose file and the manifests. `make images` builds them and runs them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

from adaptive_spec.cli.main import push
from adaptive_spec.config.load import load_settings
from adaptive_spec.errors import BadInput
from deploy.containers import Container, Mount, check_confinement, compose_service, tmp_size
from deploy.images import base_of, pip_settings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
IMAGES = ("server", "sidecar", "vllm")


def _dockerfile(name: str) -> str:
    return (DEPLOY / "docker" / f"{name}.Dockerfile").read_text()


def _pod() -> dict[str, Any]:
    deployment = yaml.safe_load((DEPLOY / "kubernetes" / "base" / "deployment.yaml").read_text())
    pod: dict[str, Any] = deployment["spec"]["template"]["spec"]
    return pod


@pytest.mark.parametrize("name", IMAGES)
def test_what_the_wheel_includes_is_in_the_build(name: str) -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    needed = [*build["targets"]["wheel"]["force-include"], *build["packages"], "pyproject.toml", "README.md", "LICENSE"]
    let = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copies = re.findall(r"^COPY (?!--from)(.+) (\S+)$", _dockerfile(name), re.MULTILINE)
    copied = [(source, target) for sources, target in copies for source in sources.split()]
    for path in needed:
        assert any(fnmatch(path, pattern) for pattern in let), f"{path} is not in the build context"
        found = [target for source, target in copied if fnmatch(path, source)]
        assert found, f"{path} is not copied"
        wanted = path if path in build["packages"] else str(Path(path).parent)
        assert Path(found[0]) == Path(wanted), "the wheel looks for it below the same folder"


def test_temporary_files_have_the_same_room_everywhere() -> None:
    size = tmp_size(compose_service("sidecar"))
    volume = next(volume for volume in _pod()["volumes"] if volume["name"] == "sidecar-tmp")
    assert volume["emptyDir"] == {"medium": "Memory", "sizeLimit": f"{size.removesuffix('m')}Mi"}
    assert re.search(r"MPLCONFIGDIR=/tmp/", _dockerfile("sidecar"))
    with pytest.raises(BadInput, match="/tmp has no size"):
        tmp_size({"tmpfs": ["/tmp"]})


def test_something_reaps_what_a_server_leaves_behind() -> None:
    for name in ("sglang", "vllm"):
        assert compose_service(name)["init"] is True


def test_one_user_everywhere() -> None:
    assert re.search(r"^USER 1000:1000$", _dockerfile("sidecar"), re.MULTILINE)
    for name in ("sglang", "sidecar"):
        assert compose_service(name)["user"] == "1000:1000"
    security = _pod()["securityContext"]
    assert {security[key] for key in ("runAsUser", "runAsGroup", "fsGroup")} == {1000}
    runtime = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text())["volumes"]["runtime"]
    assert "mode=0700,uid=1000,gid=1000" in runtime["driver_opts"]["o"]


def test_the_sidecars_root_is_read_only_everywhere() -> None:
    sidecar = next(container for container in _pod()["containers"] if container["name"] == "sidecar")
    assert sidecar["securityContext"]["readOnlyRootFilesystem"] is True
    assert compose_service("sidecar")["read_only"] is True


def test_health_checks_read_the_configured_folder() -> None:
    settings = load_settings(DEPLOY / "compose" / "adaptive-spec.yaml")
    port, probe = settings.port, ["adaptive-spec", "doctor", "--alive", "--runtime-dir", str(settings.runtime_dir)]
    text = _dockerfile("sidecar")
    assert f"CMD {json.dumps(probe)}" in text
    for folder in ("base", "fleet"):
        assert load_settings(DEPLOY / "kubernetes" / folder / "config.yaml").runtime_dir == settings.runtime_dir
    assert f"EXPOSE {port}\n" in text
    assert f"127.0.0.1:{port}:{port}" in compose_service("sidecar")["ports"]
    assert "healthcheck" not in compose_service("sidecar"), "the image brings its own"
    sidecar = next(container for container in _pod()["containers"] if container["name"] == "sidecar")
    start_s = int((re.findall(r"--start-period=(\d+)s", text) or ["0"])[0])
    assert sidecar["startupProbe"]["periodSeconds"] * sidecar["startupProbe"]["failureThreshold"] == start_s
    assert sidecar["startupProbe"]["exec"]["command"] == sidecar["livenessProbe"]["exec"]["command"] == probe


def test_one_title_of_the_folder_in_grafana() -> None:
    providers = yaml.safe_load((DEPLOY / "compose/grafana/provisioning/dashboards/adaptive-spec.yaml").read_text())["providers"]
    kustomization = yaml.safe_load((ROOT / "dashboards" / "kustomization.yaml").read_text())
    annotations = kustomization["configMapGenerator"][0]["options"]["annotations"]
    default = next(option.default for option in push.params if option.name == "folder")
    assert providers[0]["folder"] == annotations["grafana_folder"] == default


def test_both_images_are_built_on_the_same_base() -> None:
    bases = {base_of(DEPLOY / "docker" / f"{name}.Dockerfile") for name in IMAGES}
    assert len(bases) == 1, "make images has a stand-in for one"


def test_pip_in_the_build_is_set_up_as_here(tmp_path: Path) -> None:
    (tmp_path / "simple").mkdir()
    (tmp_path / "wheels").mkdir()
    listed = (
        f":env:.timeout='180'\nglobal.timeout='5'\nglobal.extra-index-url='file://{tmp_path}/simple\\nhttps://x.example/simple'\n"
    )
    listed += f"global.find-links='{tmp_path}/wheels'\nglobal.cert='/no/such/file'\n"
    text, named = pip_settings(listed)
    assert "timeout = 180\n" in text
    assert f"extra-index-url = file://{tmp_path}/simple https://x.example/simple\n" in text
    assert named == [tmp_path, tmp_path / "wheels"], "an index with the files beside it"


def _namespaces_allowed() -> bool:
    if os.geteuid() != 0 or shutil.which("unshare") is None or shutil.which("setpriv") is None:
        return False
    probe = ["unshare", "--mount", "--pid", "--net", "--fork", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not _namespaces_allowed(), reason="namespaces and mounts are not allowed here")
def test_confined_is_confined(tmp_path: Path) -> None:
    """What `make images` runs things in, on a root made of this machine's own programs."""
    root, volume = tmp_path / "root", tmp_path / "volume"
    for folder in ("proc", "dev", "tmp", "usr"):
        (root / folder).mkdir(parents=True)
    for name in ("bin", "lib", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    volume.mkdir()
    os.chown(volume, 1000, 1000)
    mounts = [Mount(Path("/usr"), "/usr", "ro"), Mount(volume, "/volume", "rw")]
    container = Container(root, ["PATH=/usr/bin:/bin", "WORD=x"], "1m", mounts)
    check_confinement(container)
    script = "echo $$ $WORD; touch /volume/f /usr/f; head -c 2000000 /dev/zero > /tmp/f; ls /proc | grep -c '^[0-9]'"
    result = subprocess.run(container.command("sh", "-c", script), capture_output=True, text=True, check=False)
    lines = result.stdout.split("\n")
    assert lines[0] == "1 x", "PID 1 of its own namespace, with no other environment than the image's"
    assert int(lines[1]) < 6, "other processes are not seen"
    assert "Read-only file system" in result.stderr
    assert "No space left on device" in result.stderr
    assert (volume / "f").stat().st_uid == 1000
    with pytest.raises(BadInput):
        check_confinement(Container(root, ["PATH=/usr/bin:/bin"], "1m", [*mounts, Mount(volume, "/tmp", "ro")]))
