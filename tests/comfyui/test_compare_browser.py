"""The wipe player as a user meets it: drag, play, step, zoom, difference; classic canvas and Nodes 2.0; both themes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from .browser import open_page, press_run
from .server import Server

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

RUN = 120_000  # milliseconds
FRAMES = 49  # of the bundled clip
ASIDE = 1300, 600  # on the page, where nothing is


def node(number: int, kind: str, at: tuple[int, int], size: tuple[int, int], widgets: list[Any]) -> dict[str, Any]:
    return {
        "id": number, "type": kind, "pos": list(at), "size": list(size), "flags": {}, "order": number, "mode": 0,
        "inputs": [], "outputs": [], "properties": {"Node name for S&R": kind}, "widgets_values": widgets,
    }  # fmt: skip


def workflow() -> dict[str, Any]:
    """The bundled clip against itself, blurred: a VIDEO against an IMAGE."""
    clip = node(1, "CVIV_DemoClip", (20, 60), (200, 40), [])
    parts = node(2, "GetVideoComponents", (20, 180), (200, 80), [])
    blur = node(3, "ImageBlur", (20, 340), (220, 90), [3, 1.5])
    compare = node(
        4, "CVIV_Compare", (320, 60), (560, 260), ["original", "blurred", "must match", 0.0, 768, 240]
    )  # fmt: skip
    links = [
        [1, 1, 0, 2, 0, "VIDEO"], [2, 2, 0, 3, 0, "IMAGE"], [3, 1, 0, 4, 0, "VIDEO"], [4, 3, 0, 4, 1, "IMAGE"],
    ]  # fmt: skip
    clip["outputs"] = [{"name": "video", "type": "VIDEO", "links": [1, 3]}]
    parts["inputs"] = [{"name": "video", "type": "VIDEO", "link": 1}]
    parts["outputs"] = [{"name": "images", "type": "IMAGE", "links": [2]}]
    blur["inputs"] = [{"name": "image", "type": "IMAGE", "link": 2}]
    blur["outputs"] = [{"name": "IMAGE", "type": "IMAGE", "links": [4]}]
    compare["inputs"] = [
        {"name": "video_a", "type": "IMAGE,VIDEO", "link": 3}, {"name": "video_b", "type": "IMAGE,VIDEO", "link": 4},
    ]  # fmt: skip
    return {
        "id": "00000000-0000-4000-8000-000000000001", "revision": 0, "last_node_id": 4, "last_link_id": 4,
        "nodes": [clip, parts, blur, compare], "links": links, "groups": [], "config": {}, "extra": {}, "version": 0.4,
    }  # fmt: skip


@pytest.fixture(scope="module")
def opened(server: Server) -> Iterator[Page]:
    """ComfyUI's page."""
    with open_page(server.url) as page:
        yield page


@pytest.fixture(scope="module", params=["classic", "nodes2"])
def mode(opened: Page, request: pytest.FixtureRequest) -> Iterator[str]:
    """The canvas as it always was, or the nodes drawn as HTML that newer front ends offer."""
    version = opened.evaluate("window.__COMFYUI_FRONTEND_VERSION__")
    if request.param == "nodes2" and tuple(map(int, version.split(".")[:2])) < (1, 37):
        pytest.skip(f"front end {version} has no finished Nodes 2.0")
    setting(opened, "Comfy.VueNodes.Enabled", request.param == "nodes2")
    yield request.param
    setting(opened, "Comfy.VueNodes.Enabled", False)


@pytest.fixture(scope="module")
def page(opened: Page, mode: str) -> Page:
    """The page with the graph, run once."""
    opened.evaluate("workflow => window.app.loadGraphData(workflow)", workflow())
    opened.wait_for_function("window.app.graph._nodes.length === 4")
    assert press_run(opened, RUN) == "execution_success"
    opened.locator(".cviv-wipe").wait_for()
    view(opened)
    return opened


