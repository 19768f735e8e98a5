"""Bill of materials, licences and audit of the release, on distributions made for the test and on answers of pip-audit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from release.supply_chain import Audit, SupplyChainError, audit, bill_of_materials, licences, read_audit, require_licences


def _install(folder: Path, name: str, *lines: str) -> None:
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("\n".join(["Metadata-Version: 2.4", f"Name: {name}", "Version: 1.0", *lines, ""]))


def test_bill_of_materials_and_licences(tmp_path: Path) -> None:
    _install(tmp_path / "one", "plain", "License-Expression: MIT", "Requires-Dist: other")
    _install(tmp_path / "two", "other", "Classifier: License :: OSI Approved :: BSD License")
    _install(tmp_path / "two", "silent")
    document = bill_of_materials([tmp_path / "one", tmp_path / "two"], "image", "2.0")
    assert document["bomFormat"] == "CycloneDX"
    assert document["metadata"]["component"]["name"] == "image"
    assert {c["name"]: c["version"] for c in document["components"]} == {"plain": "1.0", "other": "1.0", "silent": "1.0"}
    found = licences(document)
    assert found["plain"] == "MIT"
    assert "BSD" in found["other"]
    assert found["silent"] == ""
    with pytest.raises(SupplyChainError, match="licences: silent: states none"):
        require_licences(found)


@pytest.mark.parametrize(
    ("text", "allowed"),
    [("MIT", True), ("GPL-3.0-only", False), ("AGPL-3.0", False), ("LGPL-2.1", True), ("MPL-2.0", True), ("GPL-2.0 OR MIT", True),
     ("License :: OSI Approved :: BSD License; License :: OSI Approved :: GNU General Public License (GPL)", True), ("", False)],
)  # fmt: skip
def test_licences_that_bind_are_refused(text: str, allowed: bool) -> None:
    if allowed:
        require_licences({"x": text})
    else:
        with pytest.raises(SupplyChainError, match="licences: x: "):
            require_licences({"x": text})


KNOWN = {"name": "numpy", "version": "2.0", "vulns": []}
UNKNOWN = {"name": "river", "skip_reason": "Dependency not found on PyPI and could not be audited: river (0.26)"}
VULNERABLE = {"name": "old", "version": "1.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2.0"]}]}
OURS = {"name": "adaptive_spec", "skip_reason": "not found"}


def _audit(*entries: object) -> Audit:
    return read_audit(json.dumps({"dependencies": entries, "fixes": []}))


def test_silence_of_the_service_is_not_taken_for_none() -> None:
    """pip-audit itself says "No known vulnerabilities found" and ends with 0 when it could look up nothing."""
    found = _audit(KNOWN, UNKNOWN, OURS)
    assert found == Audit(1, ("river",), ())
    with pytest.raises(SupplyChainError, match=r"1 of 2 distributions were NOT AUDITED \(river\).*; --allow-unaudited goes on"):
        found.summary(allow_unknown=False)
    assert "NOT AUDITED" in found.summary(allow_unknown=True)
    assert _audit(KNOWN, OURS).summary(allow_unknown=False) == "1 distributions, no known vulnerability"


def test_a_vulnerability_fails_in_any_case() -> None:
    with pytest.raises(SupplyChainError, match=r"known vulnerabilities: old 1\.0: PYSEC-1"):
        _audit(KNOWN, UNKNOWN, VULNERABLE).summary(allow_unknown=True)


def test_a_service_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip-audit then ends with a traceback and prints nothing."""
    for name in ("numpy", "adaptive_spec", "pip"):
        _install(tmp_path, name)
    monkeypatch.setattr("release.supply_chain.sys.executable", "/bin/false")
    assert audit(tmp_path) == Audit(0, ("numpy",), ())
