"""`make release-check`: builds the release and tries it as a stranger would.

    python -m release.check [--work FOLDER] [--allow-unaudited]

Runs `CHECKS` in order, outside the checkout wherever the check does not need the checkout, and stops at the first one that
fails. docs/release-checklist.md lists the same checks by the same names. Needs the extra `release` and a package index: the build
and the fresh environment download what they need.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from adaptive_spec import __version__
from release.supply_chain import SupplyChainError, audit, bill_of_materials, licences, require_licences

ROOT = Path(__file__).parents[1]
COMMAND_PATIENCE_S = 600.0
"""Longest time of one command. All checks together took 262 s on two shared cores."""

WHEEL_FILES = (
    "adaptive_spec/py.typed",
    "adaptive_spec/sidecar/page/index.html",
    "adaptive_spec/engines/embedded/weights/target.safetensors",
    "adaptive_spec/engines/embedded/weights/prompts.json",
    "adaptive_spec/dashboards/overview.json",
)
"""Files that are not Python and that a command fails without."""

LATENCY_CSV = "num_tokens,latency_ms\n" + "".join(
    f"{tokens},{10.0 + 5.0 * ((tokens - 1) // 8) + 0.01 * repeat}\n" for tokens in range(1, 25) for repeat in range(4)
)
"""A staircase of tiles of 8 tokens: `fit` must find the boundaries 8 and 16."""
CALIBRATION_CSV = "cumulative_score,accepted\n" + "".join(
    f"{score / 10:.1f},{int(sample < score)}\n" for score in range(1, 10) for sample in range(10)
)
"""Scores that say exactly how often a token is accepted."""
SCENARIO = """\
name: release-check
granularity: batch
max_k: 3
duration_s: 5
seed: 1
latency:
  verify_curve: [[8, 5.0], [16, 8.0], [32, 12.0]]
  draft_ms_per_step: 0.3
  overhead_ms: 0.5
classes:
  chat: {accept: [0.8, 0.7, 0.6], concentration: 4}
timeline:
  - {at_s: 0, running: 4, mix: {chat: 1.0}}
