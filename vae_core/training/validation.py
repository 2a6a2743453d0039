"""How good the VAE is on clips that it is not trained on, while it is trained."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..door.loading import DEMO_FOLDER
from ..families import VIDEO
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
    is given; psnr_worst, of the worst clip; phase_spread, how far the four places in a group of frames lie apart in dB;
    latent_mean and latent_deviation; with the frozen image VAE also compatible_psnr: what it decodes from the
    latents, frame by frame, against the last frame of each group of four.
    """
    found: dict[str, list[Tensor]] = {}
    latents: list[Tensor] = []
    phases: list[Tensor] = []  # PSNR of the four frames of each group
    worst = math.inf
    rows: list[tuple[str, Tensor]] = []
    for number, clip in enumerate(clips, start=1):
        mean, logvar = coder.moments(clip.to(device))
        decoded = coder.decode(mean)[0].cpu()
        psnr, ssim = frame_quality(decoded, clip)
        shown = [(f"clip {number}", clip[0]), (f"decoded, {float(psnr.mean()):.1f} dB", decoded[0])]
        figures = {"psnr": psnr, "ssim": ssim, "kl": kl_divergence(mean, logvar)[None].cpu()}
        if lpips is not None:
            figures["lpips"] = lpips.frames(decoded, clip)
        if image_vae is not None:
            frames = decoded_frames(image_vae, mean).cpu()
            figures["compatible_psnr"] = frame_quality(frames, map_frames(clip, "slice"))[0]
            shown.append((f"by the image VAE, {float(figures['compatible_psnr'].mean()):.1f} dB", frames[0]))
        worst = min(worst, float(psnr.mean()))
        if len(psnr) > 1:
            phases.append(psnr[1:].unflatten(0, (-1, VIDEO.time)))
        for name, values in figures.items():
            found.setdefault(name, []).append(values)
        latents.append(mean.cpu().flatten())
        if len(rows) < SHOWN * len(shown):
            rows += shown
    values = {name: float(torch.cat(parts).mean()) for name, parts in found.items()}
    flat = torch.cat(latents)
    values["psnr_worst"] = worst
    if phases:
        of_places = torch.cat(phases).mean(0)
        values["phase_spread"] = float(of_places.max() - of_places.min())
    values |= {"latent_mean": float(flat.mean()), "latent_deviation": float(flat.std())}
    return Validation(
        figures={name: value for name, value in values.items() if math.isfinite(value)}, grid=sample_grid(rows)
    )