@pytest.fixture
def player(page: Page) -> Locator:
    """The player at its first frame, as it comes."""
    player = page.locator(".cviv-wipe")
    player.locator(".cviv-wipe-message").wait_for(state="hidden")
    player.locator(".fit").click()
    for name, wanted in (("difference", "false"), ("loop", "true")):
        if player.locator(f".{name}").get_attribute("aria-pressed") != wanted:
            player.locator(f".{name}").click()
    player.focus()
    player.press("Home")
    wait_for_frame(page, 0)
    return player


def setting(page: Page, name: str, value: object) -> None:
    page.evaluate("([name, value]) => window.app.extensionManager.setting.set(name, value)", [name, value])


def view(page: Page) -> None:
    """Put the graph where the whole node is seen, a little smaller than life."""
    page.evaluate(
        "(() => { const { canvas } = window.app; canvas.ds.scale = 0.9; canvas.ds.offset = [60, 20];"
        " canvas.setDirty(true, true); })()"
    )
    page.wait_for_timeout(500)  # the front end moves its elements after the canvas


def wait_for_frame(page: Page, frame: int) -> None:
    page.wait_for_function("frame => document.querySelector('.cviv-wipe-time').ariaValueNow == frame", arg=frame)


def frame_of(player: Locator) -> int:
    return int(player.locator(".cviv-wipe-time").get_attribute("aria-valuenow") or -1)


def divider_of(player: Locator) -> int:
    """Percent."""
    return int(player.locator(".cviv-wipe-divider").get_attribute("aria-valuenow") or -1)


def zoom_of(player: Locator) -> int:
    """Percent."""
    return int((player.locator(".fit").text_content() or "").removesuffix("%"))


def graph_state(page: Page) -> list[Any]:
    """Place of the node and of the view: what the mouse must not move while it is in the player."""
    return page.evaluate(
        "(() => { const { canvas, graph } = window.app; const node = graph._nodes.find(n => n.type === 'CVIV_Compare');"
        " return [[...node.pos], canvas.ds.scale, [...canvas.ds.offset]]; })()"
    )


def pixels_of(player: Locator, part: str = "whole") -> list[float]:
    """Mean red, green and blue of what is drawn, of the whole or of a half."""
    drawn(player.page)
    return player.locator(".cviv-wipe-stage canvas").evaluate(
        """(canvas, part) => {
            const half = Math.floor(canvas.width / 2);
            const [left, width] = { whole: [0, canvas.width], left: [0, half], right: [half, half] }[part];
            const { data } = canvas.getContext("2d").getImageData(left, 0, width, canvas.height);
            const sums = [0, 0, 0];
            for (let i = 0; i < data.length; i++) if (i % 4 < 3) sums[i % 4] += data[i] ** 2;
            return sums.map(sum => sum / (data.length / 4));
        }""",
        part,
    )


def drawn(page: Page) -> None:
    """Wait until what was asked for is drawn: with the next frame of the page."""
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def point(place: Locator, across: float, down: float) -> tuple[float, float]:
    """Where a part of an element is on the page."""
    box = place.bounding_box()
    assert box is not None
    return box["x"] + across * box["width"], box["y"] + down * box["height"]


