"""A page as a person meets it: in headless Chromium, through Playwright; skips aloud where either is missing."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest


@dataclass
class Opened:
    """A tab, with what it asked for and what went wrong in it."""

    page: Any
    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def too_wide(self) -> bool:
        """Whether the page has to be scrolled sideways."""
        wide: bool = self.page.evaluate("document.documentElement.scrollWidth > innerWidth")
        return wide


@contextlib.contextmanager
def opened(url: str, width: int = 1400, height: int = 900, language: str = "en-US") -> Iterator[Opened]:
    """A page in a browser of its own."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: no page is looked at")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no chromium: no page is looked at")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        try:
            page = browser.new_page(viewport={"width": width, "height": height}, locale=language)
            tab = Opened(page)
            page.on("request", lambda request: tab.requests.append(request.url))
            page.on("pageerror", lambda error: tab.errors.append(str(error)))
            page.on("console", lambda m: tab.errors.append(m.text) if m.type in ("error", "warning") else None)
            page.goto(url)
            yield tab
        finally:
            browser.close()
