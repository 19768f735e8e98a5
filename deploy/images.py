"""`make images`: build all images for real without a container engine, and run them as compose and Kubernetes run them.

The Dockerfiles are built unchanged by buildah (chroot isolation). What cannot be had here is replaced by stand-ins: the base
`python:...-slim` by this machine's Debian with its Python, the bases of SGLang and vLLM by that and the packages that the
servers' Dockerfiles rely on. Each image then runs in namespaces of its own (docker/confined.sh): uid 1000, no capabilities,
read-only root, /tmp of the size that compose gives it. Needs root on Debian, and what apt and pip fetch; pip inside the build
is set up as pip is here.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from adaptive_spec import __version__
from adaptive_spec.errors import BadInput
from deploy.containers import (
    COMPOSE,
    Container,
    Mount,
    check_confinement,
    check_doctor,
    check_sidecar,
    compose_service,
    run,
    tmp_size,
)  # fmt: skip
from release.supply_chain import SupplyChainError, bill_of_materials

ROOT = Path(__file__).parents[1]
MATERIALS = ROOT / "build" / "sbom"
DOCKER = ROOT / "deploy" / "docker"
PROGRAMS = {"buildah": "buildah", "mmdebstrap": "mmdebstrap", "unshare": "util-linux", "setpriv": "util-linux"}
BASE_PACKAGES = "python3,python3-venv,python3-pip,ca-certificates"
SERVER_PACKAGES = ("numpy", "pydantic", "PyYAML")
"""What the server's Dockerfile expects of its base."""
SERVER_BASE = "localhost/server-stand-in"
TAGS = {
    "sidecar": "localhost/adaptive-spec-sidecar", "server": "localhost/sglang-adaptive-spec",
    "vllm": "localhost/vllm-adaptive-spec",
}  # fmt: skip


def install_programs() -> None:
    """Install what is missing with apt. Raises BadInput when it cannot be had."""
    missing = sorted({package for program, package in PROGRAMS.items() if shutil.which(program) is None})
    if not missing:
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise BadInput(f"images: {', '.join(missing)} cannot be found: install them, or run as root where apt-get is")
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "--yes", "--quiet", "--no-install-recommends", *missing]
    try:
        run(*install, env=quiet)
    except BadInput:
        run("apt-get", "update", "--quiet", env=quiet)
        run(*install, env=quiet)


def base_of(dockerfile: Path) -> str:
    """The first base image that a Dockerfile names, with the defaults of its arguments."""
    text = dockerfile.read_text()
    defaults = dict(re.findall(r"^ARG (\w+)=(\S+)$", text, re.MULTILINE))
    named = re.findall(r"^FROM (\S+)", text, re.MULTILINE)[0]
    return re.sub(r"\$\{(\w+)\}", lambda argument: defaults[argument[1]], named)


def pip_settings(listed: str) -> tuple[str, list[Path]]:
    """Turn the output of `pip config list` into one pip.conf, and the local files and folders that it names.

    The environment's settings take precedence over those of files.
    """
    settings: dict[str, str] = {}
    for name, value in re.findall(r"^(\S+?)=(.+)$", listed, re.MULTILINE):
        scope, _, key = name.rpartition(".")
        if scope == ":env:" or key not in settings:
            settings[key] = " ".join(str(ast.literal_eval(value)).split())
    words = [word for value in settings.values() for word in value.split()]
    named = {Path(word) for word in words if word.startswith("/")}
    # A local index is PATH/simple, and its pages name files beside it.
    named |= {Path(word.removeprefix("file://")).parent for word in words if word.startswith("file:///")}
    text = "[global]\n" + "".join(f"{key} = {value}\n" for key, value in sorted(settings.items()))
    return text, sorted(path for path in named if path.exists())


