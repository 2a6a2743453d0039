"""What travels on LATENT and IMAGE wires: layouts, pixel values, and the facts our latents carry about their video.

A LATENT is a dict whose `samples` are (b, z, t, h, w), or (b, z, h, w) where SD and SVD put the frames of a clip on the
batch axis. Ours also have the key `cviv`, a plain dict that stock nodes pass along.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from ...vae_core.families import FAMILIES, VIDEO, Compression
from .latent import FACTS, VideoLatent

Layout = Literal["frames", "video", "images"]
CHUNK = 16  # frames that go through the host at a time


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of the video behind a latent; None where it is not known.

    family: of the VAE that made it. fps: frames per second. frames, height, width: true length and size in frames and
    pixels, before any padding. aspect: width to height of a pixel. layout: how `samples` is laid out.
    """

    family: str | None = None
    fps: Fraction | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    aspect: Fraction | None = None
    layout: Layout | None = None

    @property
    def compression(self) -> Compression:
        """Of the VAE that made it; where that is not known, of a video VAE."""
        family = FAMILIES.get(self.family or "")
        return VIDEO if family is None else family.compression

    @property
    def own_space(self) -> bool:
        """Whether the latents are those of no sampler, since their VAE scales them itself."""
        family = FAMILIES.get(self.family or "")
        return family is not None and family.scaled

    @property
    def in_groups(self) -> bool:
        """Whether each latent stands for frames that build on those of the latents before it, without end."""
        family = FAMILIES.get(self.family or "")
        return family is not None and family.compression.time > 1 and family.latents.overlap == 0

    def decoded_by(self, family: str) -> Facts:
        """The facts as they are for a VAE of `family`: where it makes more or fewer frames of a latent than the one
        that made it, the clip lasts as long, and its true number of frames is not known."""
        if self.family is None or self.family not in FAMILIES:
            return self
        made, shown = self.compression.time, FAMILIES[family].compression.time
        return self if made == shown else replace(self, frames=None, fps=self.fps and self.fps * shown / made)

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width), or None where not known."""
        return None if self.height is None or self.width is None else (self.height, self.width)


class NotForSamplers(list[int]):
    """The `batch_index` of a latent that no sampler can use: whoever makes noise for it gets a sentence, not noise.

    It numbers the items of the batch, which ComfyUI's samplers turn into an array before they draw noise.
    """

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise ValueError(
            "This latent is of an IV-VAE, whose latent space is its own: no sampler of ComfyUI was trained on it, and "
            "the result would be noise or an error. Encode with a CV-VAE, or with the VAE of the sampler's model; "
            "latents of an IV-VAE are for Video VAE Decode."
        )


def samples_of(latent: Mapping[str, Any]) -> Tensor:
    """The tensor of a LATENT. Raises ValueError where there is none of rank 4 or 5."""
    samples = latent.get("samples") if isinstance(latent, Mapping) else None
    if not isinstance(samples, Tensor) or samples.is_nested:
        raise ValueError(
            f"The latent holds {type(samples).__name__} where one tensor is needed: connect the LATENT output of "
            "Video VAE Encode, of a sampler or of Load Video Latent."
        )
    if samples.ndim not in (4, 5) or 0 in samples.shape:
        raise ValueError(
            f"The latent has shape {tuple(samples.shape)}; allowed are (frames, channels, height, width) and (batch, "
            "channels, frames, height, width). A latent of another kind of model (audio, 3-D) cannot be used here."
        )
    return samples


def read_facts(latent: Mapping[str, Any]) -> Facts:
    """The facts of a LATENT; those that its tensor contradicts, after an upscale or a cut, are dropped."""
    raw = latent.get(FACTS)
    samples = samples_of(latent)
    if not isinstance(raw, Mapping):
        return Facts()
    layout = raw.get("layout") if raw.get("layout") in ("frames", "video", "images") else None
    if layout is not None and (samples.ndim == 5) != (layout == "video"):
        layout = None
    family = raw["family"] if isinstance(raw.get("family"), str) else None
    compression = Facts(family=family).compression
    count = samples.shape[2] if samples.ndim == 5 else samples.shape[0]
    frames = raw.get("frames")
    if not _whole(frames) or layout == "images" or compression.latent_frames(frames) != count:
        frames = None
    height, width = raw.get("height"), raw.get("width")
    cells = [compression.cells(side) if _whole(side) else None for side in (height, width)]
    if cells != list(samples.shape[-2:]):
        height = width = None
    return Facts(
        family=family,
        fps=_fraction(raw.get("fps")),
        frames=frames,
        height=height,
        width=width,
        aspect=_fraction(raw.get("aspect")),
        layout=layout,
    )


def make_latent(samples: Tensor, facts: Facts, layout: Layout, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A LATENT of `samples` with `facts`; other keys come from `base`."""
    told = {
        "family": facts.family,
        "fps": None if facts.fps is None else str(facts.fps),
        "frames": facts.frames,
        "height": facts.height,
        "width": facts.width,
        "aspect": None if facts.aspect in (None, 1) else str(facts.aspect),
        "layout": layout,
    }
    latent = VideoLatent(base or {})
    latent |= {"samples": samples, FACTS: {name: value for name, value in told.items() if value is not None}}
    if facts.own_space:
        latent["batch_index"] = NotForSamplers(range(samples.shape[0]))
    return latent


