"""No node lies over another after a run: reports, previews and players make nodes higher than they were saved."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from .browser import has_nodes_2, open_page, press_run, screenshot
from .checkout import ROOT
from .inprocess import Comfy
from .place import make_base
from .rectangles import collisions, measure, show_all
from .server import Server, serve
from .stand_in import add_stand_in
from .workflows import WORKFLOWS, nodes_of, provide_files, quick, read

if TYPE_CHECKING:
    from playwright.sync_api import Page

RUN = 600_000  # milliseconds
# need a model that no small one stands in for, or videos to train on: measured as they open
NOT_RUN = ("CheckpointLoaderSimple", "CVIV_TrainSVDAdapter")


@pytest.fixture(scope="module")
def server(models: Path, loaded: Comfy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with all files that templates name; `loaded` has written the small weights."""
    base = add_stand_in(make_base(tmp_path_factory.mktemp("layout") / "base", models=models))
    for path in WORKFLOWS:
        provide_files(read(path), base)
    shutil.copy(ROOT / "docs" / "contact_sheet.png", base / "input" / "example.png")
    with serve(base) as running:
        yield running


@pytest.fixture(scope="module", params=["classic", "nodes2"])
def page(server: Server, request: pytest.FixtureRequest) -> Iterator[Page]:
    """ComfyUI's page with the canvas as it always was, or with nodes in HTML."""
    with open_page(server.url) as page:
        if request.param == "nodes2":
            if not has_nodes_2(page):
                pytest.skip("this front end has no finished Nodes 2.0")
            page.evaluate("window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', true)")
        yield page


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_nothing_overlaps_after_a_run(page: Page, path: Path, tmp_path: Path) -> None:
    workflow = quick(read(path))
    page.evaluate("workflow => window.app.loadGraphData(workflow)", workflow)
    page.wait_for_function("count => window.app.graph._nodes.length === count", arg=len(workflow["nodes"]))
    show_all(page)
    if not nodes_of(workflow, *NOT_RUN):
        assert press_run(page, RUN) == "execution_success"
        page.wait_for_timeout(2000)  # players load, nodes grow
    show_all(page)
    screenshot(page, f"layout_{path.stem}", tmp_path)
    assert collisions(measure(page)) == []
