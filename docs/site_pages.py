"""The mkdocs hook of `make site`: pages from outside docs/, and links that work on GitHub and on the site.

The Markdown is written for GitHub: links go from file to file of the repository. The site has the pages of docs/ and, from the
root, those of `ROOT_PAGES`. On the site a link

    from a root page to docs/PAGE.md       goes to PAGE.md
    from docs/ to ../README.md             goes to index.md, likewise the other root pages
    to any other file of the repository    becomes that file's path, as text: the site does not have it

A link to a file that does not exist is a warning, which `mkdocs build --strict` fails on.
"""

from __future__ import annotations

import logging
import os
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
ROOT_PAGES = {"README.md": "index.md", **{name: name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")}}
"""File of the repository's root: page of the site."""
LINK = re.compile(r"(?P<text>!?\[(?:[^\[\]]|\[[^\]]*\])*\])\((?P<target>[^()\s]+)\)")
"""`[text](target)` and `![text](target)`; the text may hold one level of brackets."""

log = logging.getLogger("mkdocs.hooks.site_pages")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the root."""
    for name, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links of a page."""
    return site_links(markdown, page.file.src_uri)


def site_links(markdown: str, page: str) -> str:
    """Return the text of a site's page with its links as the site wants them. page: its path on the site."""
    source = next((name for name, on_site in ROOT_PAGES.items() if on_site == page), f"docs/{page}")

    def rewritten(link: re.Match[str]) -> str:
        return _rewritten(link["text"], link["target"], source, page)

    # Code, fenced and inline, is left alone.
    parts = re.split(r"(^```.*?^```|`[^`\n]+`(?!\]))", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if i % 2 else LINK.sub(rewritten, part) for i, part in enumerate(parts))


def _rewritten(text: str, target: str, source: str, page: str) -> str:
    path, mark, anchor = target.partition("#")
    if not path or re.match(r"[a-z]+:", target):
        return f"{text}({target})"
    in_repository = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if not (ROOT / in_repository).exists():
        log.warning("%s: '%s': no such file", source, target)
        return f"{text}({target})"
    on_site = ROOT_PAGES.get(in_repository) or (in_repository[5:] if in_repository.startswith("docs/") else "")
    if on_site:
        return f"{text}({os.path.relpath(on_site, posixpath.dirname(page) or '.')}{mark}{anchor})"
    words = text[1:-1].strip("`")
    return f"`{in_repository}`" if words in (path, in_repository) else f"{words} (`{in_repository}`)"
