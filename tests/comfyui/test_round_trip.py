"""Round Trip: what comes back, the same figures as everywhere else, and VAEs of other loaders."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ..core.clips import as_pictures, moving_picture, write_av
from .browser import has_nodes_2, open_page, press_run, screenshot
from .calls import LOAD_VAE, decode, encode, video_of
from .conftest import LoadVAE
from .inprocess import CancelledRunError, Comfy, NodeError, Progress
from .server import Server
from .svd_model import _fill, small_image_vae
from .weights import SMALL, picture

if TYPE_CHECKING:
    from playwright.sync_api import Page

ROUND_TRIP = {"frame_count": 0, "memory_budget_gb": 0.0}


def round_trip(comfy: Comfy, vae: Any, video: Any, **changes: Any) -> tuple[torch.Tensor, torch.Tensor, str, str]:
    """(images, chart, table, report)."""
    return comfy.call("CVIV_RoundTrip", vae=vae, video=video, **{**ROUND_TRIP, **changes})


def per_frame(comfy: Comfy, name: str) -> list[float]:
    """A number of every frame, as the player on the node has it."""
    (player,) = comfy.ui["1"]["cviv_wipe"]
    return next(one["values"] for one in player["numbers"] if one["name"] == name)


def cells(table: str, row: str) -> list[str]:
    """The cells of the first row of that name in the Markdown tables."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return next(line[1:] for line in lines if line[0] == row)


@pytest.mark.parametrize(
    ("name", "layout"),
    [(SMALL["cv"], "clip as frame batch"), (SMALL["iv"], "video 5-D"), (SMALL["cv"], "separate images")],
)
def test_it_is_encode_and_decode(comfy: Comfy, load_vae: LoadVAE, name: str, layout: str) -> None:
    vae, images = load_vae(name, layout), picture(7, 30, 50)
    result, chart, table, report = round_trip(comfy, vae, images)
    latent, _ = encode(comfy, vae, images)
    expected, _, _ = decode(comfy, vae, latent)
    torch.testing.assert_close(result, expected)
    assert chart.shape[0] == 1
    assert chart.shape[-1] == 3
    assert "7 frames of 50x30" in table
    for part in ("encoding: 7 frames 50x30, ", "decoding: 7 frames 50x30, ", "fps, exact", "float32 on cpu"):
        assert part in report
    assert f"worst frame: PSNR {cells(table, 'PSNR')[1]}" in report


def test_the_node_says_what_evaluate_and_python_say(comfy: Comfy, load_vae: LoadVAE, models: Path) -> None:
    """One clip of a file, three ways."""
    path = write_av(comfy.base / "input" / "round.mp4", as_pictures(moving_picture(21, 44, 60)), rate=Fraction(12))
    core, evaluation = comfy.pack("vae_core"), comfy.pack("vae_core.evaluation")
    choice = evaluation.choose(str(models / SMALL["cv"]))
    outcome = evaluation.evaluate(
        {"round": path}, [choice], comfy.base / "evaluated", protocol=evaluation.Protocol(name="x"), pictures=False
    )
    (record,) = outcome.records

    vae = core.load(models / SMALL["cv"])
    original = torch.cat(list(comfy.pack("vae_core.media.video").read_frames(path)), 2)
    again = vae.decode(vae.encode(original, pad=True), frames=21, size=(44, 60))
    psnr, ssim = comfy.pack("vae_core.metrics").frame_quality(again, original)
    assert record.frames["psnr"] == pytest.approx(psnr.tolist(), abs=1e-3)
    assert record.frames["ssim"] == pytest.approx(ssim.tolist(), abs=1e-4)

    (video,) = comfy.call("LoadVideo", file="round.mp4")
    images, _, table, _ = round_trip(comfy, load_vae(SMALL["cv"]), video)
    assert per_frame(comfy, "PSNR (dB)") == pytest.approx(psnr.tolist(), abs=1e-3)
    assert per_frame(comfy, "SSIM") == pytest.approx(ssim.tolist(), abs=1e-4)
    torch.testing.assert_close(images, ((again[0].movedim(0, -1) + 1) / 2).clamp(0, 1), atol=1e-4, rtol=0)
    figures = record.figures
    assert cells(table, "PSNR")[0] == f"{figures['psnr']:.2f} dB"
    assert cells(table, "SSIM")[0] == f"{figures['ssim']:.4f}"
    assert (
        cells(table, "flicker: change of the error from frame to frame, levels of 255")[0]
        == f"{figures['flicker']:.2f}"
    )
    assert cells(table, "chunks in time")[0] == f"{figures['seam_time']:.2f}"
    assert cells(table, "PSNR (dB)")[1:] == [f"{value:.2f}" for value in record.phases["psnr"]]
    assert comfy.ui["1"]["cviv_wipe"][0]["fps"] == 12


