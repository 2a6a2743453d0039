"""A training of SVD's output layer, whoever runs the U-Net: its clips, steps, comparison and report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import AdapterError
from .adapter import OutputLayer
from .scenes import MOTION, buckets_of
from .trainer import AUGMENTATION, SIGMA, AdapterTrainer, Draw, draw

CHECKPOINT_EVERY = 100  # steps
HELD_OUT = 8  # passes that compare the layer before and after
AHEAD = 50  # images that are encoded at once, so that the image VAE and the U-Net seldom take turns in memory
_HELD_SHARE, _MOST_HELD = 8, 8  # one in eight clips is held out, and no more than eight


@dataclass(frozen=True, kw_only=True)
class TrainingClip:
    """A clip as SVD is trained on it; tensors are on the CPU.

    x0: (t, 4, h, w) in the model's scale. first: its first frame (1, h, w, 3) in 0..1, in float16. seen: CLIP's
    embedding of that frame (1, 1, d). rate: latents per second, as SVD is told. motion: mean length of the optical flow
    in shares of the shorter side per second, None where it is not known. bucket: the motion bucket, as SVD is told.
    """

    name: str
    x0: Tensor
    first: Tensor
    seen: Tensor
    rate: int
    motion: float | None
    bucket: int = MOTION


def with_buckets(clips: Sequence[TrainingClip]) -> list[TrainingClip]:
    """The clips with motion buckets by how much they move, compared to each other."""
    buckets = buckets_of([clip.motion for clip in clips])
    return [replace(clip, bucket=bucket) for clip, bucket in zip(clips, buckets, strict=True)]


Features = Callable[[TrainingClip, Draw, Tensor], tuple[Tensor, Tensor]]
"""What enters the output layer (t, features, h, w) of a clip with an image latent (1, 4, h, w), unscaled, and what the
layer should give (t, 4, h, w)."""

Encode = Callable[[Tensor], Tensor]
"""A picture (1, h, w, 3) around 0..1 to its latent (1, 4, h, w), unscaled, on the CPU."""


class Training:
    """Steps of `trainer` over `clips`, of which the last ones are held out where there are several."""

    def __init__(
        self, trainer: AdapterTrainer, clips: Sequence[TrainingClip], features: Features, encode: Encode
    ) -> None:
        self.trainer, self.first = trainer, trainer.steps
        held = min(_MOST_HELD, max(1, len(clips) // _HELD_SHARE)) if len(clips) > 1 else 0
        self.held, self._clips = clips[len(clips) - held :] or clips, clips[: len(clips) - held]
        self._count, self._features, self._encode = len(clips), features, encode

    def steps(self, stop: int) -> Iterator[float]:
        """The loss of each step, before its update, until `stop` steps are done in all."""
        while self.trainer.steps < stop:
            steps = range(self.trainer.steps, min(stop, self.trainer.steps + AHEAD))
            for clip, drawn, image in self._with_images([self._draw(step) for step in steps]):
                yield self.trainer.step(*self._features(clip, drawn, image))

    def compare(self, tuned: OutputLayer, done: Callable[[], None]) -> tuple[float, float]:
        """Loss of the old and the tuned layer on the held-out clips, at noise levels spread over the training's.

        done: called after each of HELD_OUT passes.
        """
        draws: list[tuple[TrainingClip, Draw]] = []
        for index in range(HELD_OUT):
            clip = self.held[index % len(self.held)]
            quantile = math.sqrt(2) * float(torch.erfinv(torch.tensor(2 * (index + 0.5) / HELD_OUT - 1)))
            drawn = Draw(
                clip=0,
                sigma=math.exp(SIGMA[0] + SIGMA[1] * quantile),
                noise=torch.randn(clip.x0.shape, generator=torch.Generator().manual_seed(2**40 + index)),
                dropped=False,
                level=math.exp(AUGMENTATION[0]),
                image_seed=2**41 + index,
            )
            draws.append((clip, drawn))
        sums = [0.0, 0.0]
        for clip, drawn, image in self._with_images(draws):
            features, target = self._features(clip, drawn, image)
            for number, layer in enumerate((self.trainer.old, tuned)):
                for frame, wanted in zip(features.split(1), target.split(1), strict=True):
                    error = (layer.run(frame) - wanted).square().sum()
                    sums[number] += float(error) / target.numel() / HELD_OUT
            done()
        return sums[0], sums[1]

    def check(self, before: float, after: float, state: str) -> None:
        """Raise AdapterError for a layer that is not worth keeping. state: where the training is kept."""
        if after <= before:
            return
        settings = self.trainer.settings
        what = "a larger ridge" if settings.method == "ridge regression" else "a smaller learning rate"
        raise AdapterError(
            f"The loss on {self._held_words()} rose from {before:.4g} to {after:.4g}, so that the adapter would harm, "
            f"and it is not saved. Use more clips, {what} or more steps. The training is kept in {state}."
        )

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
        clips = [*self._clips, *self.held]
        buckets = [clip.bucket for clip in clips]
        lines = [
            f"{self._count} clips, {len(self.held)} of them held out of the training"
            if self._count > 1
            else "one clip, so the held-out loss is of the same clip with other noise: use more clips",
            f"motion buckets {min(buckets)} to {max(buckets)} by optical flow, {MOTION} for the clip in the middle"
            if any(clip.motion is not None for clip in clips)
            else f"motion bucket {MOTION} for all, since opencv-python-headless, which measures motion, is missing",
            f"{settings.method}, {self.trainer.steps} steps in all, {done} now"
            + (f", from step {self.first} on" if self.first else ""),
            f"held-out loss {before:.4g} before, {after:.4g} after",
            f"{seconds:.0f} s with the comparison" + (f", {seconds / done:.2f} s a step" if done else ""),
            places,
            *notes,
        ]
        if after == before:
            lines.append("the loss did not fall: use more clips or steps, or a smaller ridge")
        lines.append("the loss says little of how a video looks: compare with strength 0 by eye")
        return lines

    def _draw(self, step: int) -> tuple[TrainingClip, Draw]:
        drawn = draw(self.trainer.settings.seed, step, [tuple(clip.x0.shape) for clip in self._clips])
        return self._clips[drawn.clip], drawn

    def _with_images(self, draws: Sequence[tuple[TrainingClip, Draw]]) -> list[tuple[TrainingClip, Draw, Tensor]]:
        return [(clip, drawn, self._encode(drawn.on_picture(clip.first.float()))) for clip, drawn in draws]

    def _held_words(self) -> str:
        if self._count == 1:
            return "the one clip, with other noise,"
        return "the clip held out" if len(self.held) == 1 else f"the {len(self.held)} clips held out"
