"""Loading and saving weights under their official names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..atomic import atomic_write
from ..cv_vae import CVVAEConfig
from ..errors import CheckpointError
from ..keys import Config, Model, build, family_of_config, infer_config, key_map
from ..weights.detect import describe_foreign, family_of
from ..weights.files import read_weights, strip_foreign
from .codec import VideoVAE

DEMO_FOLDER = Path(__file__).parents[1] / "demo"
DEMO_WEIGHTS = {
    "demo-cv-vae": DEMO_FOLDER / "demo_cv_vae.safetensors",
    "demo-iv-vae": DEMO_FOLDER / "demo_iv_vae.safetensors",
}
DEMO_IMAGE_WEIGHTS = {"demo-image-vae": DEMO_FOLDER / "demo_image_vae.safetensors"}  # what training starts from
STORED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def load(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    scale_factor: float | None = None,
    shift_factor: float | None = None,
) -> VideoVAE:
    """A VAE from official weights; family and every width are inferred from names and shapes.

    source: a .safetensors, .pth, .pt, .ckpt or .bin file, a Hugging Face folder, a state dict, or the name of bundled
    demo weights, "demo-cv-vae" or "demo-iv-vae". Pickled code is never run.
    dtype: of the weights in use; None keeps what the file has. Tensors are converted one by one, and where nothing
    changes they stay mapped from the file (or shared with the state dict), so there is no second copy in RAM.
    scale_factor, shift_factor: for IV-VAE, latent = scale_factor * (mean - shift_factor); None takes what the file says
    of itself, else the published numbers for its widths, else 1 and 0. Not for CV-VAE, whose latents are unscaled.

    The model is in eval mode and needs no gradients; `vae.model.requires_grad_(True)` makes it trainable.
    Raises CheckpointError when the source is not a complete set of weights of a known family, and says what it seems
    to be.
    """
    metadata: dict[str, Any] = {}
    if isinstance(source, Mapping):
        origin, tensors = "The state dict", dict(source)
        _check_state_dict(tensors)
    else:
        path = DEMO_WEIGHTS.get(os.fspath(source), Path(source))
        file = read_weights(path)
        origin, tensors = f"The file {path}", file.tensors
        metadata = {**file.metadata, **(file.config or {})}
    tensors = strip_foreign(tensors)
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    family = family_of(shapes)
    if family is None:
        raise CheckpointError(f"{origin} holds no CV-VAE or IV-VAE. {describe_foreign(shapes)}")
    if family != "iv-vae" and (scale_factor is not None or shift_factor is not None):
        raise CheckpointError(
            f"scale_factor and shift_factor were given for {family}, whose latents are unscaled here: the diffusion "
            "model scales them. Leave them out."
        )
    if family == "iv-vae":
        scale_factor = _number(metadata, "scale_factor", origin) if scale_factor is None else scale_factor
        shift_factor = _number(metadata, "shift_factor", origin) if shift_factor is None else shift_factor
    config = infer_config(shapes, family, scale_factor=scale_factor, shift_factor=shift_factor)
    model = _meta_model(config, origin)
    _assign(model, tensors, origin, torch.device(device), dtype)
    return VideoVAE(model.eval().requires_grad_(False))


def official_state(model: Model) -> dict[str, Tensor]:
    """The state dict of `model` under official names and shapes; views of its weights where the layout allows."""
    names = key_map(model)
    return {names[ours][0]: tensor.detach().reshape(names[ours][1]) for ours, tensor in model.state_dict().items()}


def save(vae: VideoVAE, path: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> None:
    """Write the weights under official names, which the official code loads.

    path: ends in .safetensors, or in .pth for torch.save of the bare state dict. dtype: None keeps the model's.
    The file appears under its name only when it is complete. Raises CheckpointError for another ending or a folder that
    does not exist, OSError where the disk does not take it.
    """
    target = Path(path)
    if target.suffix not in (".safetensors", ".pth"):
        raise CheckpointError(f"Cannot save weights as {target.name}: give a name that ends in .safetensors or .pth.")
    if not target.parent.is_dir():
        raise CheckpointError(f"Cannot save {target.name}: the folder {target.parent} does not exist. Make it first.")
    state = {
        name: tensor.to("cpu", dtype or tensor.dtype).contiguous() for name, tensor in official_state(vae.model).items()
    }
    with atomic_write(target) as part:
        if target.suffix == ".pth":
            torch.save(state, part)
        else:
            safetensors.torch.save_file(state, part, metadata=_metadata(vae))


def _metadata(vae: VideoVAE) -> dict[str, str]:
    metadata = {"format": "pt", "family": vae.family}
    if not isinstance(vae.model.config, CVVAEConfig):
        metadata["scale_factor"] = repr(vae.model.config.scale_factor)
        metadata["shift_factor"] = repr(vae.model.config.shift_factor)
    return metadata


def _check_state_dict(tensors: Mapping[Any, Any]) -> None:
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"The state dict holds {name!r}: {type(tensor).__name__}; needed are tensors by name. If the weights "
                'are nested, pass the inner dict, such as checkpoint["state_dict"].'
            )


def _number(metadata: Mapping[str, Any], name: str, origin: str) -> float | None:
    if name not in metadata:
        return None
    try:
        return float(metadata[name])
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{origin} gives {name} as {metadata[name]!r}, which is not a number. Pass {name}=... to load instead."
        ) from error


def _meta_model(config: Config, origin: str) -> Model:
    try:
        with torch.device("meta"):
            return build(config)
    except (RuntimeError, MemoryError, OverflowError, TypeError) as error:
        raise CheckpointError(f"{origin} implies impossible widths, {config}: the file is damaged.") from error


def _assign(
    model: Model, tensors: dict[str, Tensor], origin: str, device: torch.device, dtype: torch.dtype | None
) -> None:
    """Give `model` its weights, checked strictly against the official names and shapes."""
    family = family_of_config(model.config)
    names = key_map(model)
    expected = {theirs: (ours, shape) for ours, (theirs, shape) in names.items()}
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        raise CheckpointError(
            f"{origin} looks like {family} weights, but {_few(missing, 'is missing', 'are missing')}"
            f"{' and ' if missing and unknown else ''}{_few(unknown, 'is unknown', 'are unknown')}. It is incomplete "
            "or altered, or of another version: download it again, or save only the VAE's own tensors."
        )
    state: dict[str, Tensor] = {}
    for theirs, (ours, shape) in expected.items():
        tensor = tensors[theirs]
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{origin} looks like {family} weights, but {theirs} has shape {tuple(tensor.shape)} where the other "
                f"tensors ask for {shape}. The file is damaged or mixes two models: download it again."
            )
        if tensor.dtype not in STORED_DTYPES:
            raise CheckpointError(
                f"{origin} has {theirs} as {tensor.dtype}; read are float16, bfloat16, float32 and float64. Take the "
                "file that was not quantized."
            )
        ours_shape = model.get_parameter(ours).shape
        state[ours] = tensor.to(device, dtype or tensor.dtype).reshape(ours_shape)
    model.load_state_dict(state, strict=True, assign=True)


def _few(names: list[str], one: str, many: str) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more} {one if len(names) == 1 else many}"
