from __future__ import annotations

from pathlib import Path

from docs.reference_pages.configuration import configuration_page


def test_page_in_docs_is_current() -> None:
    page = Path(__file__).parents[2] / "docs" / "configuration.md"
    assert page.read_text() == configuration_page(), "run `make docs`"


def test_page_names_every_key() -> None:
    page = configuration_page()
    for key in ("`runtime_dir`", "`controller.mode`", "`controller.latency.jump_threshold`", "`controller.sweep.max_steps`"):
        assert f"| {key} |" in page
