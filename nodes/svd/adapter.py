"""Apply SVD Output Adapter: the tuned last convolution of SVD, with a strength."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import folder_paths
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io
from torch import Tensor

from ...vae_core.svd import LAYER, OutputLayer, output_layer, read_adapter
from ..bridge.schema import before_run, describe, field, stamp
from .model import check_svd

FOLDER = "loras"
_KIND, _KEY = WrappersMP.DIFFUSION_MODEL, "cviv_svd_adapter"
_WEIGHT, _BIAS = f"{LAYER}.weight", f"{LAYER}.bias"
_LARGEST = 1 << 20  # bytes; larger files of models/loras are LoRAs and not listed


class AddedOutput:
    """Adds what `difference` makes of the features to what the output layer makes of them, in float32.

    The weights of the model stay as they are, so that no number format rounds the difference away. The hook lives as
    long as a call of the network: replacing the layer instead would leave ComfyUI's marks of loaded weights on the
    one taken out, and a LoRA on it would then be skipped.
    """

    def __init__(self, difference: OutputLayer) -> None:
        self.difference = difference

    def __call__(self, executor: Any, *args: Any, **keywords: Any) -> Any:
        handle = executor.class_obj.out[2].register_forward_hook(self._add)
        try:
            return executor(*args, **keywords)
        finally:
            handle.remove()

    def _add(self, layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output.float() + self.difference.run(inputs[0])


class ApplySVDAdapter(io.ComfyNode):
    """An SVD model with another output layer."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="CVIV_ApplySVDAdapter",
            display_name="Apply SVD Output Adapter",
            description="Gives SVD a tuned output layer, from a file of about 46 KB that Train SVD Output Adapter "
            "made. The model that came in stays as it was.",
            search_aliases=["svd adapter", "svd lora", "cv-vae svd", "output convolution"],
            inputs=[
                field(io.Model, "model", tooltip="An SVD model, from Image Only Checkpoint Loader."),
                field(
                    io.Combo,
                    "adapter",
                    options=listed(),
                    tooltip="Small .safetensors files of models/loras: those of Train SVD Output Adapter, and tuned "
                    "output layers of other programs (conv_out of diffusers).",
                ),
                field(
                    io.Float,
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="How much of the difference is added. 0 = the model as it was, 1 = as trained.",
                ),
                field(
                    io.Boolean,
                    "precise",
                    default=True,
                    tooltip="Add the difference in float32. Off: the weights are rounded to the model's format, where "
                    "fp16 and bf16 lose most of a small difference, as a LoRA loader does.",
                    advanced=True,
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="For the sampler or SVD Long Video.")],
        )

    @classmethod
    def validate_inputs(cls, adapter: str | None = None) -> bool | str:
        return before_run((adapter_path, adapter))

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> Any:
        return stamp(adapter_path, inputs.get("adapter"))

    @classmethod
    def execute(cls, model: Any, adapter: str, strength: float, precise: bool) -> io.NodeOutput:
        check_svd(model)
        found = read_adapter(adapter_path(adapter))
        difference = found.difference(checkpoint_layer(model)).times(strength)
        patched = model.clone()
        if strength == 0:
            return io.NodeOutput(patched)
        if precise:
            for before in added_outputs(model):
                difference = before.difference + difference
            patched.remove_wrappers_with_key(_KIND, _KEY)
            patched.add_wrapper_with_key(_KIND, _KEY, AddedOutput(difference))
        else:
            patches = {_WEIGHT: ("diff", (difference.weight,)), _BIAS: ("diff", (difference.bias,))}
            taken = patched.add_patches(patches)
            assert len(taken) == len(patches)
        return io.NodeOutput(patched)


def listed() -> list[str]:
    """Files of models/loras that are small enough."""
    try:
        names = folder_paths.get_filename_list(FOLDER)
    except OSError:  # the folder was removed while ComfyUI runs
        return []
    return [name for name in names if name.lower().endswith(".safetensors") and _size(name) <= _LARGEST]


def adapter_path(name: str) -> Path:
    """The file behind an entry of the list. Raises ValueError where there is none."""
    if not isinstance(name, str) or ".." in name.replace("\\", "/").split("/") or os.path.isabs(name):
        raise ValueError(f"The adapter is {str(name)[:200]!r}: choose a file of the list, which lies in models/loras.")
    found = folder_paths.get_full_path(FOLDER, name)
    if found is None:
        raise ValueError(
            f"There is no adapter {name[:200]!r} in models/loras. Train one with Train SVD Output Adapter, or put the "
            "file there and press R to read the folder again."
        )
    return Path(found)


def checkpoint_layer(model: Any) -> OutputLayer:
    """The output layer of a MODEL as its checkpoint has it, without adapters and LoRAs."""
    patches = model.get_key_patches(LAYER)
    weight, bias = (patches[name][0][0] for name in (_WEIGHT, _BIAS))
    return output_layer(weight, bias)


def added_outputs(model: Any) -> list[AddedOutput]:
    """The adapters that a MODEL has in float32: none or one, since they add up."""
    return model.get_wrappers(_KIND, _KEY)


def _size(name: str) -> int:
    path = folder_paths.get_full_path(FOLDER, name)
    try:
        return os.path.getsize(path) if path else 0
    except OSError:
        return 0


NODES = [ApplySVDAdapter]
