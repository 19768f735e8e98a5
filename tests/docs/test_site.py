"""The site builds without a warning, holds every page and picture, and loads nothing from elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from docs.site_pages import site_links

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_every_page_and_picture_is_on_the_site(site: Path) -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        html = page.relative_to(ROOT / "docs").with_suffix(".html")
        assert (site / (html.parent / "index.html" if html.name == "README.html" else html)).is_file(), page
    for picture in (ROOT / "docs").rglob("*.png"):
        assert (site / picture.relative_to(ROOT / "docs")).is_file(), picture
    for name in ("index", "CHANGELOG", "CONTRIBUTING", "SECURITY"):
        assert (site / f"{name}.html").is_file()


def test_source_code_is_not_on_the_site(site: Path) -> None:
    assert not list(site.rglob("*.py"))


def test_the_api_page_documents_what_its_table_names(site: Path) -> None:
    page = (site / "api.html").read_text()
    names = set(re.findall(r"`(adaptive_spec\.[\w.]+)`", (ROOT / "docs" / "api.md").read_text()))
    assert len(names) >= 5
    for name in names:
        assert f'id="{name}"' in page, name


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|iframe)[^>]*\bsrc="?(https?://[^">\s]+)', page.read_text())
        loaded += re.findall(r'<link[^>]*rel="?(?:stylesheet|preconnect)"?[^>]*href="?(https?://[^">\s]+)', page.read_text())
        assert loaded == [], page


@pytest.mark.parametrize(
    ("page", "markdown", "on_site"),
    [
        ("index.md", "[a](docs/sglang.md#dspark)", "[a](sglang.md#dspark)"),
        ("index.md", "![a](docs/images/demo.png)", "![a](images/demo.png)"),
        ("index.md", "[LICENSE](LICENSE)", "`LICENSE`"),
        ("how-to/find-out-why-k-moved.md", "[a](../../README.md#install)", "[a](../index.md#install)"),
        ("how-to/find-out-why-k-moved.md", "[a](../sglang.md)", "[a](../sglang.md)"),
        ("sglang.md", "[the kit](../examples/sglang-cpu)", "the kit (`examples/sglang-cpu`)"),
        ("sglang.md", "[a](https://example.org/x.md)", "[a](https://example.org/x.md)"),
        ("sglang.md", "[a](#dspark)", "[a](#dspark)"),
        ("sglang.md", "`[a](../LICENSE)`", "`[a](../LICENSE)`"),
        ("sglang.md", "```\n[a](../LICENSE)\n```", "```\n[a](../LICENSE)\n```"),
    ],
)
def test_links_are_translated(page: str, markdown: str, on_site: str) -> None:
    assert site_links(markdown, page) == on_site


def test_a_link_to_a_missing_file_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    site_links("[a](../nowhere.md)", "sglang.md")
    assert "docs/sglang.md: '../nowhere.md': no such file" in caplog.text


def test_the_example_of_the_api_page_runs(tmp_path: Path) -> None:
    example = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(), re.DOTALL)[0]
    example = example.replace("/dev/shm/my-engine", str(tmp_path))
    assert "\ntap.close()" in example
    example = example.replace(
        "\ntap.close()", "\nprint(k, tap.counters.records_written, tap.counters.hook_failures)\ntap.close()"
    )
    result = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (result.stdout, result.stderr) == ("2 1 0\n", "")
