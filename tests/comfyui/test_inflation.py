"""A CV-VAE made of an image VAE does on still frames what ComfyUI's own module of that image VAE does."""

from __future__ import annotations

import torch

from ..core.image_vae_2d import BLOCKS, CHANNELS, WIDTHS, passable, random_weights
from .inprocess import Comfy

CONFIG = {
    "double_z": True,
    "z_channels": CHANNELS,
    "resolution": 64,
    "in_channels": 3,
    "out_ch": 3,
    "ch": WIDTHS[0],
    "ch_mult": [width // WIDTHS[0] for width in WIDTHS],
    "num_res_blocks": BLOCKS,
    "attn_resolutions": [],
    "dropout": 0.0,
}


@torch.no_grad()
def test_still_frames_are_those_of_comfyuis_image_vae(comfy: Comfy) -> None:
    module = comfy.module("comfy.ldm.models.autoencoder")
    image_vae = module.AutoencoderKL(ddconfig=CONFIG, embed_dim=CHANNELS).eval()
    weights = passable(random_weights())
    image_vae.load_state_dict(weights, strict=True)
    vae = comfy.pack("vae_core.training.inflation").inflate([weights]).vae

    picture = torch.rand(1, 3, 32, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, logvar = image_vae.quant_conv(image_vae.encoder(picture)).chunk(2, dim=1)
    for value, expected in zip(vae.moments(picture[:, :, None].expand(-1, -1, 5, -1, -1)), (mean, logvar), strict=True):
        torch.testing.assert_close(value, expected[:, :, None].expand_as(value), rtol=1e-5, atol=1e-5)
    decoded = vae.decode(mean[:, :, None].expand(-1, -1, 2, -1, -1))
    expected = image_vae.decode(mean)
    assert decoded.shape == (1, 3, 5, 32, 40)
    assert (decoded - expected[:, :, None]).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))
