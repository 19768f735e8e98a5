"""Which version strings stand for a supported release."""

from __future__ import annotations

import pytest

from adaptive_spec.engines.releases import release_of, version_refusal

SUPPORTED = {"0.5.22": (), "0.5.23": ()}


@pytest.mark.parametrize(
    ("version", "release"),
    [
        ("0.5.23", "0.5.23"),
        ("0.5.23+cu130", "0.5.23"),
        ("v0.5.23+local.1", "0.5.23"),
        ("0.5.15.post1", "0.5.15.post1"),
        ("0.5.24.dev3", None),
        ("0.5.24.dev3+g1a2b3c4", None),
        ("0.5.24rc1", None),
        ("0.5.24.rc1", None),
        ("0.0.0.dev0", None),
        ("unknown", None),
        ("", None),
    ],
)
def test_release_of_a_version(version: str, release: str | None) -> None:
    assert release_of(version) == release


@pytest.mark.parametrize("version", ["0.5.23", "0.5.22+cu130"])
def test_a_supported_release_is_not_refused(version: str) -> None:
    assert version_refusal("SGLang", version, SUPPORTED, "VARIABLE=1") is None


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("0.5.21", "is not a supported release"),
        ("0.5.23.post1", "is not a supported release"),
        ("0.5.24.dev3+g1a2b", "is a development build or pre-release"),
        ("0.5.23rc1", "is a development build or pre-release"),
        ("unknown", "is not a known version"),
    ],
)
def test_any_other_version_is_refused_with_the_way_out(version: str, words: str) -> None:
    text = version_refusal("SGLang", version, SUPPORTED, "VARIABLE=1")
    assert text is not None
    assert text.startswith(f"SGLang {version} {words}")
    assert text.endswith("(supported: 0.5.22, 0.5.23); VARIABLE=1 tries it")
