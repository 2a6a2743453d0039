"""Our VAE in the nodes of other packs, as far as they run on a CPU.

CVIV_OTHER_PACKS names a folder that holds checkouts of ComfyUI-VideoHelperSuite, ComfyUI-KJNodes and
ComfyUI-AnimateDiff-Evolved; a pack that is not there, or does not load in this ComfyUI, is skipped.
"""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from ..core.clips import with_sound
from .calls import encode, play
from .conftest import LoadVAE
from .inprocess import Comfy
from .weights import SMALL, picture

FRAMES, HEIGHT, WIDTH = 17, 48, 64
VHS_LOAD = {
    "force_rate": 0, "custom_width": 0, "custom_height": 0, "frame_load_cap": 0, "skip_first_frames": 0,
    "select_every_nth": 1, "format": "None",
}  # fmt: skip
VHS_COMBINE = {
    "frame_rate": 24, "loop_count": 0, "format": "video/h264-mp4", "pingpong": False, "save_output": True,
    "pix_fmt": "yuv420p", "crf": 19, "save_metadata": False, "trim_to_audio": False,
}  # fmt: skip


def need(comfy: Comfy, pack: str, node: str) -> None:
    """Load a pack that has `node`, once. Skips where that cannot be."""
    folder = os.environ.get("CVIV_OTHER_PACKS")
    if folder is None:
        pytest.skip("CVIV_OTHER_PACKS names no folder with checkouts of other packs")
    path = Path(folder).expanduser().resolve() / pack
    if not path.is_dir():
        pytest.skip(f"{path} is not there")
    if node not in comfy.nodes:
        comfy.loop.run_until_complete(comfy.module("nodes").load_custom_node(str(path)))
    try:
        comfy.nodes[node].INPUT_TYPES()
    except (KeyError, AttributeError):  # AttributeError: it uses what this ComfyUI does not have yet
        comfy.nodes.pop(node, None)
        pytest.skip(f"{pack} does not load in this ComfyUI, or has no {node} here")


@pytest.fixture
def clip(comfy: Comfy) -> Path:
    path = comfy.base / "input" / "for_others.mp4"
    return with_sound(path, FRAMES, rate=Fraction(24))  # of 64x48; VideoHelperSuite wants to hear something


@pytest.mark.parametrize(("layout", "count"), [("clip as frame batch", 5), ("separate images", FRAMES)])
def test_vhs_load_video_encodes(comfy: Comfy, load_vae: LoadVAE, clip: Path, layout: str, count: int) -> None:
    need(comfy, "ComfyUI-VideoHelperSuite", "VHS_LoadVideoPath")
    vae = load_vae(SMALL["cv"], layout)
    latent, frames, *_ = comfy.call("VHS_LoadVideoPath", video=str(clip), vae=vae, **VHS_LOAD)
    assert latent["samples"].shape == (count, 4, HEIGHT // 8, WIDTH // 8)
    assert frames == count
    images, *_ = comfy.call("VHS_LoadVideoPath", video=str(clip), **VHS_LOAD)
    (ours,) = comfy.call("VAEEncode", pixels=images, vae=vae)
    torch.testing.assert_close(latent["samples"], ours["samples"], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "layout", "frames"),
    [("cv", "clip as frame batch", 17), ("cv", "separate images", 5), ("cv", "video 5-D", 17), ("iv", "auto", 17)],
)
def test_vhs_video_combine_decodes(comfy: Comfy, load_vae: LoadVAE, name: str, layout: str, frames: int) -> None:
    need(comfy, "ComfyUI-VideoHelperSuite", "VHS_VideoCombine")
    laid = "clip as frame batch" if layout == "separate images" else layout
    latent, _ = encode(comfy, load_vae(SMALL[name], laid), picture(FRAMES, HEIGHT, WIDTH))
    vae = load_vae(SMALL[name], layout)
    prefix = f"vhs_{name}_{layout.replace(' ', '_')}"
    comfy.call("VHS_VideoCombine", images=latent, vae=vae, filename_prefix=prefix, **VHS_COMBINE)
    (path,) = (comfy.base / "output").glob(f"{prefix}*.mp4")
    found = play(str(path))["frames"]
    assert found.shape == (frames, HEIGHT, WIDTH, 3)
    (decoded,) = comfy.call("VAEDecode", samples=latent, vae=vae)
    shown, told = (
        clip.float().mean(dim=-1) for clip in (torch.from_numpy(found) / 255, decoded)
    )  # colours share pixels
    likeness = [torch.corrcoef(torch.stack([one.flatten(), told.flatten()]))[0, 1] for one in (shown, shown.flip(0))]
    assert likeness[0] > 0.7 > likeness[1]


def test_vhs_batched_nodes(comfy: Comfy, load_vae: LoadVAE) -> None:
    need(comfy, "ComfyUI-VideoHelperSuite", "VHS_VAEEncodeBatched")
    vae, images = load_vae(SMALL["cv"], "clip as frame batch"), picture(FRAMES, HEIGHT, WIDTH)
    (latent,) = comfy.call("VHS_VAEEncodeBatched", pixels=images, vae=vae, per_batch=FRAMES)
    (ours,) = comfy.call("VAEEncode", pixels=images, vae=vae)
    torch.testing.assert_close(latent["samples"], ours["samples"])
    (decoded,) = comfy.call("VHS_VAEDecodeBatched", samples=latent, vae=vae, per_batch=FRAMES)
    assert decoded.shape == (FRAMES, HEIGHT, WIDTH, 3)


