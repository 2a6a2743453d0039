"""How good the VAE is on clips that it is not trained on, while it is trained."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..door.loading import DEMO_FOLDER
from ..metrics import LPIPS, frame_quality
from .clips import BatchKind, ClipBatches
from .coders import Coder
from .config import ValidationConfig
from .frozen import ImageVAE
from .journal import sample_grid
from .losses import kl_divergence
from .regularization import decoded_frames, map_frames

DEMO_CLIP = "demo-clip"
SHOWN = 3  # clips in a sample grid


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The figures of one validation, and a picture (3, h, w) in [-1, 1] of some clips above what became of them."""

    figures: dict[str, float]
    grid: Tensor


def validation_clips(config: ValidationConfig, *, images: bool) -> list[Tensor]:
    """The same clips (1, 3, t, h, w) each time. Raises TrainingDataError where there are none."""
    kind = BatchKind(
        kind="image" if images else "video",
        batch=1,
        size=config.size,
        frames=1 if images else config.frames,
        short_side=config.short_side,
    )
    sources = [str(DEMO_FOLDER / "demo_clip.mp4") if source == DEMO_CLIP else source for source in config.sources]
    batches = ClipBatches(sources, [kind])
    try:
        return [batch.video for batch in itertools.islice(batches, config.clips)]
    finally:
        batches.close()


@torch.no_grad()
def gives_numbers(coder: Coder, clip: Tensor, device: torch.device) -> bool:
    """Whether a clip comes back finite."""
    mean, logvar = coder.moments(clip.to(device))
    return all(bool(torch.isfinite(x).all()) for x in (mean, logvar, *coder.decode(mean)))


@torch.no_grad()
def validate(
    coder: Coder, clips: list[Tensor], device: torch.device, image_vae: ImageVAE | None, lpips: LPIPS | None
) -> Validation:
    """Reconstruct each clip through the posterior mean, in the coder's precision.

    Figures: psnr (dB) and ssim, means over all frames; kl, summed over the latents of a clip; lpips where the network
    is given; latent_mean and latent_deviation; with the frozen image VAE also compatible_psnr: what it decodes from the
    latents, frame by frame, against the last frame of each group of four.
    """
    found: dict[str, list[Tensor]] = {}
    latents: list[Tensor] = []
    rows: list[Tensor] = []
    for clip in clips:
        mean, logvar = coder.moments(clip.to(device))
        decoded = coder.decode(mean)[0].cpu()
        shown = [clip[0], decoded[0]]
        psnr, ssim = frame_quality(decoded, clip)
        figures = {"psnr": psnr, "ssim": ssim, "kl": kl_divergence(mean, logvar)[None].cpu()}
        if lpips is not None:
            figures["lpips"] = lpips.frames(decoded, clip)
        if image_vae is not None:
            frames = decoded_frames(image_vae, mean).cpu()
            figures["compatible_psnr"] = frame_quality(frames, map_frames(clip, "slice"))[0]
            shown.append(frames[0])
        for name, values in figures.items():
            found.setdefault(name, []).append(values)
        latents.append(mean.cpu().flatten())
        if len(rows) < SHOWN * len(shown):
            rows += shown
    values = {name: float(torch.cat(parts).mean()) for name, parts in found.items()}
    flat = torch.cat(latents)
    values |= {"latent_mean": float(flat.mean()), "latent_deviation": float(flat.std())}
    return Validation(
        figures={name: value for name, value in values.items() if math.isfinite(value)}, grid=sample_grid(rows)
    )
