"""What the user chose beats what a latent remembers, and what is not known of a latent is said in the report."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .calls import DECODE, DECODE_TO_VIDEO, decode, decode_to_video, encode
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


FLIP = {"flip_method": "y-axis: horizontally"}
UPSIDE_DOWN = {"flip_method": "x-axis: vertically"}


@pytest.mark.parametrize(
    ("node", "widgets", "size", "said"),
    [
        ("LatentFlip", FLIP, (24, 72), "was mirrored or turned, so that padding may lie on any side: all 72x24"),
        ("LatentFlip", UPSIDE_DOWN, (24, 72), "was mirrored or turned"),
        ("LatentRotate", {"rotation": "180 degrees"}, (24, 72), "was mirrored or turned"),
        ("LatentRotate", {"rotation": "90 degrees"}, (72, 24), "was mirrored or turned"),
        ("LatentRotate", {"rotation": "none"}, (20, 70), ""),
        ("LatentCrop", {"width": 64, "height": 64, "x": 8, "y": 0}, (24, 64), "of 64x24 pixels now, and was made of"),
    ],
)
def test_what_moves_a_latent_moves_its_padding(
    comfy: Comfy, load_vae: LoadVAE, node: str, widgets: dict[str, Any], size: tuple[int, int], said: str
) -> None:
    """Nothing of the picture is cut off; nothing is known any more, and that is said."""
    vae = load_vae(SMALL["cv"], CLIP)
    latent, _ = encode(comfy, vae, picture(5, 20, 70))
    (moved,) = comfy.call(node, samples=latent, **widgets)
    (again,) = comfy.call("LatentMultiply", samples=moved, multiplier=0.9)  # as a sampler, it gives other values
    for one in (moved, again):
        images, _, report = decode(comfy, vae, one)
        assert images.shape == (5, *size, 3)
        assert (said in report) if said else ("mirrored" not in report)
        assert decode_to_video(comfy, vae, one).get_dimensions() == size[::-1]
    restored, _, _ = decode(comfy, vae, latent)
    assert restored.shape == (5, 20, 70, 3)  # the latent that came in is as it was


def test_a_turned_latent_without_padding_keeps_all_that_is_known(comfy: Comfy, load_vae: LoadVAE) -> None:
    vae = load_vae(SMALL["cv"], CLIP)
    latent, _ = encode(comfy, vae, picture(5, 24, 32))
    latent["cviv"]["aspect"] = "4/3"
    (turned,) = comfy.call("LatentRotate", samples=latent, rotation="90 degrees")
    images, _, report = decode(comfy, vae, turned)
    assert images.shape == (5, 32, 24, 3)
    assert turned["cviv"]["aspect"] == "3/4"
    (mirrored,) = comfy.call("LatentFlip", samples=turned, **FLIP)
    (large,) = comfy.call("LatentUpscaleBy", samples=mirrored, upscale_method="bilinear", scale_by=2.0)
    images, _, more = decode(comfy, vae, large)
    assert images.shape == (5, 64, 48, 3)
    for word in ("mirrored", "not known", "was made of"):
        assert word not in report + more


def test_a_video_latent_turned_in_time_gives_all_its_frames(comfy: Comfy, load_vae: LoadVAE) -> None:
    """Of a 5-D latent Flip Latent turns time round."""
    vae = load_vae(SMALL["iv"], VIDEO)
    latent, _ = encode(comfy, vae, picture(7, 24, 32))
    (turned,) = comfy.call("LatentFlip", samples=latent, **UPSIDE_DOWN)
    images, _, report = decode(comfy, vae, turned)
    assert images.shape[0] == 9
    assert "was mirrored or turned" in report


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
