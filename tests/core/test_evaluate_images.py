"""The evaluation of image VAEs: those of diffusers, and ours."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import vae_core
from vae_core.metrics import frame_quality

from .evaluating import read_all, report, run, video

pytest.importorskip("cv2")
pytest.importorskip("matplotlib")


def _diffusers_vaes() -> dict[str, tuple[dict, dict]]:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    plain = {"block_out_channels": (32,) * 4, "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 8}
    video_blocks = {
        "down_block_types": ("CogVideoXDownBlock3D",) * 4,
        "up_block_types": ("CogVideoXUpBlock3D",) * 4,
    }
    return {
        "AutoencoderKL": (blocks | plain, {}),
        "AutoencoderKLTemporalDecoder": (
            {"down_block_types": blocks["down_block_types"], "block_out_channels": (32,) * 4, "layers_per_block": 1}, {}
        ),
        "AutoencoderKLCogVideoX": (video_blocks | plain | {"temporal_compression_ratio": 4}, {}),
        "AutoencoderKLWan": ({"base_dim": 8, "z_dim": 4, "num_res_blocks": 1}, {}),
    }  # fmt: skip


@pytest.mark.parametrize("kind", list(_diffusers_vaes()))
def test_diffusers_vaes_stand_beside_ours(here: Path, kind: str) -> None:
    """A small one of each class with random weights: what the table measures is what diffusers itself gives."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = getattr(diffusers, kind)(**_diffusers_vaes()[kind][0]).eval()
    model.save_pretrained(here / "other")
    path = video(here / "videos" / "a.mp4", frames=6, height=44, width=60)
    result = run("videos", "-v", "other", "-o", "report", "--no-baseline")
    assert result.exit_code == 0, result.output
    row = report(here / "report")["videos"][0]
    assert row["frames"] == 6
    clip = read_all(path)
    padded = torch.cat([clip, clip[:, :, -1:].expand(-1, -1, 3, -1, -1)], 2)
    padded = torch.nn.functional.pad(padded, (0, 4, 0, 4, 0, 0), mode="replicate")
    with torch.no_grad():
        if kind in ("AutoencoderKL", "AutoencoderKLTemporalDecoder"):
            latents = model.encode(padded[0].transpose(0, 1)).latent_dist.mode()
            more = {} if kind == "AutoencoderKL" else {"num_frames": 9}
            direct = model.decode(latents, **more).sample.transpose(0, 1)[None]
        else:
            direct = model.decode(model.encode(padded).latent_dist.mode()).sample
    psnr, _ = frame_quality(direct[:, :, :6, :44, :60], clip)
    assert row["per_frame"]["psnr"] == pytest.approx(psnr.tolist(), rel=1e-3)


def test_an_image_vae_is_one_of_ours(here: Path, small_vae: Callable[..., vae_core.VideoVAE]) -> None:
    vae = small_vae("image-vae", torch.float32)
    vae_core.save(vae, here / "image.safetensors")
    video(here / "videos" / "a.mp4", frames=6, height=44, width=60)
    result = run("videos", "-v", "image.safetensors", "-o", "report", "--no-baseline")
    assert result.exit_code == 0, result.output
    clip = read_all(here / "videos" / "a.mp4")
    psnr, _ = frame_quality(vae.decode(vae.encode(clip, pad=True), size=(44, 60)), clip)
    row = report(here / "report")["videos"][0]
    assert row["per_frame"]["psnr"] == pytest.approx(psnr.tolist(), rel=1e-3)
    assert "4 channels, 8x8" in (here / "report" / "report.html").read_text()
    result = run("videos", "-v", "image.safetensors+reference-tiles", "-o", "tiled")
    assert result.exit_code != 0
    assert "this is image-vae; leave them out" in result.output


def test_latent_compatibility_with_an_image_vae_of_diffusers(here: Path, weights: dict[str, Path]) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    diffusers.AutoencoderKL(**_diffusers_vaes()["AutoencoderKL"][0]).save_pretrained(here / "image")
    video(here / "videos" / "a.mp4", frames=5)
    result = run("videos", "-v", weights["cv-vae"], "--image-vae", "image", "-o", "report")
    assert result.exit_code == 0, result.output
    ours, baseline = report(here / "report")["vaes"]
    assert ours["figures"]["distance"] > 0
    assert ours["figures"]["nearest"] <= ours["figures"]["distance"]
    assert baseline["figures"]["distance"] is None
    assert "Latent distance" in (here / "report" / "report.html").read_text()
