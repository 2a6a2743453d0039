"""Chromium on the pages of a running server, driven by Playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
PATIENCE = 120_000  # milliseconds; a machine may be busy with other things


def executable() -> str | None:
    """The Chromium to use; None: the one Playwright installed, if any."""
    named = os.environ.get("CHROMIUM")
    return named or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextmanager
def open_page(url: str) -> Iterator[Page]:
    """A page of ComfyUI with its graph editor ready. Skips where Playwright or Chromium is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    with playwright.sync_playwright() as driver:
        path = executable()
        if path is None and not Path(driver.chromium.executable_path).exists():
            pytest.skip("no Chromium: set CHROMIUM, or `playwright install chromium`")
        chromium = driver.chromium.launch(executable_path=path, args=ARGUMENTS)
        try:
            page = chromium.new_page(viewport={"width": 1600, "height": 900})
            page.set_default_timeout(PATIENCE)
            page.goto(url)
            page.wait_for_function("window.app && window.app.graph && window.app.extensionManager")
            page.locator(".templates-tab-button").wait_for()
            yield page
        finally:
            chromium.close()


def screenshot(page: Page, name: str, fallback: Path) -> Path:
    """Write NAME.png into CVIV_SCREENSHOTS, else into `fallback`, and return its path."""
    folder = Path(os.environ.get("CVIV_SCREENSHOTS") or fallback)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.png"
    page.screenshot(path=path)
    return path


def open_templates(page: Page, pack: str) -> None:
    """Open the template browser at the templates of `pack`."""
    page.locator(".templates-tab-button").click()
    page.locator("[role=dialog]").get_by_text(pack, exact=True).click()


def template_card(page: Page, name: str) -> Locator:
    """The card of a template in the open browser, which makes cards as one scrolls."""
    card = page.locator(f'[data-testid="template-workflow-{name}"]')
    cards = page.locator('[data-testid^="template-workflow-"]')
    cards.first.wait_for()
    for _ in range(PATIENCE // 250):
        if card.count():
            break
        cards.last.scroll_into_view_if_needed()
        page.wait_for_timeout(250)
    card.scroll_into_view_if_needed()
    return card


def open_template(page: Page, pack: str, name: str) -> None:
    """Load a template of `pack` as a user does."""
    open_templates(page, pack)
    template_card(page, name).click()
    page.locator("[role=dialog]").wait_for(state="hidden")
    page.wait_for_function("window.app.graph._nodes.length > 0")


def press_run(page: Page, patience: float) -> str:
    """Press Run and wait; returns the last event, "execution_success" where all went well."""
    page.evaluate(
        """() => { window.testEnded = null; window.testEnd = new Promise(resolve => {
            for (const name of ["execution_success", "execution_error", "execution_interrupted"])
                window.app.api.addEventListener(name, () => resolve(name));
        }); window.testEnd.then(name => { window.testEnded = name; }); }"""
    )
    page.locator('[data-testid="queue-button"]').click()
    page.wait_for_function("window.testEnded", timeout=patience)
    return page.evaluate("window.testEnded")


def has_nodes_2(page: Page) -> bool:
    """Whether this front end can draw nodes in HTML ("Nodes 2.0"); older ones have the setting, and are unfinished."""
    version = page.evaluate("window.__COMFYUI_FRONTEND_VERSION__")
    return [int(part) for part in version.split(".")[:2]] >= [1, 40]