def test_a_part_of_a_video(comfy: Comfy, load_vae: LoadVAE) -> None:
    vae, images = load_vae(SMALL["iv"]), picture(10, 24, 32)
    whole, *_ = round_trip(comfy, vae, images[:6])
    for video in (images, video_of(comfy, images, Fraction(8))):
        part, *_ = round_trip(comfy, vae, video, frame_count=6)
        torch.testing.assert_close(part, whole)
    all_of_it, *_ = round_trip(comfy, vae, images, frame_count=99)
    assert all_of_it.shape[0] == 10


@pytest.mark.parametrize(("name", "way"), [(SMALL["cv"], "Exact strips"), (SMALL["iv"], "Exact")])
def test_what_a_budget_asks_for_is_exact_and_its_borders_are_measured(
    comfy: Comfy, load_vae: LoadVAE, name: str, way: str
) -> None:
    vae, images = load_vae(name), picture(5, 192, 96)
    whole, _, table, report = round_trip(comfy, vae, images)
    assert "Whole frames" in report
    assert "at the borders of" not in table
    least, refused = 0.001, 0
    while True:  # to encode and to decode need different budgets
        try:
            tiled, _, table, report = round_trip(comfy, vae, images, memory_budget_gb=least)
            break
        except NodeError as error:
            found = re.search(r"smallest budget in which it can be done exactly is ([\d.]+) GiB", str(error))
            assert found
            least, refused = float(found[1]) + 0.001, refused + 1
    assert 1 <= refused <= 2
    assert way in report
    torch.testing.assert_close(tiled, whole, atol=1e-3, rtol=0)
    if way == "Exact":  # strips of single steps end at other rows in every step
        assert 0.5 < float(cells(table, "tiles")[0]) < 2  # as anywhere else