class Builder:
    """Builds images into a storage of its own below `home`."""

    def __init__(self, home: Path) -> None:
        self._home = home
        home.mkdir(parents=True, exist_ok=True)
        self._buildah = ["buildah", "--root", str(home / "storage"), "--runroot", str(home / "run"), "--storage-driver"]
        self._buildah.append("overlay" if self._works("overlay") else "vfs")
        text, named = pip_settings(run(sys.executable, "-m", "pip", "config", "list").stdout)
        configuration = home / "pip.conf"
        configuration.write_text(text)
        self._volumes = [f"--volume={configuration}:/etc/pip.conf:ro", *(f"--volume={path}:{path}:ro" for path in named)]

    def base(self, name: str) -> None:
        """Make the stand-in base once, and give it the name that the Dockerfiles ask for."""
        if self._has(name):
            return
        archive = self._home / "base.tar"
        if not archive.exists():
            codename = dict(re.findall(r"^(\w+)=\"?([^\"\n]*)", Path("/etc/os-release").read_text(), re.MULTILINE))[
                "VERSION_CODENAME"
            ]
            targets = run("apt-get", "indextargets", "--format", "$(SITE)", "Created-By: Packages").stdout.split()
            if not targets:
                raise BadInput("images: apt-get knows no package index: run apt-get update")
            partial = self._home / "base.partial.tar"
            run("mmdebstrap", "--mode=root", "--variant=minbase", "--quiet", f"--include={BASE_PACKAGES}", codename, partial,
                f"deb {targets[0]} {codename} main")  # fmt: skip
            partial.rename(archive)
        container = self._do("from", "scratch")
        try:
            self._do("add", "--quiet", container, str(archive), "/")
            # As in the image it stands for: `python` exists, and pip may install into the system's own environment.
            root = Path(self._do("mount", container))
            (root / "usr/bin/python").symlink_to("python3")
            for mark in root.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
                mark.unlink()
            self._do("umount", container)
            self._do("commit", "--quiet", container, f"localhost/{name}")
        finally:
            self._do("rm", container)

    def server_base(self, name: str) -> None:
        """Make the stand-in of the servers' images: the base and the packages that their Dockerfiles rely on."""
        if self._has(SERVER_BASE):
            return
        with tempfile.TemporaryDirectory() as folder:
            dockerfile = Path(folder) / "Dockerfile"
            dockerfile.write_text(f"FROM {name}\nRUN pip install --no-cache-dir {' '.join(SERVER_PACKAGES)}\n")
            self.image(Path(folder), dockerfile, SERVER_BASE)

    def image(self, context: Path, dockerfile: Path, tag: str, *options: str) -> None:
        """Build one Dockerfile. Raises BadInput, which names the log of the build."""
        log = self._home / f"{tag.rpartition('/')[2]}.log"
        command = (
            *self._buildah, "bud", "--isolation=chroot", "--format=docker", "--pull-never", "--layers=false", *self._volumes,
            *options, f"--file={dockerfile}", f"--tag={tag}", str(context),
        )  # fmt: skip
        with log.open("w") as output:
            if subprocess.run(command, stdout=output, stderr=output, check=False).returncode != 0:
                reasons = re.findall(r"^.*?(?:Error: |ERROR: ).+$", log.read_text(), re.MULTILINE) or ["no reason was given"]
                raise BadInput(f"images: {tag} cannot be built: {reasons[0].strip()}; see {log}")

    def configuration(self, tag: str) -> dict[str, Any]:
        """What the image says of user, environment, entry point, command and health check."""
        document: dict[str, Any] = json.loads(self._do("inspect", "--type=image", tag))["Docker"]["config"]
        return document

    @contextmanager
    def mounted(self, tag: str) -> Iterator[Path]:
        """The image's files in a folder, which may be written to."""
        container = self._do("from", "--pull-never", tag)
        try:
            yield Path(self._do("mount", container))
        finally:
            self._do("rm", container)

    def _do(self, *arguments: str) -> str:
        return run(*self._buildah, *arguments).stdout.strip()

    def _has(self, name: str) -> bool:
        return bool(self._do("images", "--quiet", f"--filter=reference={name}"))

    def _works(self, driver: str) -> bool:
        with tempfile.TemporaryDirectory(dir=self._home) as folder:
            probe = ["buildah", "--root", f"{folder}/storage", "--runroot", f"{folder}/run", "--storage-driver", driver, "from"]
            return subprocess.run([*probe, "scratch"], capture_output=True, check=False).returncode == 0


