"""What a user does in the browser: templates, Run, a playable video, help."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from .browser import open_page, open_template, open_templates, press_run, screenshot, template_card
from .checkout import ROOT
from .place import PACK
from .server import Server
from .workflows import WORKFLOWS, provide_files, read

if TYPE_CHECKING:
    from playwright.sync_api import Page

RUN = 600_000  # milliseconds that the demo weights may take on a slow CPU


@pytest.fixture(scope="module")
def opened(server: Server) -> Iterator[Page]:
    """ComfyUI's page."""
    with open_page(server.url) as page:
        yield page


@pytest.fixture
def page(opened: Page) -> Page:
    """ComfyUI's page with an empty graph and no dialog."""
    for _ in range(opened.locator("[role=dialog]:visible").count()):
        opened.keyboard.press("Escape")
    opened.locator("[role=dialog]").wait_for(state="hidden")
    opened.evaluate("window.app.graph.clear()")
    return opened


def node_of(page: Page, kind: str) -> str:
    """A JavaScript expression for the first node of a type; fails where there is none."""
    expression = f"window.app.graph._nodes.find(node => node.type === '{kind}')"
    assert page.evaluate(f"!!({expression})"), f"no {kind} in the graph"
    return expression


def test_templates_are_listed_with_pictures(page: Page, tmp_path: Path) -> None:
    open_templates(page, PACK)
    for path in WORKFLOWS:
        card = template_card(page, path.stem)
        picture = card.locator("img").first
        picture.wait_for()
        assert (ROOT / "example_workflows" / f"{path.stem}.jpg").is_file()
        page.wait_for_function("element => element.naturalWidth > 0", arg=picture.element_handle())
    screenshot(page, "templates", tmp_path)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_template_opens_with_no_node_missing(page: Page, server: Server, path: Path) -> None:
    """In red are missing nodes, and choices that are not in their list: the files the workflow names are there."""
    provide_files(read(path), server.base)
    page.evaluate("window.app.refreshComboInNodes()")
    open_template(page, PACK, path.stem)
    missing = page.evaluate(
        "window.app.graph._nodes.filter(node => node.has_errors || !(node.type in LiteGraph.registered_node_types))"
        ".map(node => node.type)"
    )
    assert missing == []
    assert not page.get_by_text("Missing Node", exact=False).count()


def test_reconstruct_gives_a_playable_video(page: Page, tmp_path: Path) -> None:
    """The workflow as it is, with the demo weights, by the Run button."""
    open_template(page, PACK, "Reconstruct a video")
    screenshot(page, "reconstruct_graph", tmp_path)
    assert press_run(page, RUN) == "execution_success"
    page.wait_for_function("[...document.querySelectorAll('video')].some(video => video.readyState >= 2)")
    size, seconds = page.evaluate(
        "(() => { const video = [...document.querySelectorAll('video')].find(one => one.readyState >= 2);"
        " return [[video.videoWidth, video.videoHeight], video.duration]; })()"
    )
    assert size == [320, 192]
    assert seconds == pytest.approx(17 / 24, abs=0.05)
    screenshot(page, "reconstruct_result", tmp_path)


def test_help_page_of_a_node(page: Page, tmp_path: Path) -> None:
    open_template(page, PACK, "Reconstruct a video")
    node = node_of(page, "CVIV_DecodeToVideo")
    page.evaluate(f"(() => {{ const node = {node}; window.app.canvas.centerOnNode(node); }})()")
    page.evaluate(f"window.app.canvas.selectNode({node})")
    page.locator('[data-testid="info-button"]').click()
    content = page.locator(".node-help-content")
    content.wait_for()
    page.wait_for_function("document.querySelector('.node-help-content').innerText.includes('memory_budget_gb')")
    assert "Video VAE Decode to Video" in content.inner_text()
    page.wait_for_function(
        "[...document.querySelectorAll('.node-help-content img')].every(one => one.complete && one.naturalWidth > 0)"
    )
    screenshot(page, "help", tmp_path)