def drag(page: Page, start: tuple[float, float], end: tuple[float, float]) -> None:
    page.mouse.move(*start)
    page.mouse.down()
    page.mouse.move((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
    page.mouse.move(*end)
    page.mouse.up()


def shoot(page: Page, name: str, fallback: Path) -> None:
    """The nodes, as NAME.png in CVIV_SCREENSHOTS or else in `fallback`."""
    folder = Path(os.environ.get("CVIV_SCREENSHOTS") or fallback)
    folder.mkdir(parents=True, exist_ok=True)
    drawn(page)
    page.screenshot(path=folder / f"{name}.png", clip={"x": 60, "y": 40, "width": 800, "height": 780})


def test_both_themes(page: Page, player: Locator, mode: str, tmp_path: Path) -> None:
    colours = {}
    for palette in ("light", "dark"):
        setting(page, "Comfy.ColorPalette", palette)
        page.wait_for_timeout(500)
        page.mouse.move(*point(player.locator(".cviv-wipe-stage"), 0.7, 0.4))
        shoot(page, f"wipe_player_{mode}_{palette}", tmp_path)
        colours[palette] = player.evaluate(
            "one => [getComputedStyle(one).color, getComputedStyle(one).backgroundColor]"
        )
    assert colours["light"][0] != colours["dark"][0]
    assert colours["light"][1] != colours["dark"][1]
    assert player.locator(".cviv-wipe-label").all_text_contents() == ["original", "blurred"]
    said = player.locator(".frame").text_content() or ""
    assert re.fullmatch(r"frame 0 of 48 · PSNR 27\.\d\d dB · SSIM 0\.\d{4}", said)


def test_the_divider_follows_the_mouse(page: Page, player: Locator) -> None:
    before = graph_state(page)
    stage, handle = player.locator(".cviv-wipe-stage"), player.locator(".cviv-wipe-divider")
    drag(page, point(handle, 0.5, 0.3), point(stage, 0.2, 0.6))
    assert divider_of(player) == pytest.approx(20, abs=2)
    drag(page, point(stage, 0.6, 0.3), point(stage, 0.8, 0.3))  # beside it: it comes to the pointer
    assert divider_of(player) == pytest.approx(80, abs=2)
    assert graph_state(page) == before
    handle.focus()
    handle.press("End")
    original = pixels_of(player, "left"), pixels_of(player, "right")
    handle.press("Home")
    assert divider_of(player) == 0
    blurred = pixels_of(player, "left"), pixels_of(player, "right")
    assert original != blurred
    drag(page, point(stage, 0.1, 0.5), point(stage, 0.5, 0.5))
    page.mouse.move(*ASIDE)
    assert pixels_of(player, "left") == pytest.approx(original[0], rel=2e-3)
    assert pixels_of(player, "right") == pytest.approx(blurred[1], rel=2e-3)
    handle.press("ArrowRight")
    assert divider_of(player) == pytest.approx(52, abs=1)
    assert frame_of(player) == 0


def test_the_divider_follows_a_finger(page: Page, player: Locator) -> None:
    before = graph_state(page)
    touch = page.context.new_cdp_session(page)
    stage = player.locator(".cviv-wipe-stage")
    for kind, across in (("touchStart", 0.5), ("touchMove", 0.4), ("touchMove", 0.3), ("touchEnd", None)):
        at = [] if across is None else [dict(zip("xy", point(stage, across, 0.3), strict=True))]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": at})
    assert divider_of(player) == pytest.approx(30, abs=2)
    assert graph_state(page) == before


def test_single_steps(page: Page, player: Locator) -> None:
    first = pixels_of(player)
    player.locator(".forward").click()
    wait_for_frame(page, 1)
    assert pixels_of(player) != first
    player.press("ArrowRight")
    wait_for_frame(page, 2)
    player.locator(".back").click()
    wait_for_frame(page, 1)
    player.press("ArrowLeft")
    wait_for_frame(page, 0)
    player.press("ArrowLeft")  # round the end
    wait_for_frame(page, FRAMES - 1)
    player.press("l")
    player.press("ArrowRight")
    drawn(page)
    assert frame_of(player) == FRAMES - 1
    page.mouse.click(*point(player.locator(".cviv-wipe-time"), 0.5, 0.5))
    wait_for_frame(page, FRAMES // 2)


def test_play_and_loop(page: Page, player: Locator) -> None:
    player.press(" ")
    page.wait_for_function("document.querySelector('.cviv-wipe-time').ariaValueNow > 3")
    assert "Pause" in (player.locator(".play").get_attribute("aria-label") or "")
    player.press(" ")
    drawn(page)
    here = frame_of(player)
    page.wait_for_timeout(400)
    assert frame_of(player) == here
    player.press("End")
    player.press("ArrowLeft")
    wait_for_frame(page, FRAMES - 2)
    player.locator(".play").click()
    page.wait_for_function(f"document.querySelector('.cviv-wipe-time').ariaValueNow < {FRAMES // 2}")
    player.press("l")
    page.wait_for_function("document.querySelector('.cviv-wipe .play').ariaLabel.startsWith('Play')")
    assert frame_of(player) == FRAMES - 1


def test_zoom_and_pan(page: Page, player: Locator, mode: str, tmp_path: Path) -> None:
    before = graph_state(page)
    stage = player.locator(".cviv-wipe-stage")
    page.mouse.move(*point(stage, 0.4, 0.45))
    page.mouse.wheel(0, -700)
    page.wait_for_function("parseInt(document.querySelector('.cviv-wipe .fit').textContent) > 150")
    whole = pixels_of(player)
    drag(page, point(stage, 0.7, 0.7), point(stage, 0.5, 0.5))
    moved = pixels_of(player)
    assert moved != whole
    assert graph_state(page) == before
    shoot(page, f"wipe_player_{mode}_zoomed", tmp_path)
    player.press("+")
    assert zoom_of(player) > 200
    player.press("0")
    assert zoom_of(player) == 100


def test_difference(page: Page, player: Locator, mode: str, tmp_path: Path) -> None:
    page.mouse.move(*ASIDE)
    picture = pixels_of(player)
    player.press("d")
    weak = pixels_of(player)
    assert sum(weak) < sum(picture)
    player.locator(".gain").select_option("16")
    assert sum(pixels_of(player)) > sum(weak)
    assert not player.locator(".cviv-wipe-divider").is_visible()
    shoot(page, f"wipe_player_{mode}_difference", tmp_path)
    player.locator(".gain").select_option("4")


def test_figure_under_the_cursor(page: Page, player: Locator) -> None:
    stage, said = player.locator(".cviv-wipe-stage"), player.locator(".cursor")
    figures = []
    for across, down, size in ((0.5, 0.6, "33 x 33"), (0.5, 0.02, "33 x (1[7-9]|2[0-9]) ")):
        page.mouse.move(*point(stage, across, down))
        page.wait_for_function(
            "size => new RegExp(size).test(document.querySelector('.cviv-wipe .cursor').textContent)", arg=size
        )
        figures.append(float((said.text_content() or "").split(": ")[1].removesuffix(" dB")))
    assert all(15 < value < 60 for value in figures)
    assert figures[0] != figures[1]
    page.mouse.move(*ASIDE)
    page.wait_for_function("document.querySelector('.cviv-wipe .cursor').textContent === ''")


def test_nothing_of_it_is_saved(page: Page, player: Locator) -> None:
    del player
    saved = page.evaluate("window.app.graph.serialize().nodes.find(n => n.type === 'CVIV_Compare').widgets_values")
    assert saved[:6] == ["original", "blurred", "must match", 0.0, 768, 240]
    assert all("frames per second" in one for one in saved[6:])  # older front ends save the status line that they show


def test_a_second_run_and_another_workflow_in_between(page: Page, player: Locator, mode: str) -> None:
    """The cached result comes back to the same player; and after another workflow was open, to a new one."""
    player.press("ArrowRight")
    wait_for_frame(page, 1)
    assert press_run(page, RUN) == "execution_success"
    assert page.locator(".cviv-wipe").count() == 1
    assert frame_of(player) == 1
    if mode == "classic":  # the same code; one switch of tabs is enough
        name = page.evaluate("window.app.extensionManager.workflow.activeWorkflow.path")
        page.evaluate("window.app.loadGraphData()")
        page.wait_for_function("!document.querySelector('.cviv-wipe')")
        page.evaluate(
            "path => { const store = window.app.extensionManager.workflow;"
            " return window.app.loadGraphData(store.getWorkflowByPath(path).activeState, true, true,"
            " store.getWorkflowByPath(path)); }",
            name,
        )
        page.locator(".cviv-wipe").wait_for()
        view(page)


def test_a_removed_node_lets_its_pictures_go(page: Page, player: Locator) -> None:
    del player
    page.evaluate(
        "(() => { window.kept = document.querySelector('.cviv-wipe-stage canvas');"
        " const { graph } = window.app; graph.remove(graph._nodes.find(n => n.type === 'CVIV_Compare')); })()"
    )
    page.wait_for_function("window.kept.width === 0 && !document.querySelector('.cviv-wipe')")