def small_video_vae(comfy: Comfy) -> Any:
    """ComfyUI's VAE object around its own Wan network, narrow."""
    vae = small_image_vae(comfy)
    network = comfy.module("comfy.ldm.wan.vae").WanVAE(
        dim=8, z_dim=4, num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    _fill(network)
    vae.first_stage_model = network.eval()
    patcher = comfy.module("comfy.model_patcher").ModelPatcher
    vae.patcher = patcher(network, load_device=vae.device, offload_device=vae.device)
    vae.latent_dim = 3
    vae.upscale_ratio, vae.upscale_index_formula = (lambda t: max(0, 4 * t - 3), 8, 8), (4, 8, 8)
    vae.downscale_ratio, vae.downscale_index_formula = (lambda t: max(0, (t + 3) // 4), 8, 8), (4, 8, 8)
    return vae


@pytest.mark.parametrize(("make", "how"), [(small_image_vae, "16 frames at a time"), (small_video_vae, "all frames")])
def test_a_vae_of_comfyui_itself(comfy: Comfy, make: Any, how: str) -> None:
    """Frames and size that it could not take alone; where it can, the result is that of ComfyUI's own nodes."""
    vae, images = make(comfy), picture(18, 30, 41)
    result, _, table, report = round_trip(comfy, vae, images)
    assert result.shape == images.shape
    assert "18 frames of 41x30" in table
    assert how in report
    assert "run by ComfyUI" in report
    fitting = picture(5, 32, 40)
    (latent,) = comfy.call("VAEEncode", pixels=fitting, vae=vae)
    (expected,) = comfy.call("VAEDecode", samples=latent, vae=vae)
    result, *_ = round_trip(comfy, vae, fitting)
    torch.testing.assert_close(result, expected.clamp(0, 1), atol=1e-4, rtol=1e-4)


def test_what_cannot_be_compared_is_refused(comfy: Comfy, load_vae: LoadVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = picture(5, 16, 16)
    vae = small_image_vae(comfy)
    monkeypatch.setattr(vae, "latent_dim", 1)  # as for sound
    for other in (vae, {"samples": clip}):
        with pytest.raises(NodeError, match="is connected as vae, which takes no pictures; connect Load Video VAE"):
            round_trip(comfy, other, clip)
    with pytest.raises(NodeError, match="video is a dict; connect an IMAGE batch or a VIDEO"):
        round_trip(comfy, load_vae(SMALL["cv"]), {"samples": clip})
    monkeypatch.setattr(vae, "latent_dim", 2)
    monkeypatch.setattr(vae, "decode", lambda samples: torch.zeros(samples.shape[0], 8, 8, 3))
    with pytest.raises(NodeError, match=r"gave frames of shape \(5, 8, 8, 3\) for \(5, 16, 16, 3\)"):
        round_trip(comfy, vae, clip)


@pytest.mark.parametrize("native", [True, False])
def test_cancel(comfy: Comfy, load_vae: LoadVAE, native: bool) -> None:
    """At the first report of our decode, or of another VAE; newer ComfyUI leaves out some of those that follow."""
    vae, first = (load_vae(SMALL["cv"]), 17) if native else (small_image_vae(comfy), 16)

    def cancel(report: Progress) -> None:
        if report.value == first:  # the encode reports 16 frames at a time
            comfy.module("nodes").interrupt_processing(True)

    comfy.on_progress = cancel
    with pytest.raises(CancelledRunError):
        round_trip(comfy, vae, picture(65, 16, 24))
    assert (comfy.progress[-1].value, comfy.progress[-1].total) == (first, 65)
    assert any(report.value == 65 for report in comfy.progress) == native  # all were encoded
    comfy.on_progress = None
    gc.collect()
    images, *_ = round_trip(comfy, vae, picture(5, 16, 24))
    assert images.shape == (5, 16, 24, 3)


# ---------------------------------------------------------------------------------------------------- in the browser


@pytest.fixture(scope="module")
def page(server: Server) -> Iterator[Page]:
    """A graph with the demo clip through a demo VAE and back, after a run."""
    nodes = {
        "1": ("CVIV_LoadVideoVAE", {"vae_name": "demo-cv-vae", **LOAD_VAE}),
        "2": ("CVIV_DemoClip", {}),
        "3": ("CVIV_RoundTrip", {"vae": ["1", 0], "video": ["2", 0], **ROUND_TRIP, "frame_count": 5}),
    }
    prompt = {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in nodes.items()}
    with open_page(server.url) as page:
        page.evaluate("prompt => window.app.loadApiJson(prompt, 'round trip')", prompt)
        page.wait_for_function("window.app.graph._nodes.length === 3")
        page.evaluate(
            """() => { for (const node of window.app.graph._nodes) {
                const places = {CVIV_LoadVideoVAE: [0, 0], CVIV_DemoClip: [0, 220], CVIV_RoundTrip: [380, 0]};
                node.pos = places[node.type];
                node.setSize([node.type === "CVIV_RoundTrip" ? 620 : 320, node.computeSize()[1]]); }
            window.app.canvas.ds.scale = 0.68; window.app.canvas.ds.offset = [150, 170]; }"""
        )
        assert press_run(page, 600_000) == "execution_success"
        yield page


BOX = (
    "window.app.graph._nodes.find(node => node.type === 'CVIV_RoundTrip')"
    ".widgets?.find(widget => widget.name === 'cviv_report')?.element"
)


def check_report(page: Page) -> None:
    """One line with what was lost; on a click the rest, with what ran."""
    page.wait_for_function(f"{BOX}?.querySelector('.cviv-report-line').checkVisibility()")
    line = page.evaluate(f"{BOX}.querySelector('.cviv-report-line').innerText")
    assert re.fullmatch(r"PSNR \d+\.\d\d dB, SSIM \d\.\d{4}, 5 frames 320x192", line)
    for told in (True, False):
        page.evaluate(f"{BOX}.querySelector('.cviv-report-head').click()")
        page.wait_for_timeout(300)
        text = page.evaluate(f"{BOX}.innerText")
        for start in ("worst frame: PSNR ", "encoding: 5 frames 320x192, ", "decoding: 5 frames 320x192, "):
            assert (f"\n{start}" in text) == told


def test_player_and_report_stand_on_the_node(page: Page, tmp_path: Path) -> None:
    page.wait_for_function(BOX)
    found = page.evaluate(
        "Object.fromEntries(window.app.graph._nodes.find(node => node.type === 'CVIV_RoundTrip').widgets"
        ".filter(one => one.element).map(one => [one.name, one.element.clientHeight]))"
    )
    assert len(found) == 2
    assert 20 < found.pop("cviv_report") < 30  # its line alone
    assert min(found.values()) > 60
    check_report(page)
    page.get_by_text("frame 0 of 4").wait_for()  # the player has its pictures
    screenshot(page, "round_trip_classic", tmp_path)


def test_in_nodes_2(page: Page, tmp_path: Path) -> None:
    if not has_nodes_2(page):
        pytest.skip("this front end has no finished Nodes 2.0")
    page.evaluate("window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', true)")
    try:
        page.wait_for_function(f"{BOX}?.closest('[data-node-id]')")
        check_report(page)
        page.get_by_text("frame 0 of 4").wait_for()
        screenshot(page, "round_trip_nodes_2", tmp_path)
    finally:
        page.evaluate("window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false)")