mean_output_tokens: 100
"""


class CheckFailed(Exception):  # noqa: N818 - it names what happened
    """A check failed; the text says which command and what it printed."""


@dataclass(frozen=True)
class Workplace:
    """folder: everything the check makes. python: interpreter of the fresh environment, made by `install_wheel`.

    allow_unaudited: go on where the advisory service says nothing of a distribution.
    """

    folder: Path
    allow_unaudited: bool = False

    @property
    def dist(self) -> Path:
        return self.folder / "dist"

    @property
    def environment(self) -> Path:
        return self.folder / "environment"

    @property
    def outside(self) -> Path:
        """An empty working directory: nothing of the checkout can be imported from it."""
        return self.folder / "outside"

    @property
    def site_packages(self) -> Path:
        return _only(self.environment / "lib", "python*") / "site-packages"

    @property
    def materials(self) -> Path:
        return self.folder / "adaptive-spec.cdx.json"

    def wheel(self) -> Path:
        return _only(self.dist, "*.whl")

    def sdist(self) -> Path:
        return _only(self.dist, "*.tar.gz")

    def installed(self, *arguments: str) -> str:
        """Run `adaptive-spec ARGUMENTS` of the fresh environment; returns what it printed."""
        return run([str(self.environment / "bin" / "adaptive-spec"), *arguments], self.outside)


def build_packages(place: Workplace) -> str:
    run([sys.executable, "-m", "build", "--outdir", str(place.dist), str(ROOT)], ROOT)
    return f"{place.sdist().name}, {place.wheel().name}"


def check_metadata(place: Workplace) -> str:
    run([sys.executable, "-m", "twine", "check", "--strict", str(place.sdist()), str(place.wheel())], place.outside)
    return "twine has no objection"


def check_contents(place: Workplace) -> str:
    with zipfile.ZipFile(place.wheel()) as wheel:
        names = set(wheel.namelist())
    require_wheel_files(names)
    with tarfile.open(place.sdist()) as sdist:
        members = {member.partition("/")[2] for member in sdist.getnames()}
    missing = {"pyproject.toml", "README.md", "LICENSE", *WHEEL_FILES[:4]} - members
    if missing:
        raise CheckFailed(f"{place.sdist().name}: missing: {', '.join(sorted(missing))}")
    return f"{len(names)} files in the wheel"


def require_wheel_files(names: set[str]) -> None:
    """Raise CheckFailed when the wheel lacks a file, or has one that is not of the package."""
    missing = set(WHEEL_FILES) - names
    foreign = {name for name in names if not name.startswith(("adaptive_spec/", "adaptive_spec-"))}
    if missing or foreign:
        raise CheckFailed(f"wheel: missing: {sorted(missing)}; not of the package: {sorted(foreign)}")


def install_wheel(place: Workplace) -> str:
    venv.create(place.environment, with_pip=True)
    python = str(place.environment / "bin" / "python")
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    run([*pip, "install", "--quiet", "--constraint", str(ROOT / "constraints.txt"), str(place.wheel())], place.outside)
    run([*pip, "check"], place.outside)
    where = run([python, "-c", "import adaptive_spec; print(adaptive_spec.__file__)"], place.outside).strip()
    if not Path(where).is_relative_to(place.environment):
        raise CheckFailed(f"adaptive_spec is imported from {where}, not from the fresh environment")
    version = place.installed("--version").split()[-1]
    if version != __version__:
        raise CheckFailed(f"version: the wheel says {version}, the checkout {__version__}")
    return f"version {version}, no extras"


def run_doctor(place: Workplace) -> str:
    folders = ["--runtime-dir", str(place.folder / "runtime"), "--profile-dir", str(place.folder / "profiles")]
    findings = json.loads(place.installed("doctor", *folders, "--json"))
    torch = [finding for finding in findings if finding["subject"] == "torch"]
    if [finding["state"] for finding in torch] != ["note"]:
        raise CheckFailed(f"doctor: torch must be a note in an environment without extras, got {torch}")
    return f"{len(findings)} findings, none broken"


def run_fit(place: Workplace) -> str:
    latency, calibration = place.outside / "latency.csv", place.outside / "calibration.csv"
    latency.write_text(LATENCY_CSV)
    calibration.write_text(CALIBRATION_CSV)
    out = place.outside / "fitted"
    printed = place.installed("fit", "--latency", str(latency), "--calibration", str(calibration), "--out", str(out), "--json")
    result = json.loads(printed)
    if result["boundaries"] != [8, 16]:
        raise CheckFailed(f"fit: boundaries must be [8, 16], got {result['boundaries']}")
    for name in ("latency_model.npz", "calibration.npz", "plots/latency_model.png", "plots/calibration.png"):
        if not (out / name).is_file():
            raise CheckFailed(f"fit: {name}: no such file")
    return f"boundaries {result['boundaries']}"


def run_bench(place: Workplace) -> str:
    scenario, results = place.outside / "scenario.yaml", place.outside / "results.json"
    scenario.write_text(SCENARIO)
    place.installed("bench", str(scenario), "--policies", "adaptive,oracle,static-1", "--json", str(results), "--jobs", "1")
    policies = json.loads(results.read_text())["scenarios"][0]["policies"]
    if set(policies) != {"adaptive", "oracle", "static-1"} or not 0.0 < policies["adaptive"]["efficiency"] <= 1.1:
        raise CheckFailed(f"bench: unexpected results: {policies}")
    return f"efficiency of adaptive {policies['adaptive']['efficiency']:.3f}"


def list_materials(place: Workplace) -> str:
    document = bill_of_materials([place.site_packages], "adaptive-spec", __version__)
    place.materials.write_text(json.dumps(document, indent=1) + "\n")
    return f"{len(document['components'])} distributions in {place.materials.name}"


def check_licences(place: Workplace) -> str:
    found = licences(json.loads(place.materials.read_text()))
    lines = [f"{name}: {text or 'states none'}" for name, text in found.items()]
    (place.folder / "licences.txt").write_text("\n".join(lines) + "\n")
    require_licences(found)
    return "; ".join(lines)


def look_up_vulnerabilities(place: Workplace) -> str:
    return audit(place.site_packages).summary(allow_unknown=place.allow_unaudited)


CHECKS: dict[str, Callable[[Workplace], str]] = {
    "build": build_packages,
    "metadata": check_metadata,
    "contents": check_contents,
    "install": install_wheel,
    "doctor": run_doctor,
    "fit": run_fit,
    "bench": run_bench,
    "materials": list_materials,
    "licences": check_licences,
    "audit": look_up_vulnerabilities,
}
"""By name, in order; each returns what it found in a few words, or raises CheckFailed."""


def run(command: Sequence[str], folder: Path) -> str:
    """Run a command in a folder; returns its stdout. Raises CheckFailed when it does not end with exit status 0 in time."""
    # PYTHONPATH and PYTHONHOME of the caller would make modules of the checkout importable.
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    try:
        result = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=COMMAND_PATIENCE_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise CheckFailed(f"{' '.join(command)}: took more than {COMMAND_PATIENCE_S:.0f} s") from error
    if result.returncode:
        raise CheckFailed(f"{' '.join(command)}: exit status {result.returncode}\n{result.stdout}{result.stderr}")
    return result.stdout


def _only(folder: Path, pattern: str) -> Path:
    found = list(folder.glob(pattern))
    if len(found) != 1:
        raise CheckFailed(f"{folder}: must hold exactly one {pattern}, got {[path.name for path in found]}")
    return found[0]


def check_release(folder: Path, *, allow_unaudited: bool = False) -> bool:
    """Run all checks in an empty folder, a line each; whether all of them passed."""
    place = Workplace(folder, allow_unaudited)
    place.outside.mkdir(parents=True)
    for name, check in CHECKS.items():
        try:
            found = check(place)
        except (CheckFailed, SupplyChainError) as error:
            print(f"failed  {name:10} {error}", flush=True)
            return False
        print(f"ok      {name:10} {found}", flush=True)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the release and try it in a fresh environment.")
    parser.add_argument("--work", type=Path, help="Folder to make and to keep; a temporary one by default.")
    parser.add_argument(
        "--allow-unaudited", action="store_true", help="Go on where no advisory service answers; the line says so."
    )
    given = parser.parse_args()
    work: Path | None = given.work
    if work is not None:
        if work.exists():
            parser.error(f"--work: '{work}': exists already, must be a new folder")
        return 0 if check_release(work.absolute(), allow_unaudited=given.allow_unaudited) else 1
    with tempfile.TemporaryDirectory(prefix="adaptive-spec-release-") as folder:
        return 0 if check_release(Path(folder), allow_unaudited=given.allow_unaudited) else 1


if __name__ == "__main__":
    sys.exit(main())
