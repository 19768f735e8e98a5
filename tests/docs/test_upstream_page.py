"""Every line of SGLang that docs/upstream.md quotes is where the page says, in the released wheel."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import pytest

from tests.engines.release_matrix import cache_folder, cached_wheel

PAGE = Path(__file__).parents[2] / "docs" / "upstream.md"
RELEASE = "0.5.23"
CLAIM = re.compile(r"^- `(?P<file>[\w/]+\.py):(?P<line>\d+)`: `(?P<code>.+)`$", re.MULTILINE)
CLAIMS = [(m["file"], int(m["line"]), m["code"]) for m in CLAIM.finditer(PAGE.read_text())]


def test_every_proposal_has_evidence_and_all_parts() -> None:
    text = PAGE.read_text()
    assert f"SGLang {RELEASE}" in text
    sections = re.split(r"^## (?=\d+\. )", text, flags=re.MULTILINE)[1:]
    assert len(sections) == 12
    for section in sections:
        title = section.splitlines()[0]
        for part in ("**Problem.**", "**Evidence.**", "**Change.**", "**Who benefits.**", "```diff"):
            assert part in section, f"{title}: no {part}"
        assert CLAIM.search(section), f"{title}: no quoted line"
        anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        assert f"](#{anchor})" in text, f"{title}: not in the table as #{anchor}"


@pytest.mark.parametrize(("file", "line", "code"), CLAIMS, ids=lambda value: str(value)[-40:])
def test_a_quoted_line_is_there(file: str, line: int, code: str) -> None:
    wheel = cached_wheel("sglang", RELEASE, cache_folder("sglang"))
    if wheel is None:
        pytest.skip(f"no wheel of sglang {RELEASE} in {cache_folder('sglang')}: make sglang-matrix fetches it")
    with zipfile.ZipFile(wheel) as archive:
        lines = archive.read(f"sglang/{file}").decode().splitlines()
    assert lines[line - 1].strip() == code
