"""Makes every picture of README, help pages and templates anew, in a real browser on a real ComfyUI.

    COMFYUI_PATH=./ComfyUI python docs/make_pictures.py                 # all of them
    COMFYUI_PATH=./ComfyUI python docs/make_pictures.py nodes graphs    # some: graphs, nodes, player, pages, icon
    CVIV_FRAMES=5 ...                                                   # no clip of more frames, on a slow machine

Run it by the Python that has ComfyUI's requirements and tests/comfyui/requirements.txt, on a version with Nodes 2.0.
Demo weights and bundled clip make what is seen; nodes of SVD get small random models, and nothing that these sample is
shown. Each part starts from nothing, and pictures that are no longer made are removed.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from picture_shapes import cover, icon, on_square, shrunk
from picture_subjects import AS_THEY_COME, GRAPHS, OF_TEMPLATES, OWN, SUBJECTS
from PIL import Image

if TYPE_CHECKING:
    from playwright.sync_api import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS, HELP, TEMPLATES = ROOT / "docs", ROOT / "web" / "docs" / "pictures", ROOT / "example_workflows"
SHOWN = {"width": 1900, "height": 1300}  # of the page
THUMBNAIL = 400  # pixels
STEPS = 34  # pictures of the loop
CORNER = 80, 100  # of what is taken, in pixels of the page: tabs and side bar are left of it and above
MARGIN = 18  # pixels of the graph around what is shown
HIDDEN = """.side-tool-bar-container, .side-tool-bar-container *, .comfyui-body-top, .comfyui-body-left,
  .actionbar-container, .workflow-tabs-container, .graph-canvas-menu, .p-toast, .p-buttongroup, .litegraph-fps,
  .subgraph-breadcrumb, .p-splitter-gutter, .side-bar-panel, .actionbar, .p-panel { visibility: hidden !important; }"""


def fewer(kind: str, inputs: dict[str, Any] | list[Any]) -> None:
    """Bound the frames of a node, whose values have names or places, by CVIV_FRAMES."""
    most = int(os.environ.get("CVIV_FRAMES") or 0)
    name, place = {"CVIV_Encode": ("frame_count", 5), "ImageFromBatch": ("length", 1)}.get(kind, ("frame_count", None))
    key: Any = name if isinstance(inputs, dict) else place
    if most and key is not None and (not isinstance(inputs, dict) or key in inputs):
        inputs[key] = min(inputs[key] or most, most)


def tests(name: str) -> Any:
    """A module of tests/comfyui, which knows how to start a server and a browser."""
    if "cviv_tests" not in sys.modules:
        spec = importlib.machinery.ModuleSpec("cviv_tests", None, is_package=True)
        spec.submodule_search_locations = [str(ROOT / "tests")]
        sys.modules["cviv_tests"] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"cviv_tests.comfyui.{name}")


@dataclass
class Studio:
    """A page of a running ComfyUI, and where what it shows is written."""

    page: Page

    def open(self, workflow: dict[str, Any]) -> None:
        """Open a workflow and show all of it."""
        for node in workflow["nodes"]:
            fewer(node["type"], node.get("widgets_values", []))
        self.page.evaluate("workflow => window.app.loadGraphData(workflow)", workflow)
        self.page.wait_for_function("count => window.app.graph._nodes.length === count", arg=len(workflow["nodes"]))
        self.page.wait_for_timeout(1000)

    def open_prompt(self, nodes: dict[str, tuple[str, dict[str, Any]]]) -> None:
        """Open nodes in the form of a prompt, each in a place of its own."""
        prompt = {name: {"class_type": kind, "inputs": {**inputs}} for name, (kind, inputs) in nodes.items()}
        for node in prompt.values():
            fewer(node["class_type"], node["inputs"])
        numbers = {name: str(number) for number, name in enumerate(prompt, 1)}
        links = {
            numbers[name]: {
                "class_type": node["class_type"],
                "inputs": {
                    key: [numbers[value[0]], value[1]] if isinstance(value, list) else value
                    for key, value in node["inputs"].items()
                },
            }
            for name, node in prompt.items()
        }
        self.page.evaluate("window.app.clean()")  # what nodes of the same number gave in the graph before
        self.page.evaluate("prompt => window.app.loadApiJson(prompt, 'pictures')", links)
        self.page.evaluate(
            "window.app.graph._nodes.forEach((node, index) => {"
            " node.pos = [(index % 6) * 900, Math.floor(index / 6) * 1400]; })"
        )
        self.page.wait_for_timeout(1000)

    def run(self, only: list[int] | None = None) -> None:
        """Run the graph, or what the output nodes `only` need."""
        ended = self.page.evaluate(
            """ids => { const { app } = window, end = new Promise(resolve => {
                for (const name of ["execution_success", "execution_error", "execution_interrupted"])
                    app.api.addEventListener(name, () => resolve(name), { once: true }); });
                app.queuePrompt(0, 1, ...(ids ? [ids.map(String)] : [])); return end; }""",
            only,
        )
        if ended != "execution_success":
            raise RuntimeError(f"The run ended with {ended}.")
        self.page.wait_for_timeout(2500)  # players load, nodes grow
        self.page.get_by_text("Job completed").wait_for(state="hidden")

    def find(self, *kinds: str) -> list[int]:
        """Ids of the nodes of these types."""
        return self.page.evaluate(
            "kinds => window.app.graph._nodes.filter(node => kinds.includes(node.type)).map(node => Number(node.id))",
            list(kinds),
        )

    def shoot(self, ids: list[int] | None = None, scale: float | None = None) -> Image.Image:
        """The nodes `ids`, or all with their groups, at `scale`, or as large as the page has room for."""
        self._frame(ids, scale)
        self.page.wait_for_timeout(900)  # only what is in sight is drawn, and grows with its pictures
        width, height = self._frame(ids, scale)
        self.page.mouse.move(SHOWN["width"] - 2, SHOWN["height"] - 2)
        self.page.wait_for_timeout(900)  # the front end moves its elements after the canvas
        return _picture(self.page.screenshot(clip={"x": CORNER[0], "y": CORNER[1], "width": width, "height": height}))

    def _frame(self, ids: list[int] | None, scale: float | None) -> tuple[float, float]:
        """Move the graph so that the nodes begin at CORNER; their width and height in pixels of the page."""
        found = [one for one in tests("rectangles").measure(self.page) if ids is None or one.id in ids]
        left, top = min(one.left for one in found) - MARGIN, min(one.top for one in found) - MARGIN
        width = max(one.left + one.width for one in found) + MARGIN - left
        height = max(one.top + one.height for one in found) + MARGIN - top
        scale = min(scale or 1, (SHOWN["width"] - CORNER[0]) / width, (SHOWN["height"] - CORNER[1]) / height)
        self.page.evaluate(
            "([scale, left, top, [x, y]]) => { const { canvas } = window.app,"
            " at = canvas.canvas.getBoundingClientRect();"
            " canvas.deselectAll?.(); canvas.ds.scale = scale;"
            " canvas.ds.offset = [(x - at.left) / scale - left, (y - at.top) / scale - top];"
            " canvas.setDirty(true, true); }",
            [scale, left, top, CORNER],
        )
        return width * scale, height * scale


def _picture(png: bytes) -> Image.Image:
    return Image.open(BytesIO(png)).convert("RGB")


@contextmanager
def studio(*, nodes_2: bool = False, theme: str = "dark") -> Iterator[tuple[Studio, Any]]:
    """A server with the pack and all files that templates name, and its page: (the page, the server)."""
    place, browser, workflows = tests("place"), tests("browser"), tests("workflows")
    with tempfile.TemporaryDirectory() as folder:
        base = tests("stand_in").add_stand_in(place.make_base(Path(folder) / "base"))
        for path in workflows.WORKFLOWS:
            _provide(workflows.read(path), base)
        (base / "models" / "loras").mkdir(exist_ok=True)
        (base / "models" / "loras" / "svd_cv_vae.safetensors").touch()
        settings = base / "user" / "default" / "comfy.settings.json"
        told = {
            **json.loads(settings.read_text(encoding="utf-8")),
            "Comfy.VueNodes.Enabled": nodes_2,
            "Comfy.ColorPalette": theme,
            "Comfy.Sidebar.Size": "small",
            "Comfy.NodeBadge.NodeSourceBadgeMode": "None",
            "Comfy.Canvas.BackgroundImage": "",
        }
        settings.write_text(json.dumps(told), encoding="utf-8")
        with tests("server").serve(base) as server, browser.open_page(server.url) as page:
            page.set_viewport_size(SHOWN)
            page.wait_for_timeout(1000)
            yield Studio(page), server


def _provide(workflow: dict[str, Any], base: Path) -> None:
    """Files under the names of a workflow, so that nothing is marked as missing; what is not run may be empty."""
    workflows = tests("workflows")
    for node in workflow["nodes"]:
        folder = {**workflows.THIRD_PARTY, "CVIV_LoadVideoVAE": "models/vae"}.get(node["type"])
        name = node["widgets_values"][0] if node.get("widgets_values") else None
        if folder and not str(name).startswith("demo-"):
            (base / folder).mkdir(parents=True, exist_ok=True)
            (base / folder / name).touch()
        if node["type"] == "LoadImage":
            shutil.copy(_start_image(), base / "input" / name)


def _start_image() -> Path:
    """The first frame of the bundled clip."""
    path = Path(tempfile.gettempdir()) / "cviv_start_image.png"
    if not path.exists():
        import av

        with av.open(str(ROOT / "vae_core" / "demo" / "demo_clip.mp4")) as file:
            next(file.decode(video=0)).to_image().save(path)
    return path


def _read(name: str) -> dict[str, Any]:
    return json.loads((TEMPLATES / f"{name}.json").read_text(encoding="utf-8"))


def _plain(page: Page) -> None:
    """Hide all but the graph."""
    page.add_style_tag(content=HIDDEN)


def make_graphs() -> None:
    """The graphs in README, a thumbnail of every template, and the nodes that are in them."""
    with studio() as (shown, server):
        _plain(shown.page)
        for path in TEMPLATES.glob("*.jpg"):
            if not path.with_suffix(".json").exists():
                path.unlink()
        for path in sorted(TEMPLATES.glob("*.json"), key=lambda path: "demo-" in path.read_text(encoding="utf-8")):
            shown.open(_read(path.stem))
            name, run = GRAPHS.get(path.stem, (None, "demo-" in path.read_text(encoding="utf-8")))
            kinds = [kind for kind, template in OF_TEMPLATES.items() if template == path.stem]
            if run:
                shown.run()
            elif "CVIV_SVDLongVideo" in kinds:
                shown.run(shown.find("PreviewImage"))  # windows and their picture, no sampling
            for kind in kinds:
                _save_node(shown, kind)
            if name:
                _save(shrunk(shown.shoot(), 1500), DOCS / f"{name}.png")
            _save(_result(server.base) if run else _subject(shown), TEMPLATES / f"{path.stem}.jpg")
    with studio(nodes_2=True) as (shown, _):
        _plain(shown.page)
        shown.open(_read("SVD 193 frames by windows"))
        shown.run(shown.find("PreviewImage"))
        kinds = ("ImageOnlyCheckpointLoader", "LoadImage", "CVIV_SVDConditioning", "CVIV_SVDLongVideo", "PreviewImage")
        _save(shrunk(shown.shoot(shown.find(*kinds)), 1500), DOCS / "graph_svd_long.png")


def _result(base: Path) -> Image.Image:
    """Four frames of the newest video, each cut to a square."""
    import av

    newest = max((base / "output" / "video").glob("*.mp4"), key=lambda path: path.stat().st_mtime_ns)
    with av.open(str(newest)) as file:
        frames = [frame.to_image() for frame in file.decode(video=0)]
    square = Image.new("RGB", (THUMBNAIL, THUMBNAIL), "white")
    half = THUMBNAIL // 2
    for number in range(4):
        frame = frames[number * (len(frames) - 1) // 3]
        square.paste(cover(frame, half - 2), (number % 2 * (half + 2), number // 2 * (half + 2)))
    return square


def _subject(shown: Studio) -> Image.Image:
    """The node that a template is about."""
    for kind in SUBJECTS:
        if found := shown.find(kind):
            return on_square(shown.shoot(found[:1], scale=1.3), THUMBNAIL)
    raise RuntimeError("No node of SUBJECTS is in the template: add the one that it is about.")


def make_nodes() -> None:
    """Nodes that are in no template."""
    with studio() as (shown, server):
        _plain(shown.page)
        shown.open_prompt(OWN)
        shown.run()
        ours = {kind for kind, _ in OWN.values() if kind.startswith("CVIV_")}
        for kind in sorted(ours - {*OF_TEMPLATES, "CVIV_Compare"}):  # that comes with the player
            _save_node(shown, kind)
        latents = server.base / "output" / "latents"
        latents.mkdir(exist_ok=True)
        (latents / "long_00001_.latent.safetensors").touch()
        shown.page.evaluate("window.app.refreshComboInNodes()")
        for kind, inputs in AS_THEY_COME.items():
            shown.open_prompt({"node": (kind, inputs)})
            _save_node(shown, kind)
    made = {*OF_TEMPLATES, *AS_THEY_COME, *(kind for kind, _ in OWN.values())}
    for path in HELP.glob("*.jpg"):
        if path.stem not in made:
            path.unlink()


def _save_node(shown: Studio, kind: str) -> None:
    _save(shown.shoot(shown.find(kind)[:1], scale=1.3), HELP / f"{kind}.jpg")


def make_player() -> None:
    """The wipe player in both ways to draw nodes, and as a short loop."""
    both = {name: OWN[name] for name in ("vae", "clip", "latent", "images", "whole", "nine", "compare")}
    both["latent"] = (both["latent"][0], {**both["latent"][1], "frame_count": 17})
    both["nine"] = (both["nine"][0], {**both["nine"][1], "length": 17})
    for nodes_2, theme, name in ((False, "dark", "classic_dark"), (True, "light", "nodes2_light")):
        with studio(nodes_2=nodes_2, theme=theme) as (shown, _):
            _plain(shown.page)
            shown.open_prompt(both)
            shown.run()
            ids = shown.find("CVIV_Compare")
            shown.page.evaluate(
                "(() => { const node = window.app.graph._nodes.find(one => one.type === 'CVIV_Compare');"
                " node.setSize([640, node.computeSize()[1]]); node.setSize([640, node.computeSize()[1] + 20]); })()"
            )
            shown.page.wait_for_timeout(800)
            shown.shoot(ids, scale=1.2)
            shown.page.locator(".cviv-wipe").focus()
            shown.page.locator(".cviv-wipe").press("End")
            picture = shown.shoot(ids, scale=1.2)
            _save(picture, DOCS / f"wipe_player_{name}.png")
            if not nodes_2:
                _save(shrunk(picture, 600), HELP / "CVIV_Compare.jpg")
                _save_loop(shown, DOCS / "compare.webp")


def _save_loop(shown: Studio, path: Path) -> None:
    """The clip, again and again, while the divider goes there and back."""
    page = shown.page
    stage, forward = page.locator(".cviv-wipe-stage"), page.locator(".cviv-wipe .forward")
    box = stage.bounding_box()
    assert box is not None
    frames = []
    for number in range(STEPS):
        across = 0.5 - 0.42 * math.cos(2 * math.pi * number / STEPS)
        page.mouse.click(box["x"] + across * box["width"], box["y"] + 0.8 * box["height"])
        forward.click()
        page.mouse.move(2, SHOWN["height"] - 2)
        page.wait_for_timeout(250)
        frames.append(shrunk(_picture(page.screenshot(clip=box)), 640))
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, loop=0, quality=55, method=3)


def make_pages() -> None:
    """The template browser and a help page, with the page around them."""
    browser = tests("browser")
    with studio() as (shown, _):
        page = shown.page
        page.set_viewport_size({"width": 1400, "height": 840})
        shown.open(_read("Reconstruct a video"))
        page.evaluate(
            "(() => { const { graph, canvas } = window.app; canvas.ds.scale = 0.62; canvas.ds.offset = [100, 130];"
            " const node = graph._nodes.find(one => one.type === 'CVIV_DecodeToVideo'); canvas.selectNode(node); })()"
        )
        page.locator('[data-testid="info-button"]').click()
        page.locator(".node-help-content img").first.wait_for()
        page.mouse.move(600, 780)
        page.wait_for_timeout(1500)
        _save(_picture(page.screenshot()), DOCS / "help_page.png")
        browser.open_templates(page, tests("place").PACK)
        page.locator('[data-testid^="template-workflow-"]').first.wait_for()
        page.wait_for_timeout(2500)
        _save(_picture(page.screenshot()), DOCS / "templates.png")


def make_icon() -> None:
    """The pack's icon."""
    _save(icon(400), DOCS / "icon.png")


def _save(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jpg":
        picture.save(path, quality=85)
    else:
        picture.save(path, optimize=True)
    print(path.relative_to(ROOT), *picture.size, flush=True)


PARTS = {"icon": make_icon, "nodes": make_nodes, "graphs": make_graphs, "player": make_player, "pages": make_pages}


def main() -> int:
    """Make what the arguments name, or all."""
    wanted = sys.argv[1:] or list(PARTS)
    unknown = [name for name in wanted if name not in PARTS]
    if unknown:
        print(f"There are no pictures {', '.join(unknown)}; choose from {', '.join(PARTS)}.", file=sys.stderr)
        return 2
    for name in wanted:
        PARTS[name]()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
