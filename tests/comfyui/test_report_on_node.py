"""The report stays in sight on the node that ran, in every front end, and the plan node shows its picture."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from .browser import has_nodes_2, open_page, press_run, screenshot
from .calls import DECODE, DECODE_TO_VIDEO, ENCODE_PART, LOAD_VAE, SAVE_VIDEO, decode, encode
from .conftest import LoadVAE
from .inprocess import Comfy, Progress, records
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
        "3": ("CVIV_Encode", {"vae": ["1", 0], "images": ["2", 0], **ENCODE_PART, "frame_count": 5}),
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
    assert report.splitlines()[0].endswith(f"peak {most_ram() / 2**30:.1f} GiB RAM")
    kept.clear()
    comfy.on_progress = None
    _, report = encode(comfy, vae, picture(5, 16, 16))
    assert "peak" not in report  # that of an earlier run is no news


def test_a_report_has_one_line_and_no_noise(comfy: Comfy, load_vae: LoadVAE) -> None:
    latent, report = encode(comfy, load_vae(SMALL["cv"]), picture(1, 16, 24))
    head, *details = report.splitlines()
    assert re.fullmatch(r"1 frame 24x16, \d+\.\d s, \d+\.\d fps, exact(, peak \d+\.\d GiB RAM)?", head)
    assert details[0] == "cv-vae, float32 on cpu"
    with records() as log:
        *_, report = decode(comfy, load_vae(SMALL["cv"]), latent)
    lines = report.splitlines()
    assert len(lines) == len(set(lines))
    assert " 0 MiB" not in report
    assert "1 frames" not in report
    said = [record.getMessage() for record in log if record.name == "cviv-vae"]
    assert said == [lines[0]]


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
            const rows = [["CVIV_LoadVideoVAE", "CVIV_DemoClip"], ["CVIV_Encode", "CVIV_VideoVAEInfo"],
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
            box && box.checkVisibility() && box.clientHeight > 20).map(([type, box]) => [type,
            [...box.querySelectorAll(".cviv-report-line, .cviv-report-details")].filter(one => one.checkVisibility())
            .map(one => one.innerText).join("\\n")]))"""
    )


def fold(page: Page, kind: str) -> None:
    """Click on the line of a report."""
    page.evaluate(
        """kind => window.app.graph._nodes.find(node => node.type === kind).widgets
            .find(widget => widget.name === "cviv_report").element.querySelector(".cviv-report-head").click()""",
        kind,
    )
    page.wait_for_timeout(300)


def boxes(page: Page) -> dict[str, list[float]]:
    """[height of the node, height of the report's box, height that its text needs] by node type."""
    return page.evaluate(
        """() => Object.fromEntries(window.app.graph._nodes.map(node => [node, node.widgets?.find(widget =>
            widget.name === "cviv_report")?.element]).filter(([, box]) => box).map(([node, box]) =>
            [node.type, [node.size[1], box.clientHeight, box.scrollHeight]]))"""
    )


def statuses(page: Page) -> list[str]:
    """Types of the nodes that still show what they said while they ran, which their reports repeat."""
    return page.evaluate(
        """() => window.app.graph._nodes.filter(node => node.widgets?.some(widget =>
            widget.name === "$$node-text-preview")).map(node => node.type)"""
    )


def check_folded(found: dict[str, str]) -> None:
    for kind in ("CVIV_Encode", "CVIV_Decode", "CVIV_DecodeToVideo"):
        assert found[kind].startswith("5 frames 320x192, ")
        assert ", exact" in found[kind]
        assert "\n" not in found[kind]
    assert found["CVIV_Plan"] == "decode 97 frames 1024x576: exact"
    assert found["CVIV_LoadVideoVAE"] == "cv-vae, 4 channels, float32 on cpu"
    assert "latent channels" in found["CVIV_VideoVAEInfo"]


def check_all_seen(page: Page) -> None:
    """No text is cut off at the bottom of a box that does not scroll."""
    for kind, (_, height, needed) in boxes(page).items():
        assert height >= needed - 1, kind


def test_reports_stand_on_the_nodes(page: Page, tmp_path: Path) -> None:
    page.wait_for_function("document.querySelectorAll('.cviv-report').length === 6")
    page.wait_for_timeout(500)
    check_folded(reports(page))
    check_all_seen(page)
    assert statuses(page) == []
    _arrange(page)
    page.wait_for_timeout(500)
    screenshot(page, "report_classic", tmp_path)


