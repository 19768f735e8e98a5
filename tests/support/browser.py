"""Chromium for the tests of the status page."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium (Debian package chromium) is not installed; CI has it")


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start one; its sandbox does not work for root, as in most containers."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield browser
        browser.close()


@dataclass
class Watched:
    """A page with its console errors, exceptions and requested addresses."""

    page: Page
    errors: list[str] = field(default_factory=list)
    asked: set[str] = field(default_factory=set)

    def text(self, selector: str) -> str:
        return str(self.page.inner_text(selector))


@contextmanager
def watched(
    browser: Browser, url: str, scheme: Literal["light", "dark"] = "light", width: int = 1200, height: int = 900, **options: Any
) -> Iterator[Watched]:
    """Open a page of its own and follow it from before its first request."""
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": height}, locale="en-US", **options)
    page = context.new_page()
    seen = Watched(page)
    page.on("console", lambda message: seen.errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: seen.errors.append(str(error)))
    page.on("request", lambda request: seen.asked.add(request.url))
    page.goto(url)
    yield seen
    context.close()
