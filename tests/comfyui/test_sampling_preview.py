"""Animated Sampling Preview: every frame while it is sampled, by ComfyUI's own hooks; off is the model itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from .inprocess import CancelledRunError, Comfy, NodeError, Progress
from .svd import small_svd
from .svd_model import small_clip_vision
from .weights import picture

NODE = "CVIV_AnimatedSamplingPreview"
WIDGETS = {"show": "contact sheet", "every": 1, "colours": "auto", "fps": 8.0, "side": 256, "most_frames": 64}
FRAMES = 6


@pytest.fixture
def sampling(comfy: Comfy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What KSampler needs for a clip of six latents of SVD."""
    monkeypatch.setattr(comfy.module("comfy.utils"), "PROGRESS_THROTTLE_MIN_INTERVAL", 0, raising=False)
    (vae,) = comfy.call(
        "CVIV_LoadVideoVAE", vae_name="demo-cv-vae", dtype="fp32", device="auto", latent_layout="separate images"
    )
    positive, negative, latent = comfy.call(
        "SVD_img2vid_Conditioning",
        clip_vision=small_clip_vision(comfy, tmp_path),
        init_image=picture(1, 48, 64),
        vae=vae,
        width=64,
        height=48,
        video_frames=FRAMES,
        motion_bucket_id=127,
        fps=6,
        augmentation_level=0.0,
    )
    return {"positive": positive, "negative": negative, "latent_image": latent}