def to_video(samples: Tensor, layout: Layout, clips: int = 1) -> Tensor:
    """(b, z, t, h, w) of a 4-D or 5-D tensor; 4-D is `clips` clips, or separate images where `layout` says so."""
    if samples.ndim == 5:
        return samples
    if layout == "images":
        return samples.unsqueeze(2)  # b c 1 h w
    if samples.shape[0] % clips:
        raise ValueError(
            f"{samples.shape[0]} frames on the batch axis cannot be {clips} clips of one length: give a number of "
            "clips that divides them."
        )
    return rearrange(samples, "(b t) c h w -> b c t h w", b=clips)


def layout_of(samples: Tensor, facts: Facts, chosen: Layout | None) -> Layout:
    """How to take a LATENT's tensor: 5-D is a video; of 4-D the user's choice decides, then what the latent remembers.

    chosen: the layout that the user chose in Load Video VAE; None where he left it to us.
    """
    if samples.ndim == 5:
        return "video"
    if chosen in ("frames", "images"):
        return chosen
    return facts.layout or "frames"


def from_video(z: Tensor, layout: Layout) -> Tensor:
    """The tensor of a LATENT from (b, z, t, h, w): as it is, or with the frames on the batch axis."""
    return z if layout == "video" else rearrange(z, "b c t h w -> (b t) c h w")


def check_latent(samples: Tensor, facts: Facts, family: str, channels: int) -> None:
    """Raise ValueError, with the remedy, unless a VAE of `family` with `channels` can decode this latent."""
    if facts.family is not None and facts.family != family and not _may_share(facts.family, family):
        raise ValueError(
            f"This latent was made by {facts.family} and the VAE is {family}: their latent spaces differ, and decoding "
            "would give noise. Load the VAE that made the latent, or encode again with this one."
        )
    got = samples.shape[1]
    if got == channels:
        return
    swapped = (
        " Its frames seem to come before its channels." if samples.ndim == 5 and samples.shape[2] == channels else ""
    )
    raise ValueError(
        f"This latent has {got} channels and the VAE ({family}) takes {channels}.{swapped} Load the VAE that belongs "
        f"to the latent: {_who_makes(got)}."
    )


def pixels_of(images: Tensor) -> Tensor:
    """(n, h, w, 3) of an IMAGE: alpha is dropped, grey becomes three equal channels. Raises ValueError otherwise."""
    if images.ndim != 4 or 0 in images.shape or images.shape[-1] not in (1, 3, 4):
        raise ValueError(
            f"The images have shape {tuple(images.shape)}; needed is (frames, height, width, 3), at least one frame."
        )
    return images.expand(-1, -1, -1, 3) if images.shape[-1] == 1 else images[..., :3]


def chunks_of(images: Tensor, chunk: int = CHUNK) -> Iterator[Tensor]:
    """An IMAGE as (1, 3, t, h, w) chunks in [-1, 1], t up to `chunk`, so that no second copy of the clip is made."""
    for part in images.split(chunk):
        yield (rearrange(part.float(), "t h w c -> 1 c t h w") * 2 - 1).clamp_(-1, 1)


def images_of(chunk: Tensor) -> Tensor:
    """(b, t, h, w, 3) float32 in 0..1 of frames (b, 3, t, h, w) in [-1, 1]."""
    return rearrange(chunk, "b c t h w -> b t h w c").float().add(1).div_(2).clamp_(0, 1)


def image_of(picture: Image.Image) -> Tensor:
    """An RGB picture as IMAGE, (1, h, w, 3) in 0..1."""
    return torch.from_numpy(np.array(picture)).float().div(255).unsqueeze(0)


def rate_of(fps: float) -> Fraction | None:
    """Frames per second of a widget; None for its 0."""
    return Fraction(fps).limit_denominator(1001) if fps else None


def _may_share(one: str, other: str) -> bool:
    """Whether latents of one family may be in the space of another: of an image VAE, and of a video VAE made for it."""
    both = [FAMILIES[name] for name in (one, other) if name in FAMILIES]
    return len(both) == 2 and not any(f.scaled for f in both) and 1 in (f.compression.time for f in both)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _fraction(value: object) -> Fraction | None:
    try:
        fps = Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        return None
    return fps if fps > 0 else None


def _who_makes(channels: int) -> str:
    return {
        4: "cv-vae or an image VAE with z 4 for SD 1.5, SD 2.1 and SVD; an IV-VAE with z 4 for its own",
        8: "an IV-VAE with z 8 for its own",
        16: "cv-vae-sd3 or an image VAE with z 16 for SD3 and SD3.5 alone, an IV-VAE with z 16 for its own. Flux, Wan, "
        "Hunyuan Video, Qwen-Image and others have 16 channels, too, in latent spaces of their own: use the VAE of "
        "that model there, by ComfyUI's Load VAE and VAE Decode",
    }.get(channels, "no VAE of this pack makes such latents, so use the VAE of the model that sampled it")
