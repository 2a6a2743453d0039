"""What the bench of keyframe detail measures: made scenes, and stand-ins for a video decoder and an image decoder.

Clips are (1, 3, t, h, w) in [-1, 1], the same at every run.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from vae_core.detail.fusion import blur
from vae_core.families import VIDEO

TIME = VIDEO.time
SIDES = 144, 192
NOISE = 0.02  # of [-1, 1]: 2.5 levels of 255


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def texture(height: int, width: int, seed: int = 0) -> Tensor:
    """(3, height, width): coarse and fine, coloured, with sharp edges."""
    noise = torch.randn(3, height, width, generator=generator(seed))
    grey = torch.randn(1, height, width, generator=generator(seed + 100))
    picture = 0.35 * blur(grey, 0.7) + 1.2 * blur(grey, 2.5) + 3.0 * blur(grey, 9.0) + 0.8 * blur(noise, 3.0)
    edges = 0.35 * (blur(torch.randn(1, height, width, generator=generator(seed + 200)), 6.0) > 0).float()
    return (0.8 * picture + edges - 0.17).clamp(-1, 1)


def still(frames: int) -> Tensor:
    return texture(*SIDES)[:, None].expand(-1, frames, -1, -1)[None].clone()


def pan(frames: int, step: int, seed: int = 0) -> Tensor:
    """To the left by `step` pixels a frame."""
    height, width = SIDES
    wide = texture(height, width + step * frames, seed)
    return torch.stack([wide[:, :, step * t : step * t + width] for t in range(frames)], 1)[None]


def grid(turn: float, zoom: float, shift: Tensor | float = 0.0) -> Tensor:
    """Where a picture is read, (1, h, w, 2) for grid_sample: turned by radians, zoomed, moved by a shift in pixels."""
    height, width = SIDES
    y, x = torch.meshgrid(torch.arange(height) - height / 2, torch.arange(width) - width / 2, indexing="ij")
    cosine, sine = math.cos(turn) / zoom, math.sin(turn) / zoom
    places = torch.stack([cosine * x - sine * y, sine * x + cosine * y], -1) + shift
    return (places / torch.tensor([width / 2, height / 2]) / 1.5)[None]


def read(picture: Tensor, places: Tensor) -> Tensor:
    return F.grid_sample(picture[None], places, mode="bicubic", padding_mode="reflection", align_corners=False)[0]


def turning(frames: int) -> Tensor:
    """A slow turn and zoom, by parts of a pixel."""
    wide = texture(SIDES[0] * 3 // 2, SIDES[1] * 3 // 2)
    return torch.stack([read(wide, grid(0.012 * t, 1 + 0.008 * t)) for t in range(frames)], 1)[None].clamp(-1, 1)


def water(frames: int) -> Tensor:
    """Waves of many lengths, each at its own speed: light on the surface, and the bottom seen through it."""
    height, width = SIDES
    y, x = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    draw = torch.rand(40, 3, generator=generator(3))
    bottom = texture(height * 3 // 2, width * 3 // 2, 4)
    shown: list[Tensor] = []
    for t in range(frames):
        light, shift = torch.zeros(height, width), torch.zeros(height, width, 2)
        for along, length, phase in draw.tolist():
            angle, number = 2 * math.pi * along, 2 * math.pi / (4 * 8**length)  # waves of 4 to 32 pixels
            wave = math.cos(angle) * x * number + math.sin(angle) * y * number
            wave = wave - 2.0 * math.sqrt(number) * t + 2 * math.pi * phase
            light += wave.sin() / 40**0.5
            shift += torch.stack([math.cos(angle) * wave.cos(), math.sin(angle) * wave.cos()], -1) / number * 0.06
        shown.append(0.5 * read(bottom, grid(0.0, 1.0, shift)) + 0.5 * light)
    return torch.stack(shown, 1)[None].clamp(-1, 1)


def grain(frames: int) -> Tensor:
    """A still with noise that is new in every frame, as of a camera."""
    return (still(frames) + 0.04 * torch.randn(1, 3, frames, *SIDES, generator=generator(5))).clamp(-1, 1)


def cut(frames: int) -> Tensor:
    """Another picture from the middle of a group on."""
    at = frames // 2 + 1
    return torch.cat([pan(at, 1), pan(frames - at, 1, seed=7)], 2)


def crossing(frames: int) -> Tensor:
    """A disk that moves over a still: what it covers and uncovers has no motion."""
    ground, disk = still(frames), pan(frames, 0, seed=9)
    y, x = torch.meshgrid(torch.arange(SIDES[0]), torch.arange(SIDES[1]), indexing="ij")
    for t in range(frames):
        inside = (y - SIDES[0] / 2).square() + (x - 30 - 5 * t).square() < 35**2
        ground[0, :, t] = torch.where(inside, disk[0, :, t].roll(5 * t, -1), ground[0, :, t])
    return ground


def flash(frames: int) -> Tensor:
    """A slow pan whose light goes up and down."""
    light = 1 + 0.35 * torch.sin(torch.arange(float(frames)) * 1.3)
    return (pan(frames, 1) * light.view(-1, 1, 1)).clamp(-1, 1)


SCENES: dict[str, Callable[[int], Tensor]] = {
    "still": still,
    "slow pan": lambda frames: pan(frames, 1),
    "texture pan": lambda frames: pan(frames, 3),
    "fast pan": lambda frames: pan(frames, 20),
    "turning": turning,
    "water": water,
    "grain": grain,
    "cut": cut,
    "crossing": crossing,
    "flash": flash,
}


def each(clip: Tensor, deviations: list[float]) -> Tensor:
    """A clip whose frames are blurred by so many pixels, one after the other and again."""
    frames = clip[0].unbind(1)
    return torch.stack([blur(frame, deviations[t % len(deviations)]) for t, frame in enumerate(frames)], 1)[None]


def shown(source: Tensor, drawn: bool = False) -> Tensor:
    """A frame for each latent: frame 0 and the last of every four, or one of the four by chance."""
    back = torch.randint(0, TIME, (source.shape[2],), generator=generator(11)).tolist() if drawn else [0] * TIME
    return source[:, :, [0, *(k - back[k % len(back)] for k in range(TIME, source.shape[2], TIME))]]


def noisy(images: Tensor, strength: float = NOISE) -> Tensor:
    return (images + strength * torch.randn(images.shape, generator=generator(0))).clamp(-1, 1)


VIDEOS: dict[str, Callable[[Tensor], Tensor]] = {
    "soft": lambda source: each(source, [1.2]),
    "uneven": lambda source: each(source, [0.7, 1.3, 1.5, 1.0]),  # sharper at the end of every group
    "sharp": lambda source: source.clone(),
}


def means(source: Tensor) -> Tensor:
    groups = [source[:, :, k - TIME + 1 : k + 1].mean(2) for k in range(TIME, source.shape[2], TIME)]
    return torch.stack([source[:, :, 0], *groups], 2)


def invented(source: Tensor) -> Tensor:
    """Detail that is another in every keyframe: noise of the size of the source's own detail."""
    images = each(shown(source), [1.2])
    fine = torch.randn(images.shape, generator=generator(13))
    return (images + 0.12 * (fine - each(fine, [1.0]))).clamp(-1, 1)


KEYFRAMES: dict[str, Callable[[Tensor], Tensor]] = {
    "noisy": lambda source: noisy(each(shown(source), [0.5])),
    "drawn": lambda source: each(shown(source, drawn=True), [0.5]),
    "mean": means,
    "invented": invented,
    "other": lambda source: shown(source).flip(-2, -1),
    "softer": lambda source: each(shown(source), [0.8]),
}

PAIRS = (
    ("soft", "noisy"),
    ("soft", "drawn"),
    ("soft", "mean"),
    ("uneven", "noisy"),
    ("uneven", "mean"),
    ("soft", "invented"),
    ("soft", "other"),
    ("sharp", "softer"),
)