SERVER_TMP = "64m"
"""Size of the server's /tmp in the check; compose and Kubernetes leave it unlimited, since CUDA's tools keep files there."""


def check_images(builder: Builder, say: Callable[[str], None]) -> None:
    """Run all images. Raises BadInput for what does not work in them."""
    with tempfile.TemporaryDirectory(prefix="adaptive-spec-images-") as name:
        volumes = Path(name)
        for folder in ("run", "profiles"):
            (volumes / folder).mkdir(mode=0o700)
            os.chown(volumes / folder, 1000, 1000)
        mounts = (
            Mount(COMPOSE / "adaptive-spec.yaml", "/etc/adaptive-spec/config.yaml", "ro"),
            Mount(volumes / "run", "/run/adaptive-spec", "rw"),
            Mount(volumes / "profiles", "/var/lib/adaptive-spec", "rw"),
        )
        for image, size in (("sidecar", tmp_size(compose_service("sidecar"))), ("server", SERVER_TMP), ("vllm", SERVER_TMP)):
            configuration = builder.configuration(TAGS[image])
            with builder.mounted(TAGS[image]) as root:
                used = run("du", "-sm", root).stdout.split()[0]
                say(f"{image}: {used} MB unpacked, user {configuration['User'] or 'root, unless told'}")
                container = Container(root, configuration["Env"], size, mounts)
                check_confinement(container)
                check_doctor(container, complete=image == "sidecar")
                say(f"{image}: doctor finds nothing broken that the image needs")
                say(f"{image}: bill of materials in {write_materials(root, image)}")
                if image == "sidecar":
                    check_sidecar(container, configuration, lambda words: say(f"sidecar: {words}"))
                else:
                    engine = "vllm" if image == "vllm" else "sglang"
                    container.run("python3", "-c", f"from adaptive_spec.engines.{engine} import plugin; plugin.register()")
                    say(f"{image}: the plugin loads, and does nothing without a mode")


def write_materials(root: Path, image: str) -> Path:
    """Write the bill of materials (CycloneDX) of the Python distributions in an image's files; return where.

    Debian's packages are those of the base image, whose publisher lists them.
    """
    folders = sorted({*root.glob("opt/*/lib/python3*/site-packages"), *root.glob("usr/**/python3*/*-packages")})
    path = MATERIALS / f"{image}.cdx.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.write_text(json.dumps(bill_of_materials(folders, TAGS[image].rpartition("/")[2], __version__), indent=1) + "\n")
    except SupplyChainError as error:
        raise BadInput(f"images: bill of materials of {image}: {error}") from error
    return path.relative_to(ROOT)


@click.command()
@click.option(
    "--home", type=click.Path(path_type=Path), default=Path.home() / ".cache" / "adaptive-spec-images", show_default=True,
    help="Folder of the stand-in base and the images, about 3 GB; kept for the next time.",
)  # fmt: skip
def main(home: Path) -> None:
    """Build all images without a container engine, and run them confined."""
    begun_s = time.monotonic()

    def say(words: str) -> None:
        click.echo(f"{time.monotonic() - begun_s:6.1f} s  {words}")

    try:
        if os.geteuid() != 0:
            raise BadInput("images: must be run as root: mounts and namespaces need it")
        install_programs()
        builder = Builder(home.absolute())
        base = base_of(DOCKER / "sidecar.Dockerfile")
        builder.base(base)
        say(f"stand-in for {base}")
        builder.image(ROOT, DOCKER / "sidecar.Dockerfile", TAGS["sidecar"])
        say("sidecar built")
        builder.server_base(base)
        say("stand-in for the images of SGLang and vLLM")
        builder.image(ROOT, DOCKER / "server.Dockerfile", TAGS["server"], f"--build-arg=SGLANG_IMAGE={SERVER_BASE}")
        say("server built")
        builder.image(ROOT, DOCKER / "vllm.Dockerfile", TAGS["vllm"], f"--build-arg=VLLM_IMAGE={SERVER_BASE}")
        say("vllm built")
        check_images(builder, say)
    except BadInput as error:
        click.echo(f"images: {' '.join(str(error).removeprefix('images: ').split())}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