@pytest.fixture
def sent(comfy: Comfy, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Outputs that nodes were given outside their turn."""
    found: list[dict[str, Any]] = []
    server = comfy.module("server").PromptServer.instance
    before = server.send_sync

    def send(event: str, data: Any, sid: Any = None) -> None:
        if event == "executed" and data.get("node") == "1":
            found.append(data["output"])
        before(event, data, sid)

    monkeypatch.setattr(server, "send_sync", send)
    return found


def sample(comfy: Comfy, sampling: dict[str, Any], steps: int = 4, **changes: Any) -> torch.Tensor:
    prompt: dict[str, Any] = {}
    model = comfy.give(prompt, small_svd(comfy))
    prompt["1"] = {"class_type": NODE, "inputs": {"model": model, **WIDGETS, **changes}}
    inputs = {name: comfy.give(prompt, one) for name, one in sampling.items()}
    widgets = {"seed": 1, "steps": steps, "cfg": 1.0, "sampler_name": "euler", "scheduler": "karras", "denoise": 1.0}
    prompt["2"] = {"class_type": "KSampler", "inputs": {"model": ["1", 0], **inputs, **widgets}}
    key = comfy.take(prompt, ["2", 0])
    comfy.run(prompt)
    return comfy.taken[key]["samples"]


def sheets(comfy: Comfy) -> list[Progress]:
    return [report for report in comfy.progress if report.node_id == "1" and report.preview is not None]


def test_a_sheet_of_all_frames_every_step(comfy: Comfy, sampling: dict[str, Any]) -> None:
    samples = sample(comfy, sampling)
    shown = sheets(comfy)
    assert [(report.value, report.total) for report in shown] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    form, sheet, side = shown[-1].preview
    assert form == "JPEG"
    assert side == max(sheet.size) <= 256
    cells = [sheet.crop(box) for box in grid(sheet, columns=2, rows=3)]
    factors = torch.tensor(small_svd(comfy).get_model_object("latent_format").latent_rgb_factors)
    scaled = samples * 0.18215
    for number, cell in enumerate(cells):
        wanted = (scaled[number].movedim(0, -1) @ factors).add(1).div(2).clamp(0, 1).mean(dim=(0, 1))
        got = torch.tensor(list(cell.resize((1, 1), Image.Resampling.BOX).getdata()), dtype=torch.float)[0] / 255
        assert (got - wanted).abs().max() < 0.05, number


def grid(sheet: Image.Image, columns: int, rows: int) -> list[tuple[int, int, int, int]]:
    """Boxes inside the cells, row by row."""
    width, height = sheet.width / columns, sheet.height / rows
    return [
        (int(x * width) + 3, int(y * height) + 3, int((x + 1) * width) - 3, int((y + 1) * height) - 3)
        for y in range(rows)
        for x in range(columns)
    ]


def test_every_third_step_and_the_last(comfy: Comfy, sampling: dict[str, Any]) -> None:
    sample(comfy, sampling, steps=8, every=3)
    assert [report.value for report in sheets(comfy)] == [3, 6, 8]


def test_the_samples_are_the_same(comfy: Comfy, sampling: dict[str, Any]) -> None:
    plain = sample(comfy, sampling, show="off")
    assert sheets(comfy) == []
    assert torch.equal(sample(comfy, sampling), plain)
    assert torch.equal(sample(comfy, sampling, show="animation"), plain)


def test_off_is_the_model_itself(comfy: Comfy) -> None:
    model = small_svd(comfy)
    assert comfy.call(NODE, model=model, **{**WIDGETS, "show": "off"})[0] is model
    (patched,) = comfy.call(NODE, model=model, **WIDGETS)
    assert patched is not model
    assert "cviv_sampling_preview" not in str(model.model_options)


def test_an_animation_stays_on_the_node(comfy: Comfy, sampling: dict[str, Any], sent: list[dict[str, Any]]) -> None:
    sample(comfy, sampling, show="animation", fps=5.0, side=128)
    assert len(sent) == 4
    assert sent[-1]["animated"] == [True]
    (file,) = sent[-1]["images"]
    folder = Path(comfy.module("folder_paths").get_temp_directory()) / file["subfolder"]
    with Image.open(folder / file["filename"]) as film:
        assert film.n_frames == FRAMES
        assert film.size == (128, 96)
        film.load()
        assert film.info["duration"] == 200
    assert len([path for path in folder.iterdir() if path.suffix == ".webp"]) <= 8


def test_of_a_long_clip_frames_are_spread_evenly(comfy: Comfy) -> None:
    evenly = comfy.pack("nodes.sampling.colours").evenly
    assert evenly(5, 9) == [0, 1, 2, 3, 4]
    assert evenly(9, 5) == [0, 2, 4, 6, 8]
    assert evenly(100, 3) == [0, 50, 99]
    assert evenly(7, 1) == [0]


def test_5d_latents_are_shown_frame_by_frame(comfy: Comfy) -> None:
    colours = comfy.pack("nodes.sampling.colours")
    formats = comfy.module("comfy.latent_formats")
    video = torch.randn(1, 4, 3, 6, 8)
    pictures = colours.colours_of(formats.SD15(), "latent colours", torch.device("cpu"))(colours.frames_of(video))
    assert pictures.shape == (3, 6, 8, 3)
    flat = colours.colours_of(formats.SD15(), "latent colours", torch.device("cpu"))(video[0].movedim(1, 0))
    assert torch.equal(pictures, flat)
    assert not torch.allclose(pictures[0], pictures[1])


@pytest.mark.parametrize("name", ["SD15", "SDXL", "SD3", "Flux", "Wan21", "HunyuanVideo", "LTXV", "Mochi"])
def test_every_format_with_colours_gives_pictures(comfy: Comfy, name: str) -> None:
    form = getattr(comfy.module("comfy.latent_formats"), name)()
    colours = comfy.pack("nodes.sampling.colours")
    make = colours.colours_of(form, "latent colours", torch.device("cpu"))
    shape = (1, form.latent_channels, 3, 6, 8) if form.latent_dimensions == 3 else (3, form.latent_channels, 6, 8)
    pictures = make(colours.frames_of(torch.randn(shape)))
    assert pictures.shape == (3, 6, 8, 3)
    assert 0 <= pictures.min() <= pictures.max() <= 1


def test_taesd_where_it_is_there(comfy: Comfy, sampling: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    with pytest.raises(NodeError, match=r"colours is 'TAESD', but models/vae_approx/taesd_decoder\.safetensors is not"):
        comfy.call(NODE, model=small_svd(comfy), **{**WIDGETS, "colours": "TAESD"})
    folder = comfy.base / "models" / "vae_approx"
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    taesd = comfy.module("comfy.taesd.taesd").TAESD(latent_channels=4)
    save_file(
        {name: tensor.contiguous() for name, tensor in taesd.taesd_decoder.state_dict().items()},
        folder / "taesd_decoder.safetensors",
    )
    try:
        sample(comfy, sampling, steps=2, colours="TAESD", side=512)
        fine = sheets(comfy)[-1].preview[1]
        sample(comfy, sampling, steps=2, colours="latent colours", side=512)
        coarse = sheets(comfy)[-1].preview[1]
    finally:
        (folder / "taesd_decoder.safetensors").unlink()
    assert fine.size == coarse.size
    assert fine.tobytes() != coarse.tobytes()


def test_latents_without_colours_are_told(comfy: Comfy) -> None:
    class Unknown(comfy.module("comfy.latent_formats").LatentFormat):
        latent_channels = 5

    with pytest.raises(ValueError, match=r"ComfyUI knows no colours for the latents of this model \(Unknown\)"):
        comfy.pack("nodes.sampling.colours").colours_of(Unknown(), "auto", torch.device("cpu"))


def test_cancel_still_works(comfy: Comfy, sampling: dict[str, Any]) -> None:
    def cancel(report: Progress) -> None:
        if report.node_id == "1":
            comfy.module("nodes").interrupt_processing(True)

    comfy.on_progress = cancel
    with pytest.raises(CancelledRunError):
        sample(comfy, sampling, steps=8)
