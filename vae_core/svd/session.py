"""A training of SVD's output layer, whoever runs the U-Net: its clips, steps, comparison and report."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .adapter import OutputLayer
from .trainer import AUGMENTATION, SIGMA, AdapterTrainer, Draw, draw

MOTION = 127  # the motion bucket that SVD is told
CHECKPOINT_EVERY = 100  # steps
HELD_OUT = 8  # passes that compare the layer before and after


@dataclass(frozen=True, kw_only=True)
class TrainingClip:
    """A clip as SVD is trained on it; tensors are on the CPU.

    x0: (t, 4, h, w) in the model's scale. image: its first frame as latent (1, 4, h, w), unscaled. seen: CLIP's
    embedding of that frame (1, 1, d). rate: latents per second, as SVD is told. augmentation: of the image.
    """

    name: str
    x0: Tensor
    image: Tensor
    seen: Tensor
    rate: int
    augmentation: float


Features = Callable[[TrainingClip, Draw], tuple[Tensor, Tensor]]
"""What enters the output layer (t, features, h, w), and what the layer should give (t, 4, h, w)."""


def augmented(first: Tensor, seed: int, number: int) -> tuple[float, Tensor]:
    """(level, first + level * noise) for the first frame of clip `number`, values 0 to 1, as SVD is shown it."""
    generator = torch.Generator().manual_seed((seed * 65_537 + number) % 2**63)
    level = math.exp(AUGMENTATION[0] + AUGMENTATION[1] * float(torch.randn(1, generator=generator)))
    return level, first + level * torch.randn(first.shape, generator=generator)


class Training:
    """Steps of `trainer` over `clips`, of which the last is held out where there are several."""

    def __init__(self, trainer: AdapterTrainer, clips: Sequence[TrainingClip], features: Features) -> None:
        self.trainer, self.first = trainer, trainer.steps
        self.held, self._clips = clips[-1], clips[:-1] or clips
        self._count, self._features = len(clips), features

    def step(self) -> float:
        """One step; its loss, before the update."""
        drawn = draw(self.trainer.settings.seed, self.trainer.steps, [tuple(clip.x0.shape) for clip in self._clips])
        return self.trainer.step(*self._features(self._clips[drawn.clip], drawn))

    def compare(self, tuned: OutputLayer, done: Callable[[], None]) -> tuple[float, float]:
        """Loss of the old and the tuned layer on the held-out clip, at noise levels spread over the training's.

        done: called after each of HELD_OUT passes.
        """
        sums = [0.0, 0.0]
        for index in range(HELD_OUT):
            quantile = math.sqrt(2) * float(torch.erfinv(torch.tensor(2 * (index + 0.5) / HELD_OUT - 1)))
            noise = torch.randn(self.held.x0.shape, generator=torch.Generator().manual_seed(2**40 + index))
            drawn = Draw(clip=0, sigma=math.exp(SIGMA[0] + SIGMA[1] * quantile), noise=noise, dropped=False)
            features, target = self._features(self.held, drawn)
            for number, layer in enumerate((self.trainer.old, tuned)):
                for part, wanted in zip(features.split(1), target.split(1), strict=True):
                    error = (layer.run(part) - wanted).square().sum()
                    sums[number] += float(error) / target.numel() / HELD_OUT
            done()
        return sums[0], sums[1]

    def texts(self, before: float, after: float) -> dict[str, str]:
        """What the adapter file says of its making."""
        settings = self.trainer.settings
        return {
            "method": settings.method,
            "steps": str(self.trainer.steps),
            "learning_rate": repr(settings.learning_rate),
            "ridge": repr(settings.ridge),
            "seed": str(settings.seed),
            "clips": str(self._count),
            "held_out_loss_before": repr(before),
            "held_out_loss_after": repr(after),
        }

    def title(self, name: str, before: float, after: float) -> str:
        """Of the loss curve."""
        return f"{name}: {self.trainer.settings.method}, held-out loss {before:.4g} to {after:.4g}"

    def report(self, before: float, after: float, seconds: float, places: str, notes: Sequence[str]) -> list[str]:
        """What was done and what came of it, in lines. places: where the files are."""
        settings, done = self.trainer.settings, self.trainer.steps - self.first
        lines = [
            f"{self._count} clips, the last one held out of the training"
            if self._count > 1
            else "one clip, so the held-out loss is of the same clip with other noise: use more clips",
            f"{settings.method}, {self.trainer.steps} steps in all, {done} now"
            + (f", from step {self.first} on" if self.first else ""),
            f"held-out loss {before:.4g} before, {after:.4g} after",
            f"{seconds:.0f} s with the comparison" + (f", {seconds / done:.2f} s a step" if done else ""),
            places,
            *notes,
        ]
        if after >= before:
            lines.append("the loss did not fall: use more clips or steps, another learning rate or a larger ridge")
        lines.append("the loss says little of how a video looks: compare with strength 0 by eye")
        return lines
