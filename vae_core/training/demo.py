"""The demo weights: an image VAE, inflation, a short video stage, and the float16 file, in one command.

    python -m vae_core.training.demo --family cv-vae --photos FOLDER --out FOLDER --minutes 60

Stages: `image` writes image.safetensors, `video` inflates that, trains on clips and writes video.safetensors, `export`
writes the float16 file with the official names; `all` is all three, with half of the time for each of the first two.
Weights are written every minute, so a stopped run leaves usable ones.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..checkpoints import load, save
from ..codec import IV_FRAMES, VideoVAE
from ..cv_vae import CVVAE, CVVAEConfig
from ..iv_vae import IVVAE, IVVAEConfig
from ..memory import Memory
from ..windows import rechunk
from .data import ImagePool, procedural_images, read_photographs
from .image_vae import CVImageConfig, CVImageVAE, IVImageConfig, IVImageVAE
from .inflation import inflate_cv, inflate_iv
from .optimizer import Optimizers

logger = logging.getLogger("cviv_vae.training")

KL_WEIGHT = 1e-5  # on the mean over the latent volume, beside the mean squared error
LOGVAR_START = -6.0
PHOTO_SHARE = 0.7
SAVE_SECONDS = 60.0


class Family(str, Enum):
    CV = "cv-vae"
    IV = "iv-vae"


class Stage(str, Enum):
    IMAGE = "image"
    VIDEO = "video"
    EXPORT = "export"
    ALL = "all"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is trained, on what, for how long.

    minutes ends a stage by the clock; steps, where given, ends it by count instead (the same weights again on the same
    machine). lr is Muon's peak rate. crops are (side in pixels, frames, batch), one of them drawn evenly for each step:
    GroupNorm and attention see whole pictures, so weights trained on small squares alone are poor on large ones.
    """

    minutes: float
    steps: int | None
    lr: float
    crops: tuple[tuple[int, int, int], ...]
    seed: int

    def draw_crop(self, generator: torch.Generator) -> tuple[int, int, int]:
        """Side, frames and batch of the next step."""
        return self.crops[int(torch.randint(len(self.crops), (), generator=generator))]


CV_SIZE = CVImageConfig(widths=(32, 32, 64, 96), blocks_per_level=1, latent_channels=4)
IV_SIZE = IVImageConfig(dim=12, latent_channels=16, halves=2)


def image_model(family: Family) -> CVImageVAE | IVImageVAE:
    """The image VAE of a demo model, with fresh weights and a small posterior variance to begin with."""
    if family is Family.CV:
        model: CVImageVAE | IVImageVAE = CVImageVAE(CV_SIZE)
        bias = model.encoder.conv_out.bias
        logvar = [slice(CV_SIZE.latent_channels, None)]
    else:
        model = IVImageVAE(IV_SIZE)
        bias = model.to_moments.bias
        quarter = IV_SIZE.latent_channels // 2
        logvar = [slice(quarter, 2 * quarter), slice(3 * quarter, None)]
    assert bias is not None
    with torch.no_grad():
        for part in logvar:
            bias[part] = LOGVAR_START
    return model


def reconstruction_loss(
    pixels: Tensor, moments: tuple[Tensor, Tensor], decode: Callable[[Tensor], tuple[Tensor, ...]], noise: Tensor
) -> tuple[Tensor, float]:
    """Squared error of what a sample of the posterior decodes to, plus the KL term; and the squared error alone.

    Squared error because the figure that the demo weights are held to is PSNR. `noise` is standard normal, of the
    mean's shape.
    """
    mean, logvar = moments[0], moments[1].clamp(-30, 20)
    outputs = decode(mean + noise * (0.5 * logvar).exp())
    error = torch.stack([F.mse_loss(output, pixels) for output in outputs]).mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return error + KL_WEIGHT * kl, float(error.detach())


