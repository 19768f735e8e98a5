"""What the release is made of: bill of materials (CycloneDX), licences, and known vulnerabilities of what it installs.

The bill of materials is made by cyclonedx-bom of installed distributions, the vulnerabilities are looked up by pip-audit. An
advisory service that does not answer, or does not know a package, says nothing about it: that is never taken for "none".
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATIENCE_S = 600.0
SERVICE_S = 15
"""Longest wait for an answer of the advisory service."""
COPYLEFT = ("AGPL", "GPL", "SSPL", "EUPL", "OSL")
"""Beginnings of licences that would bind whoever uses this project. The lesser ones (LGPL, MPL) do not bind an importer."""
NAMES = {"GNU General Public License": "GPL", "GNU Affero General Public License": "AGPL", "GNU Lesser": "LGPL"}
NOT_AUDITED = ("adaptive-spec", "pip", "setuptools")
"""This project, and what a new environment holds before anything is installed in it."""
SHOWN = 5


class SupplyChainError(Exception):
    """A tool failed, or what it found is not allowed. The text says which."""


def bill_of_materials(folders: Iterable[Path], name: str, version: str) -> dict[str, Any]:
    """Return the CycloneDX document of the distributions in these site-packages folders. name, version: of what they make up.

    The folders may be those of an image: nothing in them is run, but for `.pth` files of the first level, which are not read.
    Raises SupplyChainError.
    """
    with tempfile.TemporaryDirectory(prefix="adaptive-spec-sbom-") as work:
        environment, out = Path(work) / "environment", Path(work) / "bom.json"
        venv.create(environment, symlinks=True)
        own = next((environment / "lib").glob("python*")) / "site-packages"
        (own / "folders.pth").write_text("".join(f"{folder}\n" for folder in folders))
        command = [sys.executable, "-m", "cyclonedx_py", "environment", "--output-reproducible", "--of", "JSON", "-o", str(out)]
        _run([*command, str(environment / "bin" / "python")])
        document: dict[str, Any] = json.loads(out.read_text())
    document["metadata"]["component"] = {"type": "application", "bom-ref": f"{name}@{version}", "name": name, "version": version}
    return document


def licences(document: Mapping[str, Any]) -> dict[str, str]:
    """Return the licences that each distribution of a bill of materials states, by name; "" where it states none."""
    found = {}
    for component in document.get("components", []):
        stated = [entry.get("expression") or _of(entry["license"]) for entry in component.get("licenses", [])]
        found[str(component["name"])] = "; ".join(dict.fromkeys(text for text in stated if text))
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def _of(licence: Mapping[str, str]) -> str:
    text = licence.get("id") or licence.get("name") or ""
    return text.splitlines()[0][:80] if text else ""


def require_licences(found: Mapping[str, str]) -> None:
    """Raise SupplyChainError for a distribution whose only licences are copyleft, or that states none."""
    wrong = [f"{name}: {text or 'states none'}" for name, text in found.items() if not _allowed(text)]
    if wrong:
        raise SupplyChainError(f"licences: {'; '.join(wrong[:SHOWN])}")


def _allowed(text: str) -> bool:
    if not text:
        return False
    for name, short in NAMES.items():
        text = text.replace(name, short)
    choices = [choice.strip("() ") for part in text.split(";") for choice in part.split(" OR ")]
    return any(not choice.upper().startswith(COPYLEFT) for choice in choices)


@dataclass(frozen=True)
class Audit:
    """audited: distributions the advisory service knows. unknown: those it said nothing of. vulnerable: "NAME VERSION: IDS"."""

    audited: int
    unknown: tuple[str, ...]
    vulnerable: tuple[str, ...]

    def summary(self, *, allow_unknown: bool) -> str:
        """Return what was found in a line. allow_unknown: also when the service said nothing of some. Raises SupplyChainError."""
        if self.vulnerable:
            raise SupplyChainError(f"known vulnerabilities: {'; '.join(self.vulnerable)}")
        if self.unknown:
            words = f"{len(self.unknown)} of {self.audited + len(self.unknown)} distributions were NOT AUDITED"
            words += f" ({', '.join(self.unknown[:SHOWN])}{', ...' if len(self.unknown) > SHOWN else ''})"
            words += ": the advisory service cannot be reached or does not know them"
            if not allow_unknown:
                raise SupplyChainError(f"{words}; --allow-unaudited goes on without")
            return words
        return f"{self.audited} distributions, no known vulnerability"


def audit(folder: Path) -> Audit:
    """Look up the distributions in a site-packages folder. Raises nothing for a service that does not answer: see `Audit`."""
    command = [sys.executable, "-m", "pip_audit", "--path", str(folder), "--format", "json", "--progress-spinner", "off"]
    command += ["--timeout", str(SERVICE_S)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        return read_audit(result.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        names = sorted(path.name.split("-")[0].replace("_", "-").lower() for path in folder.glob("*.dist-info"))
        return Audit(0, tuple(name for name in names if name not in NOT_AUDITED), ())


def read_audit(text: str) -> Audit:
    """Read pip-audit's JSON. Raises ValueError when it is none, as when the service could not be reached."""
    found = json.loads(text)["dependencies"]
    others = [entry for entry in found if entry["name"].lower().replace("_", "-") not in NOT_AUDITED]
    vulnerable = [
        f"{entry['name']} {entry['version']}: {', '.join(v['id'] for v in entry['vulns'])}"
        for entry in others
        if entry.get("vulns")
    ]
    unknown = [entry["name"] for entry in others if "vulns" not in entry]
    return Audit(len(others) - len(unknown), tuple(unknown), tuple(vulnerable))


def _run(command: list[str]) -> None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise SupplyChainError(f"{command[2]}: took more than {PATIENCE_S:.0f} s") from error
    if result.returncode:
        raise SupplyChainError(f"{command[2]}: exit status {result.returncode}: {result.stderr.strip()[-500:]}")
