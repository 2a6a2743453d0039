"""The report stays in sight on the node that ran, in every front end, and the plan node shows its picture."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from .browser import has_nodes_2, open_page, press_run, screenshot
from .calls import DECODE, DECODE_TO_VIDEO, ENCODE_VIDEO, LOAD_VAE, SAVE_VIDEO, encode
from .conftest import LoadVAE
from .inprocess import Comfy, Progress
from .server import Server
from .weights import SMALL, picture

if TYPE_CHECKING:
    from playwright.sync_api import Page

RUN = 600_000  # milliseconds
PLAN = {"direction": "decode", "frames": 97, "width": 1024, "height": 576, "memory_budget_gb": 0.05}


def prompt() -> dict[str, Any]:
    """A clip through a small VAE in all the ways that report."""
    nodes = {
        "1": ("CVIV_LoadVideoVAE", {"vae_name": SMALL["cv"], **LOAD_VAE}),
        "2": ("CVIV_DemoClip", {}),
        "3": ("CVIV_EncodeVideo", {"vae": ["1", 0], "video": ["2", 0], **ENCODE_VIDEO, "frame_count": 5}),
        "4": ("CVIV_Decode", {"vae": ["1", 0], "samples": ["3", 0], **DECODE}),
        "5": ("PreviewImage", {"images": ["4", 0]}),
        "6": ("CVIV_DecodeToVideo", {"vae": ["1", 0], "samples": ["3", 0], **DECODE_TO_VIDEO}),
        "7": ("SaveVideo", {"video": ["6", 0], "filename_prefix": "report", **SAVE_VIDEO}),
        "8": ("CVIV_Plan", {"vae": ["1", 0], **PLAN}),
        "9": ("CVIV_VideoVAEInfo", {"vae": ["1", 0]}),
    }
    return {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in nodes.items()}


# ComfyUI in this process goes first: where a page is open, no other event loop can run


def test_a_report_is_also_an_output_of_the_run(comfy: Comfy, load_vae: LoadVAE) -> None:
    _, report = encode(comfy, load_vae(SMALL["cv"]), picture(5, 16, 16))
    assert list(comfy.ui["1"]["text"]) == [report]


def test_a_report_on_a_cpu_says_the_peak_of_ram(comfy: Comfy, load_vae: LoadVAE) -> None:
    most_ram, vae, kept = comfy.pack("nodes.bridge.running").most_ram, load_vae(SMALL["cv"]), []
    before = most_ram()
    assert 1 << 27 < before < 1 << 40  # a process with torch in it

    def take(_report: Progress) -> None:
        if not kept:
            kept.append(torch.ones(before, dtype=torch.uint8))

    comfy.on_progress = take
    _, report = encode(comfy, vae, picture(5, 16, 16))
    assert most_ram() > before
    assert f"peak {most_ram() / 2**30:.2f} GiB of RAM, all that ComfyUI holds included" in report
    kept.clear()
    comfy.on_progress = None
    _, report = encode(comfy, vae, picture(5, 16, 16))
    assert f"ComfyUI took no more RAM than before: its peak stays {most_ram() / 2**30:.2f} GiB" in report


@pytest.fixture(scope="module")
def page(server: Server) -> Iterator[Page]:
    """The graph of `prompt`, after a run."""
    with open_page(server.url) as page:
        page.evaluate("prompt => window.app.loadApiJson(prompt, 'report')", prompt())
        page.wait_for_function("window.app.graph._nodes.length === 9")
        _arrange(page)
        assert press_run(page, RUN) == "execution_success"
        yield page


def _arrange(page: Page) -> None:
    page.evaluate(
        """() => {
            const rows = [["CVIV_LoadVideoVAE", "CVIV_DemoClip"], ["CVIV_EncodeVideo", "CVIV_VideoVAEInfo"],
                ["CVIV_Decode", "CVIV_Plan"], ["CVIV_DecodeToVideo"], ["PreviewImage", "SaveVideo"]];
            rows.forEach((column, x) => column.forEach((type, y) => {
                const node = window.app.graph._nodes.find(node => node.type === type);
                node.setSize([380, node.computeSize()[1]]);
                node.pos = [x * 410, y * 520];
            }));
            window.app.canvas.ds.scale = 0.68;
            window.app.canvas.ds.offset = [60, 90];
            window.app.canvas.setDirty(true, true);
        }"""
    )


def reports(page: Page) -> dict[str, str]:
    """What stands on the nodes, by node type; only boxes that can be seen."""
    return page.evaluate(
        """() => Object.fromEntries(window.app.graph._nodes.map(node => [node.type,
            node.widgets?.find(widget => widget.name === "cviv_report")?.element]).filter(([, box]) =>
            box && box.checkVisibility() && box.clientHeight > 20).map(([type, box]) => [type, box.innerText]))"""
    )


def statuses(page: Page) -> list[str]:
    """Types of the nodes that still show what they said while they ran, which their reports repeat."""
    return page.evaluate(
        """() => window.app.graph._nodes.filter(node => node.widgets?.some(widget =>
            widget.name === "$$node-text-preview")).map(node => node.type)"""
    )


def check(found: dict[str, str]) -> None:
    for type_ in ("CVIV_EncodeVideo", "CVIV_Decode", "CVIV_DecodeToVideo"):
        said = found[type_]
        assert "5 frames in " in said
        assert "cv-vae, float32 on cpu" in said
        assert "Whole frames; 1 chunk" in said
        assert "Result: exact" in said
        assert "RAM to work in: about" in said
        assert "RAM, all that ComfyUI holds included" in said or "no more RAM than before" in said
        assert "Device memory" not in said
    assert "tiles of at most" in found["CVIV_Plan"]
    assert "latent channels" in found["CVIV_VideoVAEInfo"]


def test_reports_stand_on_the_nodes(page: Page, tmp_path: Path) -> None:
    page.wait_for_function("document.querySelectorAll('.cviv-report').length === 5")
    check(reports(page))
    assert statuses(page) == []
    _arrange(page)
    page.wait_for_timeout(500)
    screenshot(page, "report_classic", tmp_path)


def test_the_plan_node_shows_its_tiles(page: Page) -> None:
    page.wait_for_function(
        "window.app.graph._nodes.find(node => node.type === 'CVIV_Plan').imgs?.[0]?.naturalWidth === 960"
    )


def test_reports_are_not_in_the_workflow(page: Page) -> None:
    assert "Result: exact" not in json.dumps(page.evaluate("window.app.graph.serialize()"))
    assert "Result: exact" not in json.dumps(page.evaluate("window.app.graphToPrompt().then(one => one.output)"))


def test_reports_come_back_with_the_workflow(page: Page, tmp_path: Path) -> None:
    """Another workflow in between builds the nodes anew."""
    page.evaluate("window.app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
    page.wait_for_function("window.app.graph._nodes.length === 0")
    page.evaluate("window.app.extensionManager.command.execute('Workspace.PreviousOpenedWorkflow')")
    page.wait_for_function("window.app.graph._nodes.length === 9")
    page.wait_for_function("document.querySelectorAll('.cviv-report').length === 5")
    check(reports(page))


def test_reports_in_nodes_2(page: Page, tmp_path: Path) -> None:
    if not has_nodes_2(page):
        pytest.skip("this front end has no finished Nodes 2.0")
    page.evaluate("window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', true)")
    try:
        page.wait_for_function("document.querySelectorAll('[data-node-id] .cviv-report').length === 5")
        page.wait_for_timeout(1000)
        check(reports(page))
        screenshot(page, "report_nodes_2", tmp_path)
    finally:
        page.evaluate("window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false)")
