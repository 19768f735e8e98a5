from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from docs.reference_pages.metrics import exposed_name, metric_families, metrics_page, own_labels
from tests.sidecar.test_metrics import CONTRACT


def test_page_in_docs_is_current() -> None:
    page = Path(__file__).parents[2] / "docs" / "metrics.md"
    assert page.read_text() == metrics_page(), "run `make docs`"


def test_page_has_every_name_of_the_contract() -> None:
    rows = dict(re.findall(r"^\| `adaptive_spec_(\w+)` \| (\w+ \| .*?) \| [^|]*[^|]+ \|$", metrics_page(), re.MULTILINE))
    for name, (kind, labels) in CONTRACT.items():
        assert rows[name].startswith(f"{kind} | "), name
        assert set(re.findall(r"`(\w+)`", rows[name])) == labels, name


def test_every_metric_says_what_it_is() -> None:
    families = metric_families()
    assert len({family.name for family in families}) == len(families)
    for family in families:
        assert family.documentation.endswith("."), family.name
        assert not {"gpu", "tp"} & set(own_labels(family))


def _expressions() -> list[str]:
    """The PromQL of the page's table of useful expressions."""
    found: list[str] = re.findall(r"`([^`]*adaptive_spec_[^`]*)`", metrics_page().split("Useful expressions")[1])
    assert len(found) == 7
    return found


def test_expressions_use_metrics_of_the_exporter() -> None:
    names = {exposed_name(family) for family in metric_families()}
    for expression in _expressions():
        used = set(re.findall(r"adaptive_spec_\w+", expression))
        assert used
        assert used <= names, expression


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian package prometheus) is not installed; CI has it")
def test_expressions_are_promql(tmp_path: Path) -> None:
    rules = "\n".join(f"  - {{record: 'page:expression:{i}', expr: '{text}'}}" for i, text in enumerate(_expressions()))
    (tmp_path / "rules.yml").write_text(f"groups:\n- name: page\n  rules:\n{rules}\n")
    result = subprocess.run(
        ["promtool", "check", "rules", str(tmp_path / "rules.yml")], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
