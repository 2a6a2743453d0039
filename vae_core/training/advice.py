"""What a config says without effect: nothing in a run tells of it, so it is said before."""

from __future__ import annotations

from collections.abc import Iterator

from ..families import FAMILIES
from .config import ModelConfig, TrainConfig


def advice(config: TrainConfig) -> list[str]:
    """One sentence for everything that will not do what it seems to."""
    return [*_schedule(config), *_model(config.model), *_data(config)]


def _schedule(config: TrainConfig) -> Iterator[str]:
    steps = config.run.steps
    if steps == 0:
        return
    warm_up = config.optimizer.warm_up
    if warm_up >= steps:
        yield (
            f"optimizer.warm_up is {warm_up} and run.steps {steps}: the learning rate stays below "
            f"{100 * steps / warm_up:.1f}% of what optimizer.learning_rate says. Make warm_up smaller."
        )
    if config.discriminator is not None and config.discriminator.start >= steps:
        yield (
            f"discriminator.start is {config.discriminator.start} and run.steps {steps}: there will be no adversarial "
            "loss. Make start smaller, or leave the table out."
        )
    if config.validation is not None and config.validation.every > steps:
        yield (
            f"validation.every is {config.validation.every} and run.steps {steps}: there is a validation at the "
            "beginning and at the end alone."
        )


def _model(model: ModelConfig) -> Iterator[str]:
    sizes = ("widths", "blocks_per_level", "latent_channels", "dim", "halves")
    given = [name for name in sizes if getattr(model, name) is not None]
    own = ("dim", "latent_channels", "halves") if model.family == "iv-vae" else sizes[:3]
    for name in given:
        if model.init != "fresh":
            yield f"model.{name} is not looked at: the weights say their size."
        elif name not in own:
            yield f"model.{name} is not looked at: {model.family} has none."
    if not FAMILIES[model.family].scaled:
        for name in ("scale_factor", "shift_factor"):
            if getattr(model, name) is not None:
                yield f"model.{name} is not looked at: {model.family} has none."
    if model.init == "fresh" and model.weights:
        yield "model.weights are not looked at, since model.init is 'fresh'."


def _data(config: TrainConfig) -> Iterator[str]:
    if config.data.camera_moves is not None and config.data.workers:
        yield "data.workers is not looked at: camera_moves are made in the training process."
    for number, kind in enumerate(config.data.batches, start=1):
        if kind.kind == "image" and kind.stride != (1, 1):
            yield f"[[data.batches]] number {number}: stride is not looked at, since images have one frame."
    if config.loss.lpips is not None and config.loss.lpips_weight == 0:
        yield "loss.lpips is not looked at, since loss.lpips_weight is 0."
