"""Training data: crops of photographs and of procedural images, and short clips made by moving a camera over them.

Everything drawn at random comes from a generator of the caller, so a seed gives the same data again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


class TrainingDataError(ValueError):
    """The images asked for cannot be trained on."""


def read_photographs(folder: Path, *, smallest: int = 96) -> list[Tensor]:
    """Every image of `folder` (uint8, (3, h, w)), and each again at half the size while it stays at least twice
    `smallest` on both sides. Raises TrainingDataError where nothing usable is found.
    """
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES) if folder.is_dir() else []
    images: list[Tensor] = []
    for path in paths:
        with Image.open(path) as image:
            x = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        while min(x.shape[1:]) >= smallest:
            images.append(x.contiguous())
            if min(x.shape[1:]) < 4 * smallest:
                break
            x = F.avg_pool2d(x[None].float(), 2)[0].round().to(torch.uint8)
    if not images:
        raise TrainingDataError(
            f"No image of at least {smallest} x {smallest} pixels in {folder}: put photographs there "
            f"({', '.join(SUFFIXES)}), or leave the folder out to train on procedural images alone."
        )
    return images


# ---------------------------------------------------------------------------------------------- procedural images


def _fractal_noise(size: int, rng: np.random.Generator, exponent: float) -> Floats:
    """Noise whose amplitude falls as 1 / f^exponent, mean 0 and deviation 1; (size, size)."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :])
    frequency[0, 0] = 1.0
    phases = rng.standard_normal((size, size // 2 + 1)) + 1j * rng.standard_normal((size, size // 2 + 1))
    noise = np.fft.irfft2(phases / frequency**exponent, (size, size))
    return ((noise - noise.mean()) / (noise.std() + 1e-6)).astype(np.float32)


def _palette(rng: np.random.Generator, photographs: Sequence[Tensor]) -> Floats:
    """32 colours in [0, 1]: pixels of one photograph, or pastel and dark ones where there is none."""
    if photographs and rng.random() < 0.8:
        pixels = photographs[int(rng.integers(len(photographs)))].flatten(1)
        picked = pixels[:, torch.from_numpy(rng.integers(pixels.shape[1], size=32))]
        return (picked.T.numpy() / 255).astype(np.float32)
    grey = rng.beta(1.0, 1.2, size=(32, 1))
    return np.clip(grey + rng.normal(0, 0.12, size=(32, 3)), 0, 1).astype(np.float32)


def _shape_mask(xs: Floats, ys: Floats, radius: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """A disc, an ellipse, a bar or a polygon of about `radius` around the origin."""
    angle = rng.uniform(0, math.pi)
    u = xs * math.cos(angle) + ys * math.sin(angle)
    v = ys * math.cos(angle) - xs * math.sin(angle)
    kind = rng.integers(4)
    if kind == 0:
        return u * u + v * v < radius * radius
    if kind == 1:
        return u * u + (v * rng.uniform(1.2, 4)) ** 2 < radius * radius
    if kind == 2:
        return (np.abs(u) < radius) & (np.abs(v) < max(radius * rng.uniform(0.03, 0.8), 0.7))
    corners = np.sort(rng.uniform(0, 2 * math.pi, size=int(rng.integers(3, 7))))
    distance = [u * math.cos(a) + v * math.sin(a) for a in corners]
    return (np.maximum.reduce(distance) < radius * 0.6) & (u * u + v * v < radius * radius)


def dead_leaves(size: int, rng: np.random.Generator, photographs: Sequence[Tensor] = ()) -> Tensor:
    """Opaque textured shapes that hide each other, with radii that fall as r^-3: edges and flats as in photographs.

    Drawn at twice the size and shrunk, so edges are smooth to a fraction of a pixel. Colours come from `photographs`
    where given. Returns uint8 (3, size, size).
    """
    big = 2 * size
    palette = _palette(rng, photographs)
    grain = np.stack([_fractal_noise(big, rng, exponent) for exponent in (0.5, 1.0, 1.6)])
    image: Floats = (palette[0] + 0.15 * grain[2][..., None]).astype(np.float32)
    smallest, largest = rng.uniform(3.0, 9.0), big * 0.35
    count = int(rng.integers(300, 1800))
    radii = (smallest**-2 - rng.random(count) * (smallest**-2 - largest**-2)) ** -0.5
    order = np.argsort(-radii + rng.normal(0, 0.3, count) * radii)  # mostly large ones at the back
    for radius in radii[order]:
        x, y = rng.uniform(-0.1 * big, 1.1 * big, size=2)
        left, top = max(int(x - radius) - 1, 0), max(int(y - radius) - 1, 0)
        right, bottom = min(int(x + radius) + 2, big), min(int(y + radius) + 2, big)
        if left >= right or top >= bottom:
            continue
        ys, xs = np.mgrid[top:bottom, left:right].astype(np.float32)
        mask = _shape_mask(xs - np.float32(x), ys - np.float32(y), float(radius), rng)
        colour = palette[rng.integers(len(palette))] + rng.normal(0, 0.03, 3)
        slope = rng.normal(0, 0.1, 2) / radius
        shade = (xs - x) * slope[0] + (ys - y) * slope[1]
        texture = rng.integers(4)
        if texture == 0:
            frequency, angle = rng.uniform(0.1, 1.2), rng.uniform(0, math.pi)
            shade = shade + rng.uniform(0.02, 0.2) * np.sin(
                frequency * (xs * math.cos(angle) + ys * math.sin(angle)) + rng.uniform(0, 6)
            )
        elif texture < 3:
            shade = shade + rng.uniform(0.01, 0.15) * grain[rng.integers(3), top:bottom, left:right]
        patch = (colour + shade[..., None]).astype(np.float32)
        image[top:bottom, left:right][mask] = patch[mask]
    image = image.reshape(size, 2, size, 2, 3).mean((1, 3), dtype=np.float32)
    return torch.from_numpy((image.clip(0, 1) * 255).round().astype(np.uint8)).permute(2, 0, 1).contiguous()


def strokes(size: int, rng: np.random.Generator, photographs: Sequence[Tensor] = ()) -> Tensor:
    """Rows of short thin strokes on a shaded ground, like small print; uint8 (3, size, size)."""
    big = 2 * size
    palette = _palette(rng, photographs)
    image: Floats = (palette[0] + 0.05 * _fractal_noise(big, rng, 1.5)[..., None]).astype(np.float32)
    ink = palette[1] if rng.random() < 0.5 else (1 - palette[0])
    height = int(rng.integers(10, 48))
    ys, xs = np.mgrid[0:height, 0:height].astype(np.float32)
    for top in range(2, big - height, int(height * 1.5)):
        for left in range(2, big - height, int(height * 0.9)):
            if rng.random() < 0.15:
                continue
            for _ in range(int(rng.integers(1, 4))):
                (x0, y0), (x1, y1) = rng.uniform(0.1, 0.9, size=(2, 2)) * height
                length = max(math.hypot(x1 - x0, y1 - y0), 1e-3)
                along = ((xs - x0) * (x1 - x0) + (ys - y0) * (y1 - y0)) / length
                across = np.abs((xs - x0) * (y1 - y0) - (ys - y0) * (x1 - x0)) / length
                mask = (across < height * 0.07 + 0.5) & (along > 0) & (along < length)
                image[top : top + height, left : left + height][mask] = ink
    image = image.reshape(size, 2, size, 2, 3).mean((1, 3), dtype=np.float32)
    return torch.from_numpy((image.clip(0, 1) * 255).round().astype(np.uint8)).permute(2, 0, 1).contiguous()


def procedural_images(count: int, size: int, seed: int, photographs: Sequence[Tensor] = ()) -> list[Tensor]:
    """`count` images, uint8 (3, size, size): mostly dead leaves, every sixth strokes; the same for the same seed."""
    rng = np.random.default_rng(seed)
    return [(strokes if i % 6 == 5 else dead_leaves)(size, rng, photographs) for i in range(count)]


# -------------------------------------------------------------------------------------------------- crops and clips


def _random(generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _below(generator: torch.Generator, end: int) -> int:
    return int(torch.randint(end, (), generator=generator))


class ImagePool:
    """Images to cut random crops and clips from: photographs with probability `photo_share`, else procedural ones."""

    def __init__(self, photographs: Sequence[Tensor], procedural: Sequence[Tensor], *, photo_share: float) -> None:
        if not photographs and not procedural:
            raise TrainingDataError("There is nothing to train on: give photographs, procedural images or both.")
        self.groups = [group for group in (photographs, procedural) if group]
        self.photo_share = photo_share if photographs else 1.0
        self.areas = [
            torch.tensor([math.sqrt(image.shape[1] * image.shape[2]) for image in group]) for group in self.groups
        ]

    def _image(self, generator: torch.Generator, smallest: int) -> Tensor:
        for _ in range(1000):
            group = 0 if len(self.groups) == 1 or _random(generator) < self.photo_share else 1
            picked = int(torch.multinomial(self.areas[group], 1, generator=generator))
            image = self.groups[group][picked]
            if min(image.shape[1:]) >= smallest:
                return image
        raise TrainingDataError(
            f"No image of the pool holds a square of {smallest} pixels: give larger images or train on smaller crops."
        )

    def _window(self, generator: torch.Generator, size: int) -> Tensor:
        image = self._image(generator, size)
        top, left = _below(generator, image.shape[1] - size + 1), _below(generator, image.shape[2] - size + 1)
        return image[:, top : top + size, left : left + size].float() / 127.5 - 1

    def _widest_window(self, generator: torch.Generator, sizes: Sequence[int]) -> Tensor:
        """A window of the first of `sizes` that the images allow."""
        for wanted in sizes[:-1]:
            try:
                return self._window(generator, wanted)
            except TrainingDataError:
                continue
        return self._window(generator, sizes[-1])

    def crops(self, batch: int, size: int, generator: torch.Generator) -> Tensor:
        """(batch, 3, size, size) in [-1, 1], randomly flipped, turned and recoloured."""
        return torch.stack(
            [_recolour(_turn(self._window(generator, size), generator), generator) for _ in range(batch)]
        )

    def clips(self, batch: int, frames: int, size: int, generator: torch.Generator) -> Tensor:
        """(batch, 3, frames, size, size) in [-1, 1]: camera moves over an image, often with a second layer on top."""
        return torch.stack([self._clip(frames, size, generator) for _ in range(batch)])

    def _clip(self, frames: int, size: int, generator: torch.Generator) -> Tensor:
        speed = 0.0 if _random(generator) < 0.2 else _random(generator) ** 2 * 4.0  # pixels a frame
        clip = self._moving(frames, size, speed, generator)
        if _random(generator) < 0.4:
            sprite = self._moving(frames, size, speed, generator)
            mask = _moving_ellipse(frames, size, 0.0 if speed == 0 else _random(generator, 0.0, 4.0), generator)
            clip = torch.lerp(clip, sprite, mask)
        return _recolour(_turn(clip, generator), generator).clamp(-1, 1)

    def _moving(self, frames: int, size: int, speed: float, generator: torch.Generator) -> Tensor:
        """(3, frames, size, size): a window of an image that drifts, turns and changes scale."""
        reach = speed * frames
        view = self._widest_window(generator, (math.ceil(1.5 * size + reach), math.ceil(1.5 * size), size))
        extent = view.shape[-1]
        if speed == 0:
            start = _below(generator, extent - size + 1)
            return view[:, None, start : start + size, start : start + size].expand(-1, frames, -1, -1).clone()
        steps = torch.linspace(-0.5, 0.5, frames)
        heading = _random(generator, 0, 2 * math.pi)
        turn = torch.tensor(_random(generator, -1, 1) * speed * 0.012 * frames) * steps
        scale = torch.exp(_random(generator, -1, 1) * speed * 0.008 * frames * steps) * _random(generator, 1.0, 1.25)
        shift = torch.stack((torch.full((frames,), math.cos(heading)), torch.full((frames,), math.sin(heading))), dim=1)
        shift = shift * (steps * reach)[:, None] * 2 / extent
        zoom = scale * size / extent
        rows = torch.stack(
            (
                torch.stack((zoom * turn.cos(), -zoom * turn.sin(), shift[:, 0]), dim=1),
                torch.stack((zoom * turn.sin(), zoom * turn.cos(), shift[:, 1]), dim=1),
            ),
            dim=1,
        )  # frames 2 3
        grid = F.affine_grid(rows, [frames, 3, size, size], align_corners=False)
        views = view.expand(frames, -1, -1, -1)
        moved = F.grid_sample(views, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
        return moved.transpose(0, 1)  # 3 t h w


def _moving_ellipse(frames: int, size: int, speed: float, generator: torch.Generator) -> Tensor:
    """(1, frames, size, size) in [0, 1]: an ellipse with soft edges on a straight course."""
    heading = _random(generator, 0, 2 * math.pi)
    steps = torch.linspace(-0.5, 0.5, frames) * frames * speed
    x = _random(generator, 0.2, 0.8) * size + steps * math.cos(heading)
    y = _random(generator, 0.2, 0.8) * size + steps * math.sin(heading)
    radius = _random(generator, 0.1, 0.4) * size
    squeeze = _random(generator, 0.6, 1.6)
    axis = torch.arange(size) + 0.5
    across = (axis[None, None, :] - x[:, None, None]) * squeeze
    down = (axis[None, :, None] - y[:, None, None]) / squeeze
    return (radius - torch.hypot(across, down) + 0.5).clamp(0, 1)[None]


def _turn(x: Tensor, generator: torch.Generator) -> Tensor:
    """One of the eight flips and quarter turns of the last two axes."""
    return torch.rot90(x.flip(-1) if _below(generator, 2) else x, _below(generator, 4), (-2, -1))


def _recolour(x: Tensor, generator: torch.Generator) -> Tensor:
    """Now and then another order of the colours, and a little brightness and contrast."""
    if _random(generator) < 0.15:
        x = x[torch.randperm(3, generator=generator)]
    if _random(generator) < 0.5:
        x = x * _random(generator, 0.7, 1.1) + _random(generator, -0.15, 0.15)
    return x.clamp(-1, 1)