def test_a_click_shows_the_rest(page: Page) -> None:
    for kind, more in (("CVIV_Encode", "latent of shape (2, 4, 24, 40)"), ("CVIV_Plan", "RAM to work in")):
        before = boxes(page)[kind]
        fold(page, kind)
        said = reports(page)[kind]
        assert "\n" in said
        assert more in said
        assert "device memory" not in said.lower()
        after = boxes(page)[kind]
        assert after[0] > before[0]
        assert after[1] > before[1]
        check_all_seen(page)
        fold(page, kind)
        assert boxes(page)[kind] == before
        assert "\n" not in reports(page)[kind]


def test_the_plan_node_shows_its_tiles(page: Page) -> None:
    page.wait_for_function(
        "window.app.graph._nodes.find(node => node.type === 'CVIV_Plan').imgs?.[0]?.naturalWidth === 960"
    )


def test_reports_are_not_in_the_workflow(page: Page) -> None:
    assert "320x192, " not in json.dumps(page.evaluate("window.app.graph.serialize()"))
    assert "320x192, " not in json.dumps(page.evaluate("window.app.graphToPrompt().then(one => one.output)"))


def test_reports_come_back_with_the_workflow(page: Page) -> None:
    """Another workflow in between builds the nodes anew."""
    page.evaluate("window.app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
    page.wait_for_function("window.app.graph._nodes.length === 0")
    page.evaluate("window.app.extensionManager.command.execute('Workspace.PreviousOpenedWorkflow')")
    page.wait_for_function("window.app.graph._nodes.length === 9")
    page.wait_for_function("document.querySelectorAll('.cviv-report').length === 6")
    page.wait_for_timeout(500)
    check_folded(reports(page))


def test_reports_come_back_when_the_page_is_loaded_again(page: Page) -> None:
    page.reload()
    page.wait_for_function("window.app?.graph?._nodes.length === 9")
    page.wait_for_function("document.querySelectorAll('.cviv-report').length === 6")
    page.wait_for_timeout(500)
    check_folded(reports(page))
    check_all_seen(page)
    page.reload()  # what came back is still there for the next time
    page.wait_for_function("document.querySelectorAll('.cviv-report').length === 6")
    # a workflow that was opened and not run has nothing to show: no empty boxes
    page.evaluate("window.app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
    page.wait_for_function("window.app.graph._nodes.length === 0")
    page.evaluate("prompt => window.app.loadApiJson(prompt, 'fresh')", prompt())
    page.wait_for_function("window.app.graph._nodes.length === 9")
    page.wait_for_timeout(500)
    assert page.locator(".cviv-report").count() == 0
    page.evaluate("window.app.extensionManager.command.execute('Workspace.PreviousOpenedWorkflow')")


def test_reports_in_nodes_2(page: Page, tmp_path: Path) -> None:
    if not has_nodes_2(page):
        pytest.skip("this front end has no finished Nodes 2.0")
    page.evaluate("window.app.graph.clear()")
    page.evaluate("window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', true)")
    try:
        page.evaluate("prompt => window.app.loadApiJson(prompt, 'report')", prompt())
        page.wait_for_function("window.app.graph._nodes.length === 9")
        assert press_run(page, RUN) == "execution_success"
        page.wait_for_function("document.querySelectorAll('[data-node-id] .cviv-report').length >= 4")
        page.wait_for_timeout(1000)
        check_all_seen(page)
        kind = "CVIV_VideoVAEInfo"
        assert "latent channels" in reports(page)[kind]
        fold(page, kind)
        assert "latent channels" not in reports(page)[kind]
        check_all_seen(page)
        screenshot(page, "report_nodes_2", tmp_path)
    finally:
        page.evaluate("window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false)")


def test_nothing_is_left_to_say_after_a_cancel(page: Page) -> None:
    """The last status of a run that was cancelled goes with it."""
    slow = prompt()
    slow["3"]["inputs"] |= {"frame_count": 49, "sample_seed": 7, "mode": "sample"}
    page.evaluate("prompt => window.app.loadApiJson(prompt, 'cancelled')", slow)
    page.wait_for_function("window.app.graph._nodes.length === 9")
    page.evaluate(
        """() => {
            window.cancelled = new Promise(done => window.app.api.addEventListener("execution_interrupted", done));
            window.app.api.addEventListener("progress_text", () => window.app.api.interrupt()); }"""
    )
    page.locator('[data-testid="queue-button"]').click()
    page.evaluate("window.cancelled.then(() => true)")
    page.wait_for_timeout(500)
    assert statuses(page) == []