def _factor(done: float, step: int, warm_up: int) -> float:
    """Of the peak learning rate: linear warm-up by steps, then half a cosine over the stage, down to 1%."""
    return min(1.0, (step + 1) / warm_up) * max(0.01, 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


def fit(
    model: nn.Module,
    output_layer: str,
    loss: Callable[[], tuple[Tensor, float]],
    recipe: Recipe,
    save: Callable[[], None],
    log: Path,
    *,
    warm_up: int = 50,
) -> int:
    """Minimise `loss()`; call `save()` every minute and at the end; append progress to `log`. Returns the steps."""
    optimizers = Optimizers(model, lr=recipe.lr, output_layer=output_layer)
    started = saved = time.monotonic()
    step, errors = 0, list[float]()
    while True:
        seconds = time.monotonic() - started
        done = step / recipe.steps if recipe.steps is not None else seconds / (60 * recipe.minutes)
        if done >= 1:
            break
        value, error = loss()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step(_factor(done, step, warm_up))
        step += 1
        errors.append(error)
        if time.monotonic() - saved > SAVE_SECONDS:
            saved = time.monotonic()
            save()
            psnr = -10 * math.log10(sum(errors) / len(errors) / 4)
            line = {"step": step, "seconds": round(seconds), "training_psnr": round(psnr, 2), "lr_done": round(done, 3)}
            logger.info("%s", line)
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")
            errors.clear()
    save()
    return step


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file that appears under its name only when it is complete."""
    partial = path.with_suffix(".partial")
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, partial)
    os.replace(partial, path)


def image_stage(family: Family, pool: ImagePool, recipe: Recipe, out: Path, start: Path | None) -> int:
    """Train the image VAE from fresh weights, or from those of `start`; writes image.safetensors. Returns the steps."""
    generator = torch.Generator().manual_seed(recipe.seed)
    model = image_model(family)
    if start is not None:
        model.load_state_dict(load_file(start))
    # the narrow convolutions of IV-VAE run faster on the CPU with channels last, those of CV-VAE do not
    layout = torch.channels_last if family is Family.IV else torch.contiguous_format
    model = model.to(memory_format=layout)  # pyright: ignore[reportCallIssue]

    def loss() -> tuple[Tensor, float]:
        side, _, batch = recipe.draw_crop(generator)
        pixels = pool.crops(batch, side, generator).contiguous(memory_format=layout)
        moments = model.encode(pixels)
        return reconstruction_loss(pixels, moments, model.decode, _noise(moments[0], generator))

    def save() -> None:
        write_tensors(model.state_dict(), out / "image.safetensors")

    output_layer = "decoder.conv_out" if family is Family.CV else "conv_out"
    return fit(model, output_layer, loss, recipe, save, out / "image.jsonl")


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator)


# ------------------------------------------------------------------------------------------------------ video


def video_moments(model: CVVAE | IVVAE, video: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and logvar of a clip of at most 17 frames, (b, 3, 1 + 4n, h, w), with gradients; unscaled."""
    if isinstance(model, CVVAE):
        return model.encode(video)
    memory = Memory()
    pairs = [model.encode(group, memory) for group in rechunk([video], IV_FRAMES)]
    return torch.cat([mean for mean, _ in pairs], dim=2), torch.cat([logvar for _, logvar in pairs], dim=2)


def video_decode(model: CVVAE | IVVAE, latent: Tensor) -> Tensor:
    """Frames of an unscaled latent of at most 5 frames, with gradients."""
    if isinstance(model, CVVAE):
        return model.decode(latent)
    memory = Memory()
    return torch.cat([model.decode(frame, memory) for frame in latent.split(1, dim=2)], dim=2)


def inflate(family: Family, image: dict[str, Tensor]) -> VideoVAE:
    """The video VAE that the image weights of a demo model become, ready to be trained."""
    if family is Family.CV:
        config = CVVAEConfig(
            widths=CV_SIZE.widths,
            blocks_per_level=CV_SIZE.blocks_per_level,
            latent_channels=CV_SIZE.latent_channels,
            sd3=False,
        )
        return load(inflate_cv(image, config))
    iv_config = IVVAEConfig(
        dim=IV_SIZE.dim, latent_channels=IV_SIZE.latent_channels, scale_factor=1.0, shift_factor=0.0
    )
    return load(inflate_iv(image, iv_config))


def video_stage(family: Family, pool: ImagePool, recipe: Recipe, out: Path, start: Path | None) -> int:
    """Train the inflated image VAE, or the video VAE of `start`, on clips; writes video.safetensors. Returns the steps.

    Crops of one frame in the recipe are stills, so that the first frame of a video stays good.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    vae = load(start) if start is not None else inflate(family, load_file(out / "image.safetensors"))
    vae.model.train().requires_grad_(True)

    def loss() -> tuple[Tensor, float]:
        side, frames, batch = recipe.draw_crop(generator)
        video = (
            pool.crops(batch, side, generator)[:, :, None]
            if frames == 1
            else pool.clips(batch, frames, side, generator)
        )
        moments = video_moments(vae.model, video)
        noise = _noise(moments[0], generator)
        return reconstruction_loss(video, moments, lambda latent: (video_decode(vae.model, latent),), noise)

    def store() -> None:
        save(vae, out / "video.safetensors")

    return fit(vae.model, "decoder.conv_out", loss, recipe, store, out / "video.jsonl")


def export(family: Family, pool: ImagePool, out: Path, seed: int) -> Path:
    """Write the float16 file. IV-VAE's scale and shift make the latents of training clips mean 0 and deviation 1."""
    vae = load(out / "video.safetensors")
    if family is Family.IV:
        clips = pool.clips(16, 5, 64, torch.Generator().manual_seed(seed))
        mean, _ = vae.moments(clips)
        scale, shift = round(1 / float(mean.std()), 4), round(float(mean.mean()), 4)
        vae = load(out / "video.safetensors", scale_factor=scale, shift_factor=shift)
    path = out / f"demo_{family.value.replace('-', '_')}.safetensors"
    save(vae, path, dtype=torch.float16)
    return path


# ------------------------------------------------------------------------------------------------------ command

IMAGE_CROPS = {Family.CV: "64x1x6,128x1x2,256x1x1", Family.IV: "64x1x4"}
VIDEO_CROPS = {
    Family.CV: "64x9x1,128x5x1,128x1x2,256x1x1",
    Family.IV: "64x9x1,64x5x1,64x1x4,128x1x1",
}


def parse_crops(text: str) -> tuple[tuple[int, int, int], ...]:
    """ "64x1x6,64x9x1" to ((64, 1, 6), (64, 9, 1)): side, frames, batch. Raises ValueError for anything else."""
    crops: list[tuple[int, int, int]] = []
    for part in text.split(","):
        numbers = re.fullmatch(r"(\d+)x(\d+)x(\d+)", part.strip())
        side, frames, batch = (int(number) for number in numbers.groups()) if numbers else (0, 0, 0)
        if side < 8 or side % 8 or frames not in (1, 5, 9, 13, 17) or batch < 1:
            raise ValueError(
                "Crops are given as side x frames x batch, sides multiples of 8 and frames 1, 5, 9, 13 or 17, such as "
                f"64x1x6,64x9x1; got {part.strip()!r}."
            )
        crops.append((side, frames, batch))
    return tuple(crops)


def main(
    family: Annotated[Family, typer.Option(help="Which demo model.")],
    out: Annotated[Path, typer.Option(help="Folder for weights and logs.")],
    stage: Annotated[Stage, typer.Option(help="What to run.")] = Stage.ALL,
    photos: Annotated[
        Path | None, typer.Option(help="Folder of photographs; without it only procedural images.")
    ] = None,
    procedural: Annotated[int, typer.Option(help="How many procedural images to draw.")] = 200,
    start: Annotated[Path | None, typer.Option(help="Weights of the same stage to start from.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything drawn at random.")] = 0,
    minutes: Annotated[float, typer.Option(help="Time for the stage; for `all`, for both together.")] = 60.0,
    steps: Annotated[int | None, typer.Option(help="End a stage after so many steps instead.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; 0.01 for images, 0.003 for video.")] = None,
    crops: Annotated[str | None, typer.Option(help="Side x frames x batch, one drawn for each step.")] = None,
    threads: Annotated[int, typer.Option()] = 1,
) -> None:
    """Train a demo model."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    photographs = read_photographs(photos) if photos is not None else []
    pool = ImagePool(photographs, procedural_images(procedural, 192, seed, photographs), photo_share=PHOTO_SHARE)
    share = 0.5 if stage is Stage.ALL else 1.0

    def recipe(default_crops: str, default_lr: float) -> Recipe:
        return Recipe(
            minutes=minutes * share,
            steps=steps,
            lr=lr or default_lr,
            crops=parse_crops(crops or default_crops),
            seed=seed,
        )

    if stage in (Stage.IMAGE, Stage.ALL):
        done = image_stage(family, pool, recipe(IMAGE_CROPS[family], 0.01), out, start)
        logger.info("image stage: %d steps", done)
    if stage in (Stage.VIDEO, Stage.ALL):
        begin = start if stage is Stage.VIDEO else None
        done = video_stage(family, pool, recipe(VIDEO_CROPS[family], 0.003), out, begin)
        logger.info("video stage: %d steps", done)
    if stage is not Stage.IMAGE:
        logger.info("wrote %s", export(family, pool, out, seed))


if __name__ == "__main__":
    typer.run(main)
