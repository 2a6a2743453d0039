"""The output adapter of SVD: a small file that changes the last convolution of its U-Net and nothing else.

That convolution turns 320 features into the 4 channels of a latent with a 3x3 kernel, 11,524 numbers. The file holds
the difference to the weights of the checkpoint it was trained on, in float32, under names that LoRA loaders know.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import CheckpointError
from ..weights.tensors import read_tensors, write_tensors

LAYER = "diffusion_model.out.2"
FORMAT = "cviv-vae svd output adapter"
VERSION = "1"
OUTPUTS = 4  # channels of SVD's latents
_DIFFERENCE = (f"{LAYER}.diff", f"{LAYER}.diff_b")
_DIFFERENCES = (_DIFFERENCE, ("unet.conv_out.diff", "unet.conv_out.diff_b"))
_FULL = tuple(
    (f"{name}.weight", f"{name}.bias") for name in (LAYER, f"model.{LAYER}", "out.2", "conv_out", "unet.conv_out")
)
_LARGEST = 4 << 20  # bytes of an adapter file; a whole U-Net has gigabytes


@dataclass(frozen=True, kw_only=True)
class OutputLayer:
    """A 3x3 convolution, or the difference of two: weight (4, features, 3, 3) and bias (4,), float32 on the CPU."""

    weight: Tensor
    bias: Tensor

    def __add__(self, other: OutputLayer) -> OutputLayer:
        return OutputLayer(weight=self.weight + other.weight, bias=self.bias + other.bias)

    def __sub__(self, other: OutputLayer) -> OutputLayer:
        return OutputLayer(weight=self.weight - other.weight, bias=self.bias - other.bias)

    def times(self, strength: float) -> OutputLayer:
        """Both tensors times `strength`."""
        return OutputLayer(weight=self.weight * strength, bias=self.bias * strength)

    def run(self, features: Tensor) -> Tensor:
        """(t, features, h, w) to (t, 4, h, w), in float32 on the device of the features."""
        device = features.device
        return F.conv2d(features.float(), self.weight.to(device), self.bias.to(device), padding=1)


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What an adapter file holds. full: whether `layer` is the tuned layer itself rather than its difference."""

    layer: OutputLayer
    full: bool
    metadata: Mapping[str, str]

    def difference(self, old: OutputLayer) -> OutputLayer:
        """The difference to the layer `old` of the model. Raises CheckpointError where the widths differ."""
        ours, theirs = tuple(self.layer.weight.shape), tuple(old.weight.shape)
        if ours != theirs:
            raise CheckpointError(
                f"The adapter was made for an output layer of shape {ours} and the model has {theirs}: it belongs to "
                "another model. Use the checkpoint it was trained on, or train an adapter for this one."
            )
        return self.layer - old if self.full else self.layer


def output_layer(weight: Tensor, bias: Tensor) -> OutputLayer:
    """A layer of its own memory, float32 on the CPU. Raises CheckpointError for other shapes."""
    if weight.ndim != 4 or weight.shape[0] != OUTPUTS or weight.shape[2:] != (3, 3) or bias.shape != (OUTPUTS,):
        raise CheckpointError(
            f"The output layer has shapes {tuple(weight.shape)} and {tuple(bias.shape)}; that of SVD is ({OUTPUTS}, "
            f"features, 3, 3) and ({OUTPUTS},). Use a checkpoint or an adapter of SVD."
        )
    return OutputLayer(weight=_own(weight), bias=_own(bias))


def save_adapter(
    path: str | os.PathLike[str], difference: OutputLayer, metadata: Mapping[str, str] | None = None
) -> None:
    """Write `difference` as an adapter file, which appears under its name only when it is complete.

    metadata: more texts. Raises CheckpointError for a name that does not end in .safetensors or a
    folder that does not exist, OSError where the disk does not take it.
    """
    tensors = {str(_DIFFERENCE[0]): difference.weight, str(_DIFFERENCE[1]): difference.bias}
    texts = {**(metadata or {}), "format": FORMAT, "format_version": VERSION}
    write_tensors(Path(path), tensors, texts)


def read_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Read an adapter file: the difference, or the tuned layer itself under its names in ComfyUI or diffusers.

    Raises CheckpointError when it is none, is damaged, or holds values that are not finite.
    """
    path = Path(path)
    tensors, metadata = read_tensors(path, _LARGEST)
    for full, spellings in ((False, _DIFFERENCES), (True, _FULL)):
        for weight, bias in spellings:
            if tensors.keys() == {weight, bias}:
                try:
                    layer = output_layer(tensors[weight], tensors[bias])
                except CheckpointError as error:
                    raise CheckpointError(f"{path}: {error}") from error
                _check_finite(layer, path)
                return Adapter(layer=layer, full=full, metadata=metadata)
    names = ", ".join(sorted(tensors)[:3]) or "nothing"
    raise CheckpointError(
        f"{path}: is no output adapter of SVD: it holds {names}{' ...' if len(tensors) > 3 else ''}, and needed are "
        f"{_DIFFERENCE[0]} and {_DIFFERENCE[1]} alone. A LoRA belongs in a LoRA loader."
    )


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32).clone(memory_format=torch.contiguous_format)


def _check_finite(layer: OutputLayer, path: Path) -> None:
    if not (layer.weight.isfinite().all() and layer.bias.isfinite().all()):
        raise CheckpointError(f"{path}: holds values that are not finite: the file is damaged. Train or get it again.")
