"""What goes into a VAE, checked: errors say what was got, what is allowed and what to do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ..families import Compression, Family
from ..run.windows import check_whole


def check_clip(x: Tensor, family: str, channels: int, what: str, values: str) -> None:
    """Raise ValueError unless `x` is a floating-point (b, channels, t, h, w) without empty dimensions but t."""
    layout = f"(batch, {channels}, frames, height, width)"
    if not isinstance(x, Tensor):  # type: ignore[reportUnnecessaryIsInstance]
        raise ValueError(
            f"The {what} is a {type(x).__name__}; {family} needs a tensor {layout}: torch.as_tensor makes one."
        )
    if x.ndim != 5 or x.shape[1] != channels or 0 in (x.shape[0], *x.shape[3:]):
        raise ValueError(
            f"The {what} has shape {tuple(x.shape)}; {family} needs {layout}, none of them 0 but frames in a stream."
            f"{_shape_hint(x, channels)}"
        )
    if not x.is_floating_point():
        raise ValueError(
            f"The {what} has dtype {x.dtype}; needed are floating-point {values}. For 8-bit pixels: "
            "video.float() / 127.5 - 1."
        )


def checked(clips: Iterable[Tensor], family: str, channels: int, what: str, values: str) -> Iterator[Tensor]:
    """Pass clips on, each checked alone and against the first."""
    first: tuple[int, ...] | None = None
    for clip in clips:
        check_clip(clip, family, channels, what, values)
        shape = tuple(clip.shape)
        first = first or shape
        if (shape[:2], shape[3:]) != (first[:2], first[3:]):
            raise ValueError(
                f"A chunk of the {what} stream has shape {shape}, the first had {first}; only the number of frames "
                "may change from chunk to chunk."
            )
        yield clip


def _shape_hint(x: Tensor, channels: int) -> str:
    """What to do about a common mistake, as a sentence to append."""
    if x.ndim == 4 and x.shape[1] == channels:
        return " A batch of frames (frames, channels, height, width) becomes one clip by x.movedim(0, 1)[None]."
    if x.ndim == 5 and x.shape[1] != channels and x.shape[2] == channels:
        return " Channels seem to come after frames: x.transpose(1, 2) swaps them."
    if x.ndim == 5 and x.shape[1] != channels and x.shape[1] in (4, 8, 16, 32):
        return f" A latent with {x.shape[1]} channels is of another VAE: load the one that made it."
    return ""


def check_start(start: int) -> None:
    """Raise ValueError for what is no number of a frame."""
    if type(start) is not int or start < 0:
        raise ValueError(f"start={start} was asked for; frames are counted from 0: give 0 or more.")


def check_frames(frames: int | None, latents: int, compression: Compression) -> int:
    """How many frames come out of so many latents; raises ValueError where others are asked for."""
    available = compression.pixel_frames(latents)
    if frames is not None and not 1 <= frames <= available:
        raise ValueError(
            f"frames={frames} was asked for, but {latents} latents decode to {available} frames; give a number from 1 "
            f"to {available}, or leave it out."
        )
    return available if frames is None else frames


def size_checked(chunk: Tensor, size: tuple[int, int] | None, space: int) -> Tensor:
    """The chunk of latents, if it decodes to `size`; raises ValueError otherwise."""
    if size is None:
        return chunk
    full = [space * n for n in chunk.shape[-2:]]
    if not all(n - space < given <= n for given, n in zip(size, full, strict=True)):
        raise ValueError(
            f"size={tuple(size)} was asked for, but the latents decode to {full[0]}x{full[1]} (height x width); "
            f"padding adds fewer than {space} pixels, so allowed are heights {full[0] - space + 1} to {full[0]} and "
            f"widths {full[1] - space + 1} to {full[1]}."
        )
    return chunk


def runs_on(device: torch.device) -> str:
    """Where weights that lie on `device` will run, as far as one can tell: in RAM they may wait for a GPU."""
    if device.type != "cpu":
        return str(device)
    places = {"cuda": torch.cuda, "xpu": torch.xpu, "mps": torch.backends.mps}
    return next((name for name, place in places.items() if place.is_available()), "cpu")


def draw(mean: Tensor, logvar: Tensor, generator: torch.Generator | None, clamp: tuple[float, float] | None) -> Tensor:
    """A draw from the posterior. clamp: of logvar."""
    device = mean.device if generator is None else generator.device
    noise = torch.randn(mean.shape, generator=generator, device=device, dtype=mean.dtype).to(mean.device)
    return mean + torch.exp(0.5 * (logvar if clamp is None else logvar.clamp(*clamp))) * noise


def check_video(video: Tensor, family: Family, *, pad: bool) -> None:
    """Raise ValueError for what is no clip of pixels or, without `pad`, has another length or size than fits."""
    check_clip(video, family.id, 3, "video", "frames in [-1, 1]")
    if video.shape[2] == 0:
        raise ValueError("The video has no frames; give at least one.")
    if not pad:
        frames, height, width = video.shape[2:]
        check_whole(frames, height, width, family.compression)