def test_our_images_and_latents_go_into_vhs(comfy: Comfy, load_vae: LoadVAE) -> None:
    need(comfy, "ComfyUI-VideoHelperSuite", "VHS_SplitLatents")
    latent, _ = encode(comfy, load_vae(SMALL["cv"], "clip as frame batch"), picture(FRAMES, HEIGHT, WIDTH))
    first, count, rest, _ = comfy.call("VHS_SplitLatents", latents=latent, split_index=2)
    assert (first["samples"].shape[0], count, rest["samples"].shape[0]) == (2, 2, 3)


@pytest.mark.parametrize("name", ["cv", "iv"])
@pytest.mark.parametrize("tiling", [False, True])
def test_kj_decode_and_save(comfy: Comfy, load_vae: LoadVAE, name: str, tiling: bool) -> None:
    need(comfy, "ComfyUI-KJNodes", "DecodeAndSaveVideo")
    vae = load_vae(SMALL[name], "video 5-D")
    latent, _ = encode(comfy, vae, picture(FRAMES, HEIGHT, WIDTH))
    tiles = {"tile_size": 64, "overlap": 0, "temporal_size": 4096, "temporal_overlap": 16} if tiling else {}
    prefix = f"kj_{name}_{tiling}"
    inputs = {
        "video_latent": latent, "video_vae": vae, "fps": 24.0, "filename_prefix": prefix, "format": "auto",
        "codec": "auto", "tiling": "enabled" if tiling else "disabled",
        **{f"tiling.{key}": value for key, value in tiles.items()},
    }  # fmt: skip
    comfy.call("DecodeAndSaveVideo", **inputs)
    (path,) = (comfy.base / "output").glob(f"{prefix}*.mp4")
    assert play(str(path))["frames"].shape == (FRAMES, HEIGHT, WIDTH, 3)


def test_kj_encode_video_components(comfy: Comfy, load_vae: LoadVAE, clip: Path) -> None:
    need(comfy, "ComfyUI-KJNodes", "EncodeVideoComponents")
    (video,) = comfy.call("LoadVideo", file=clip.name)
    inputs: dict[str, Any] = {
        "video": video, "vae": load_vae(SMALL["cv"], "video 5-D"), "width": 0, "height": 0, "max_frames": 0,
        "upscale_method": "lanczos", "keep_proportion": "stretch",
    }  # fmt: skip
    latent, _, fps, frames = comfy.call("EncodeVideoComponents", **inputs)
    assert latent["samples"].shape == (1, 4, 5, HEIGHT // 8, WIDTH // 8)
    assert (fps, frames) == (24.0, FRAMES)


def test_kj_decode_loop(comfy: Comfy, load_vae: LoadVAE) -> None:
    need(comfy, "ComfyUI-KJNodes", "VAEDecodeLoopKJ")
    vae = load_vae(SMALL["cv"], "video 5-D")
    latent, _ = encode(comfy, vae, picture(33, HEIGHT, WIDTH))
    (images,) = comfy.call("VAEDecodeLoopKJ", samples=latent, vae=vae, overlap_latent_frames=2)
    assert images.shape[1:] == (HEIGHT, WIDTH, 3)
    assert torch.isfinite(images).all()


def test_animatediff_evolved_encodes(comfy: Comfy, load_vae: LoadVAE) -> None:
    """AnimateLCM-I2V's node scales one picture to the size of a latent and encodes it."""
    need(comfy, "ComfyUI-AnimateDiff-Evolved", "ADE_UpscaleAndVAEEncode")
    size = {"samples": torch.zeros(16, 4, HEIGHT // 8, WIDTH // 8)}
    (latent,) = comfy.call(
        "ADE_UpscaleAndVAEEncode", image=picture(1, 80, 100), vae=load_vae(SMALL["cv"]), latent_size=size,
        scale_method="lanczos", crop="center",
    )  # fmt: skip
    assert latent["samples"].shape == (1, 4, HEIGHT // 8, WIDTH // 8)


def test_the_ratio_is_a_number_to_those_who_compute_with_it(load_vae: LoadVAE) -> None:
    """As VideoHelperSuite and AnimateDiff-Evolved write it; and still what ComfyUI takes it for."""
    vae = load_vae(SMALL["cv"])
    for ratio in (vae.downscale_ratio, vae.upscale_ratio):
        assert int(100 / ratio + 0.5) * ratio == 104
        assert (100 // ratio, 100 % ratio, 7 * ratio, ratio * 7) == (12, 4, 56, 56)
        assert range(64)[::ratio] == range(0, 64, 8)
        assert ratio[-1] == ratio[1] == 8
    assert vae.downscale_ratio[0](17) == 5
    assert vae.upscale_ratio[0](5) == 17
    assert vae.temporal_compression_decode() == 4
