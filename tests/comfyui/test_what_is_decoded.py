"""What the user chose beats what a latent remembers, and what is not known of a latent is said in the report."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .calls import DECODE, DECODE_TO_VIDEO, decode, encode
from .conftest import LoadVAE
from .inprocess import Comfy, NodeError
from .weights import SMALL, picture

CLIP, IMAGES, VIDEO = "clip as frame batch", "separate images", "video 5-D"


@pytest.mark.parametrize("remembers", [True, False])
@pytest.mark.parametrize(("chosen", "frames"), [(CLIP, 17), (IMAGES, 5), (VIDEO, 17), ("auto", 17)])
def test_the_layout_of_a_clip_is_what_the_user_chose(
    comfy: Comfy, load_vae: LoadVAE, chosen: str, frames: int, remembers: bool
) -> None:
    """Five latents of one clip: as many frames as ComfyUI's own VAE Decode gives, whatever the latent remembers."""
    latent, _ = encode(comfy, load_vae(SMALL["cv"], CLIP), picture(17, 24, 32))
    if not remembers:
        del latent["cviv"]
    vae = load_vae(SMALL["cv"], chosen)
    images, _, report = decode(comfy, vae, latent)
    (stock,) = comfy.call("VAEDecode", samples=latent, vae=vae)
    assert images.shape == (frames, 24, 32, 3)
    torch.testing.assert_close(images, stock)
    assert ("5 separate images, as latent_layout in Load Video VAE says" in report) == (remembers and frames == 5)


@pytest.mark.parametrize(("chosen", "frames"), [(CLIP, 17), (IMAGES, 5), ("auto", 5)])
def test_the_layout_of_images_is_what_the_user_chose(comfy: Comfy, load_vae: LoadVAE, chosen: str, frames: int) -> None:
    """Five pictures that were encoded one by one; only where nothing was chosen the latent's memory decides."""
    latent, _ = encode(comfy, load_vae(SMALL["cv"], IMAGES), picture(5, 20, 30))
    images, _, report = decode(comfy, load_vae(SMALL["cv"], chosen), latent)
    assert images.shape == (frames, 20, 30, 3)
    assert ("one clip of 17 frames, as latent_layout in Load Video VAE says" in report) == (chosen == CLIP)


def test_a_video_of_separate_images_is_refused(comfy: Comfy, load_vae: LoadVAE) -> None:
    latent, _ = encode(comfy, load_vae(SMALL["cv"], CLIP), picture(17, 24, 32))
    with pytest.raises(NodeError, match="The latent holds 5 separate images and a VIDEO is one clip"):
        comfy.call("CVIV_DecodeToVideo", vae=load_vae(SMALL["cv"], IMAGES), samples=latent, **DECODE_TO_VIDEO)


def test_nothing_is_said_of_what_is_known(comfy: Comfy, load_vae: LoadVAE) -> None:
    vae = load_vae(SMALL["cv"])
    latent, _ = encode(comfy, vae, picture(18, 20, 30))
    for samples in (latent, {"samples": latent["samples"]}):
        _, _, report = decode(comfy, vae, samples)
        for word in ("not known", "latents now", "separate images", "frames, one after another"):
            assert word not in report


def test_a_batch_that_was_repeated_may_be_several_clips(comfy: Comfy, load_vae: LoadVAE) -> None:
    vae = load_vae(SMALL["cv"], CLIP)
    latent, _ = encode(comfy, vae, picture(17, 16, 24))
    (twice,) = comfy.call("RepeatLatentBatch", samples=latent, amount=2)
    images, _, report = decode(comfy, vae, twice)
    assert images.shape[0] == 37
    assert "10 latents now, and was made with 5: all 37 frames are given; taken as one clip" in report
    assert "If these are 2 clips, put Latent Layout before this node, with clips 2" in report
    (two,) = comfy.call("CVIV_LatentLayout", samples=twice, layout=VIDEO, clips=2)
    images, _, report = decode(comfy, vae, two)
    assert images.shape[0] == 34
    assert "2 clips of 17 frames, one after another" in report
    torch.testing.assert_close(images[:17], images[17:])


def test_an_upscaled_latent_has_no_true_size(comfy: Comfy, load_vae: LoadVAE) -> None:
    vae = load_vae(SMALL["cv"], CLIP)
    latent, _ = encode(comfy, vae, picture(5, 20, 30))
    (large,) = comfy.call("LatentUpscaleBy", samples=latent, upscale_method="bilinear", scale_by=2.0)
    images, _, report = decode(comfy, vae, large)
    assert images.shape == (5, 48, 64, 3)
    assert "the latent is of 64x48 pixels now, and was made of 30x20" in report


@pytest.mark.parametrize("node", ["CVIV_Decode", "CVIV_DecodeToVideo"])
def test_a_latent_with_nan_is_not_blamed_on_the_vae(comfy: Comfy, load_vae: LoadVAE, node: str) -> None:
    """As stock latent arithmetic makes them; nothing is decoded, and nothing rescued."""
    samples = torch.randn(5, 4, 3, 4)
    samples[2, 1, 0, 0] = torch.nan
    widgets: dict[str, Any] = DECODE if node == "CVIV_Decode" else DECODE_TO_VIDEO
    with pytest.raises(NodeError) as caught:
        comfy.call(node, vae=load_vae(SMALL["cv"], dtype="fp16"), samples={"samples": samples}, **widgets)
    message = str(caught.value)
    assert "NaN or infinity in 1 of its 5 latents, the first being number 2" in message
    assert "float16" not in message
    assert "is saved as" not in message
